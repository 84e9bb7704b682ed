"""Decoder-only language models from and to folders of Hugging Face: `config.json`, safetensors and the tokenizer.

Arrays are streamed: read one at a time, of however many files there are, and written a file at a time. Whatever else
a tokenizer needs is copied as it is. A folder that is not exactly what its `config.json` says is refused with all
that differs; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from recjax.bridge.decoder import FIRST_ROW, HEAD, Decoder, Piece, pieces
from recjax.bridge.decoder_config import of_config, to_config
from recjax.bridge.tensors import Tensors, open_safetensors, read_config, refuse, write_safetensors
from recjax.core import saved
from recjax.core.errors import CheckpointError
from recjax.core.saved import Signature

SHARD_BYTES = 5_000_000_000
# The files of a tokenizer, of which a folder has some.
TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)

Make = Callable[[str, tuple[int, ...]], np.ndarray]


def open_decoder(path: Path) -> Decoder:
    """What the `config.json` of a folder describes; raises `CheckpointError` where ours cannot be that."""
    return of_config(read_config(path), path)


def read_decoder(path: Path, make: Make | None = None) -> tuple[Decoder, dict[str, Any]]:
    """The model in a folder, and its parameters as a nested dict of float32 arrays.

    `make` gives the arrays that they are put into, by path and shape, filled with zeros: files mapped into memory, for
    a model that is larger than that. Besides these one array of theirs is held at a time. Rows before and after the
    text's are zero. Raises `CheckpointError` with every difference.
    """
    there = open_safetensors(path)
    decoder = of_config(there.config, path)
    parts = pieces(decoder)
    there.check({part.name: part.shape for part in parts}, ignored=_unused(there, decoder))
    make = make or (lambda _, shape: np.zeros(shape, np.float32))
    params = {name: make(name, shape) for name, (_, shape) in decoder.signature().items()}
    for part in parts:
        params[part.path][part.index or ...] = part.read(there.read(part.name))
    return decoder, saved.nested(params)


def write_decoder(
    out: Path,
    decoder: Decoder,
    signature: Signature,
    read: Callable[[str], np.ndarray],
    *,
    dtype: Any = np.float32,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A folder for Hugging Face from the parameters of a `Sequence`, with the tokenizer of another folder, if given.

    `signature` says which parameters there are, `read` gives the array of a path; one parameter, of all layers, is
    held at a time, and one file. Raises `CheckpointError` with every difference when they are not those of `decoder`,
    or when `out` exists.
    """
    shapes: Signature = {path: ("float32", shape) for path, (_, shape) in signature.items()}
    refuse(saved.differences(shapes, decoder.signature()), out)
    held: dict[str, np.ndarray] = {}

    def array(part: Piece) -> np.ndarray:
        if part.path not in held:
            held.clear()
            held[part.path] = read(part.path)
        return part.write(held[part.path][part.index or ...])

    tensors = {part.name: (part.shape, lambda part=part: array(part)) for part in pieces(decoder)}
    config = to_config(decoder, str(np.dtype(dtype)))
    files = tokenizer_files(tokenizer) if tokenizer else []
    write_safetensors(out, config, tensors, dtype=np.dtype(dtype), shard_bytes=shard_bytes, files=files)


def tokenizer_files(path: Path) -> list[Path]:
    """What a folder has of a tokenizer."""
    return [path / name for name in TOKENIZER if (path / name).is_file()]


def with_rows(params: dict[str, Any], decoder: Decoder, words: int, num_rows: int) -> dict[str, Any]:
    """`params` with tables of `num_rows` for a vocabulary of `words`, which may leave the last tokens unused.

    Raises `CheckpointError` when the vocabulary has more words than the tables.
    """
    if words > decoder.words:
        raise CheckpointError(
            f"a tokenizer of {words} tokens for a model of {decoder.words}",
            expected="a row of the embedding for each token",
            mend="take the tokenizer that came with the checkpoint",
        )
    used = FIRST_ROW + words
    out = dict(params)
    for name in ("table", "head"):
        if name in params:
            out[name] = np.zeros((num_rows, params[name].shape[1]), np.float32)
            out[name][:used] = params[name][:used]
    return out


def _unused(there: Tensors, decoder: Decoder) -> list[str]:
    """Arrays that repeat others: angles of the rope, and the head where it is the table."""
    names = [name for name in there.shapes if name.endswith(".rotary_emb.inv_freq")]
    return [*names, HEAD] if decoder.encoder.tied_head else names
