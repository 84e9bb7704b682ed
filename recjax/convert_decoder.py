"""Language models of Hugging Face made into checkpoints of ours, and back: what `recjax convert` does with a decoder.

A checkpoint made here has a folder `hugging_face` beside it with the `config.json` and the tokenizer that it came with,
and the model as a gin file, so that it can go back and a recipe can include it. Which way the numbers lie and what
was left out is said in what the functions return, for the verb to print.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from recjax.bridge.decoder import FIRST_ROW, Decoder, pieces
from recjax.bridge.decoder_config import FAMILIES, as_gin
from recjax.bridge.decoder_files import open_decoder, read_decoder, tokenizer_files, with_rows, write_decoder
from recjax.bridge.tensors import CONFIG, read_config
from recjax.core import saved
from recjax.core.errors import CheckpointError
from recjax.core.saved import Signature
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.recipe import Assembly

# What a converted checkpoint keeps of where it came from.
ORIGIN, MODEL = "hugging_face", "model.gin"
Save = Callable[..., None]


def is_decoder(source: Path) -> bool:
    """Whether a folder holds a decoder-only language model of Hugging Face."""
    return (source / CONFIG).is_file() and read_config(source).get("model_type") in FAMILIES


def to_ours(source: Path, out: Path, save: Save, assembly: Assembly | None = None) -> str:
    """Write the checkpoint of step 0 by `save(out, params, ...)`, and say what was done.

    Parameters are put together in files beside `out`, which are gone afterwards: reading needs the memory of one of
    their arrays, writing that of two. With an `assembly` tables have the rows of its tokenizer. Raises
    `CheckpointError` with all that differs.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        decoder, params = read_decoder(source, functools.partial(_in_file, Path(scratch)))
        if assembly is None:
            save(out, params)
        else:
            params = with_rows(params, decoder, assembly.vocab.num_items, assembly.num_rows)
            _check(params, assembly)
            save(out, params, recipe=assembly.recipe.name, vocabulary=assembly.vocabulary_hash)
    carried = tokenizer_files(source)
    origin = out / ORIGIN
    origin.mkdir()
    for file in (source / CONFIG, *carried):
        shutil.copyfile(file, origin / file.name)
    (out / MODEL).write_text(as_gin(decoder.encoder), encoding="utf-8")
    names = ", ".join(file.name for file in carried) or "none found"
    return f"{described(decoder)}\nstep 0 in {out}, for WarmStart.checkpoints; model in {MODEL}; tokenizer: {names}"


def to_hugging_face(
    source: str, out: Path, decoder: Decoder, signature: Signature, read: Callable[[str], np.ndarray], **more: Any
) -> str:
    """Write a folder for Hugging Face from a checkpoint of a `Sequence`, and say what was done."""
    tokenizer = more.get("tokenizer")
    write_decoder(out, decoder, signature, read, **more)
    carried = [file.name for file in tokenizer_files(tokenizer)] if tokenizer else []
    return f"{source}: {described(decoder)}\nin {out}; tokenizer: {', '.join(carried) or 'none found'}"


def decoder_of(like: Path | None, checkpoints: Path, assembly: Assembly | None) -> tuple[Decoder, Path | None]:
    """Which model a checkpoint of ours is, and the folder of its tokenizer.

    The folder `like` says so, or the recipe, or what the checkpoint was converted from. Raises `CheckpointError`
    where nothing does.
    """
    origin = like or (checkpoints / ORIGIN if (checkpoints / ORIGIN).is_dir() else None)
    if assembly is not None:
        return _of_recipe(assembly), origin
    if origin is None:
        raise CheckpointError(
            "a checkpoint does not say which settings its language model has",
            where=str(checkpoints),
            mend="give the recipe, or with --like a folder of Hugging Face with the same model",
        )
    return open_decoder(origin), origin


def described(decoder: Decoder) -> str:
    """A model in a few lines."""
    c, count = decoder.encoder, decoder.parameters()
    experts = f", {c.moe.top_k} of {c.moe.num_experts} experts" if c.moe else ""
    scaling = f", {c.rope_scaling}" if c.rope_scaling else ""
    head = "tied head" if c.tied_head else "a head of its own"
    return (
        f"{count:,} parameters in {len(pieces(decoder)):,} arrays: {c.num_layers} layers of width {c.width}, "
        f"{c.num_heads} heads of {c.head_width} on {c.kv_heads}, inner width {c.inner_width}{experts}\n"
        f"{decoder.words:,} tokens in rows {FIRST_ROW} to {FIRST_ROW + decoder.words - 1} of {decoder.num_rows:,}, "
        f"{head}; heads rotated in halves, theta {c.rope_theta:g}{scaling}"
    )


def _of_recipe(assembly: Assembly) -> Decoder:
    model: Any = assembly.model.bind(assembly.abstract_params())
    encoder = model.config if type(model) is Sequence else None
    if (
        not isinstance(encoder, TransformerConfig)
        or model.scale_embedding
        or model.normalize
        or model.position is not None
    ):
        raise CheckpointError(
            f"a {type(model).__name__} has no place among Hugging Face's decoders",
            where=assembly.recipe.name,
            expected="a sequence.Sequence without scale_embedding, normalize and learned positions",
        )
    return Decoder(words=assembly.vocab.num_items, encoder=encoder)


def _check(params: dict[str, Any], assembly: Assembly) -> None:
    if lines := saved.differences(saved.signature(params), saved.signature(assembly.abstract_params())):
        raise CheckpointError(
            "this checkpoint is not of the recipe's model:\n    " + "\n    ".join(lines),
            where=assembly.recipe.name,
            mend=f"convert it without the recipe and include the {MODEL} that is written",
        )


def _in_file(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of zeros that lies in a file."""
    return np.memmap(folder / name.replace("/", "."), np.float32, "w+", shape=shape)
