"""`recjax convert`: language models of other programs into checkpoints of ours, and ours into Hugging Face's.

    recjax convert --source=flan-t5-base --out=runs/flan            a folder to warm start from (WarmStart.checkpoints)
    recjax convert RECIPE --source=flan-t5-base --out=runs/flan     the same with a row for each token of the recipe
    recjax convert --source=runs/joint --out=joint-hf               a run, or its checkpoints, for Hugging Face
    recjax convert --source=runs/sft --out=sft-hf --like=mixtral    the same of a decoder: settings, tokenizer of `like`
    recjax convert RECIPE --source=runs/cpt --out=cpt-hf            the same, with the settings of the recipe's model

A folder of Hugging Face has `config.json` and safetensors, and holds T5 1.1, Llama, Mistral, Mixtral, Qwen2 or Qwen3;
one of T5X has a file `checkpoint`. Nothing is overwritten, and what is not exactly one of these is refused with all
that differs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from recjax import cli, command, convert_decoder
from recjax.bridge.t5_files import read_t5, write_t5
from recjax.bridge.vocabulary import with_items
from recjax.core import saved
from recjax.core.checkpoint import Checkpointer, Checkpoints, read_checkpoint
from recjax.core.errors import CheckpointError, ConfigError
from recjax.core.flags import parse_argv
from recjax.core.saved import Record
from recjax.core.state import TrainState, by_path
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly
from recjax.train import CHECKPOINTS

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def main(argv: list[str]) -> int:
    """The verb; returns the exit status."""
    flags = command.parser("convert")
    flags.add_argument("--source", type=Path, required=True, help="folder of a checkpoint, or of a run")
    flags.add_argument("--out", type=Path, required=True, help="the new folder; nothing is overwritten")
    flags.add_argument("--step", default="newest", help='of a run: a step, "newest", or "max:METRIC"')
    flags.add_argument("--dtype", choices=DTYPES, default="float32", help="of what is written for Hugging Face")
    flags.add_argument(
        "--items",
        choices=("noise", "titles"),
        default="noise",
        help="vectors of item tokens: near the mean of all words, or the mean of the words of their titles",
    )
    flags.add_argument("--like", type=Path, help="folder of Hugging Face whose settings and tokenizer a decoder has")
    given = parse_argv(argv)
    args = flags.parse_args(list(given.rest))
    if args.out.exists():
        raise CheckpointError("will not overwrite what exists", where=str(args.out), mend="give another folder")
    ours = _ours(args.source)
    command.start_jax()
    assembly = None
    if args.recipe or given.gin_files:
        parsed = command.parse(flags, argv)
        assembly = Assembly(parsed.recipe, ensure_prepared(parsed.recipe.mixture, args.cache))
    if ours is not None:
        print(_to_hugging_face(ours, args, assembly))
    elif convert_decoder.is_decoder(args.source):
        print(convert_decoder.to_ours(args.source, args.out, save, assembly))
    elif assembly is not None:
        print(_for_recipe(assembly, args))
    else:
        sizes, params = read_t5(args.source)
        save(args.out, params)
        print(f"{sizes} in {args.out}; its rows are the tokens of its own vocabulary")
    return 0


def save(out: Path, params: Any, *, recipe: str = "", vocabulary: str = "") -> None:
    """Parameters as the checkpoint of step 0 of a run, in a folder for `WarmStart.checkpoints`."""
    try:
        with Checkpointer(out, Checkpoints(), recipe=recipe, vocabulary=vocabulary) as checkpointer:
            checkpointer.save(TrainState(step=np.zeros((), np.int32), params=params, opt_state={}))
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def for_tokens(params: dict[str, Any], assembly: Assembly, *, by_title: bool = False) -> dict[str, Any]:
    """The parameters of a language model for the recipe's tokens (see `bridge.vocabulary`).

    `by_title` gives an item that is one token the mean of its title's words. Raises `ConfigError` when the recipe has
    no text, and `CheckpointError` with every difference when its model is another one.
    """
    tokens, examples = assembly.tokens, assembly.examples[0]
    if tokens is None or not tokens.text_size:
        raise ConfigError(
            "a language model has words, and this recipe has none",
            where=assembly.recipe.name,
            expected="Recipe.spelling, and a task with text",
        )
    texts: dict[int, Sequence[int]] = {}
    if by_title:
        vocabs = [v for e in assembly.examples if (v := e.text_vocab) is not None]
        if tokens.levels > 1:
            raise ConfigError(
                "an item of several tokens has no row for its title", mend="--items=noise, or tokens.AtomicIds"
            )
        texts = {row: vocabs[0].encode(t).tolist() for row, t in enumerate(examples.titles()) if t}
    out = dict(params)
    for name in ("table", "head"):
        out[name] = with_items(
            params[name],
            text_start=tokens.text_start,
            text_size=tokens.text_size,
            num_rows=tokens.num_rows,
            texts=texts,
            seed=assembly.recipe.seed,
        )
    wanted = saved.signature(assembly.abstract_params())
    if lines := saved.differences(saved.signature(out), wanted):
        raise CheckpointError(
            "this checkpoint is not of the recipe's model:\n    " + "\n    ".join(lines),
            where=assembly.recipe.name,
            mend="give the recipe's seq2seq.t5_stack the sizes of the checkpoint",
        )
    return out


def _for_recipe(assembly: Assembly, args: argparse.Namespace) -> str:
    sizes, params = read_t5(args.source)
    save(
        args.out,
        for_tokens(params, assembly, by_title=args.items == "titles"),
        recipe=assembly.recipe.name,
        vocabulary=assembly.vocabulary_hash,
    )
    return f"{sizes} with {assembly.num_rows} rows in {args.out}, for WarmStart.checkpoints"


def _to_hugging_face(checkpoints: Path, args: argparse.Namespace, assembly: Assembly | None) -> str:
    step = int(args.step) if args.step.isdigit() else args.step

    def write(path: Path, record: Record) -> str:
        stored = saved.params_of(record)
        forms = {name: record.signature[at] for name, at in stored.items()}

        def read(name: str) -> np.ndarray:
            form = jax.ShapeDtypeStruct(forms[name][1], forms[name][0], sharding=_one_device())
            [array] = by_path(saved.load(path, saved.nested({stored[name]: form}))).values()
            return np.asarray(array)

        if not any(name.startswith("decoder/") for name in forms):
            decoder, tokenizer = convert_decoder.decoder_of(args.like, checkpoints, assembly)
            more = {"dtype": DTYPES[args.dtype], "tokenizer": tokenizer}
            where = f"step {record.step} of {checkpoints}"
            return convert_decoder.to_hugging_face(where, args.out, decoder, forms, read, **more)
        sizes = write_t5(args.out, forms, read, dtype=DTYPES[args.dtype])
        return f"step {record.step} of {checkpoints}: {sizes} in {args.out}"

    return read_checkpoint(checkpoints, step, write)


def _one_device() -> Any:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _ours(source: Path) -> Path | None:
    """The checkpoints of a run, when that is what `source` is."""
    return next((path for path in (source, source / CHECKPOINTS) if saved.steps(path)), None)


if __name__ == "__main__":
    sys.exit(cli.run(main))
