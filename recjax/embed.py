"""`recjax embed`: vectors of the items of a data directory from their texts, by a sentence encoder of the BERT kind.

    recjax embed --model=all-MiniLM-L6-v2 --data=DIR --name=minilm

writes `vectors/minilm.npy` and `vectors/minilm_ids.parquet` into the data directory, where recipes find content vectors
(`data.features.ItemVectors`). `--model` is a folder of Hugging Face or sentence-transformers. Nothing is overwritten.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from recjax import cli, command
from recjax.bridge.bert import read_bert, read_tokenizer
from recjax.cli import ArgumentParser
from recjax.core.errors import DataError
from recjax.core.module import Functional, Params
from recjax.core.progress import Progress
from recjax.data.sources import DataDir
from recjax.data.titles import title_column

# Texts of a batch are padded to a multiple of this, so that few shapes are compiled.
_LENGTHS = 16


def main(argv: list[str]) -> int:
    """The verb; returns the exit status."""
    flags = ArgumentParser("embed")
    flags.add_argument("--model", type=Path, required=True, help="folder of the encoder: config.json, safetensors, ...")
    flags.add_argument("--data", type=Path, required=True, help="the data directory, which has an items table")
    flags.add_argument("--name", required=True, help="of the vectors: vectors/NAME.npy")
    flags.add_argument("--text", default="", help="columns of the items table, joined by commas (default: the title)")
    flags.add_argument("--batch", type=int, default=64, help="texts encoded together")
    args = flags.parse_args(argv)
    target = args.data / "vectors" / f"{args.name}.npy"
    if target.exists():
        raise DataError("will not overwrite what exists", where=str(target), mend="give another --name")
    ids, texts = texts_of(args.data, tuple(filter(None, args.text.split(","))))
    command.start_jax()
    model, params = read_bert(args.model)
    longest = int(params["position"].shape[0])
    vectors = embed(model, params, read_tokenizer(args.model, longest), texts, batch=args.batch)
    write(target, vectors, ids)
    print(f"{len(vectors):,} vectors of width {vectors.shape[1]} in {target}")
    return 0


def texts_of(data: Path, columns: tuple[str, ...]) -> tuple[pl.Series, list[str]]:
    """The ids of the items that have a text, and their texts: the columns one after the other, by ". "."""
    items = DataDir(path=str(data)).load().items
    title = title_column(items)
    columns = columns or ((title,) if title else ())
    missing = [c for c in columns if items is None or c not in items.columns]
    if items is None or not columns or missing:
        raise DataError(
            f"there is no column {', '.join(missing)}" if missing else "the items have no text",
            where=f"{data}, table items",
            expected="one of: " + ", ".join(items.columns) if items is not None else "a table items",
            mend="--text=COLUMN",
        )
    joined = items.select(
        "item_id", text=pl.concat_str([pl.col(c).cast(pl.String) for c in columns], separator=". ", ignore_nulls=True)
    ).filter(pl.col("text").str.strip_chars() != "")
    return joined["item_id"], joined["text"].to_list()


def embed(
    model: Functional,
    params: Params,
    encode: Callable[[Sequence[str]], np.ndarray],
    texts: Sequence[str],
    *,
    batch: int = 64,
) -> np.ndarray:
    """float32 [texts, d]; texts of similar length go together."""
    run: Any = jax.jit(functools.partial(model.apply, train=False, key=None))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    params, out = jax.device_put(params), None
    with Progress("embed", total=len(texts)) as progress:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            ids = encode([texts[i] for i in chosen])
            width = min(-(-ids.shape[1] // _LENGTHS) * _LENGTHS, params["position"].shape[0])
            tokens = np.zeros((batch, max(width, ids.shape[1])), np.int32)
            tokens[: len(chosen), : ids.shape[1]] = ids
            found = np.asarray(run(params, {"tokens": jax.numpy.asarray(tokens)})["hidden"])[: len(chosen)]
            out = np.zeros((len(texts), found.shape[1]), np.float32) if out is None else out
            out[chosen] = found
            progress.update(start + len(chosen))
    return np.zeros((0, 0), np.float32) if out is None else out


def write(target: Path, vectors: np.ndarray, ids: pl.Series) -> None:
    """`target` and its ids beside it, each whole or not at all, the vectors last."""
    target.parent.mkdir(exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        pl.DataFrame({"item_id": ids}).write_parquet(beside)
        os.replace(beside, target.with_name(f"{target.stem}_ids.parquet"))
        with open(beside, "wb") as opened:
            np.save(opened, vectors)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
