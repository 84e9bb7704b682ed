"""What the parameters of decoder-only language models are called in Hugging Face's files, and how they lie there.

Llama, Mistral, Mixtral, Qwen2 and Qwen3 are all a `models.sequence.Sequence` whose catalogue is the text vocabulary:
text token t has row `FIRST_ROW` + t of the tables. We keep all layers, and all experts, in one array; they have an
array for each, [out, in] with heads joined. Heads are rotated in halves, as those files are laid out; Mistral's own
files, with interleaved pairs, are not read. Nothing is read or written here, and settings that are not in the arrays
are the matter of `recjax.bridge.decoder_config`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np

from recjax.core import saved
from recjax.core.module import Functional
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig

# As `recjax.data.vocab` lays out every table: padding, unknown, then the catalogue, in a multiple of 128 rows.
FIRST_ROW, ROW_MULTIPLE = 2, 128

TABLE, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# A parameter of a layer, how many of its dimensions are inputs of a product (0: a vector, the same there), their name.
_ATTENTION = (
    ("attention_norm/scale", 0, "input_layernorm.weight"),
    *(
        (f"attention/{name}", 1, f"self_attn.{short}_proj.weight")
        for name, short in zip(("query", "key", "value"), "qkv", strict=True)
    ),
    ("attention/out", 2, "self_attn.o_proj.weight"),
    ("ffn_norm/scale", 0, "post_attention_layernorm.weight"),
)
_QKV_BIAS = tuple((f"attention/{name}_bias", 0, f"self_attn.{name[0]}_proj.bias") for name in ("query", "key", "value"))
_QK_NORM = tuple((f"attention/{name}_norm/scale", 0, f"self_attn.{name[0]}_norm.weight") for name in ("query", "key"))
_FFN = tuple(
    (f"ffn/{name}", 1, f"mlp.{n}_proj.weight") for name, n in (("gate", "gate"), ("inner", "up"), ("outer", "down"))
)
_ROUTER = (("ffn/router", 1, "block_sparse_moe.gate.weight"),)
_EXPERT = (("ffn/gate", "w1"), ("ffn/inner", "w3"), ("ffn/outer", "w2"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """A language model of `words` text tokens whose stack is `encoder`."""

    words: int
    encoder: TransformerConfig

    @property
    def num_rows(self) -> int:
        """Rows of its tables here."""
        return -(-(FIRST_ROW + self.words) // ROW_MULTIPLE) * ROW_MULTIPLE

    def model(self) -> Functional:
        """The model of these sizes."""
        return Functional(functools.partial(Sequence, num_rows=self.num_rows, encoder=self.encoder))

    def signature(self) -> saved.Signature:
        """dtype and shape of every parameter by path."""
        return dict(_signature(self))

    def parameters(self) -> int:
        """How many numbers its files hold."""
        return sum(math.prod(piece.shape) for piece in pieces(self))


@functools.lru_cache(maxsize=8)
def _signature(decoder: Decoder) -> saved.Signature:
    return saved.signature(jax.eval_shape(decoder.model().init, jax.random.key(0)))


@dataclasses.dataclass(frozen=True)
class Piece:
    """An array of theirs: what is at `index` of parameter `path`; of `shape` there, of `inner` here."""

    name: str
    path: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]
    inner: tuple[int, ...]
    is_turned: bool

    def read(self, there: np.ndarray) -> np.ndarray:
        """The array as it lies here."""
        return (there.T if self.is_turned else there).reshape(self.inner)

    def write(self, here: np.ndarray) -> np.ndarray:
        """Undo `read`, of the parameter at `index`."""
        return here.reshape(self.shape[::-1]).T if self.is_turned else here.reshape(self.shape)


def pieces(decoder: Decoder) -> list[Piece]:
    """Every array of theirs, in the order of our parameters."""
    signature, layers, moe = decoder.signature(), decoder.encoder.num_layers, decoder.encoder.moe
    words = slice(FIRST_ROW, FIRST_ROW + decoder.words)
    width = decoder.encoder.width
    out = [Piece(TABLE, "table", (words,), (decoder.words, width), (decoder.words, width), False)]
    if not decoder.encoder.tied_head:
        out.append(dataclasses.replace(out[0], name=HEAD, path="head"))
    out.append(Piece(FINAL_NORM, "encoder/final_norm/scale", (), (width,), (width,), False))
    for path, inputs, name in _of_layer(decoder.encoder):
        full = f"encoder/layers/{path}"
        for i in range(layers):
            out.append(_piece(f"model.layers.{i}.{name}", full, (i,), signature[full][1][1:], inputs))
    for path, name in _EXPERT if moe else ():
        full = f"encoder/layers/{path}"
        for i, e in np.ndindex(layers, moe.num_experts if moe else 0):
            there = f"model.layers.{i}.block_sparse_moe.experts.{e}.{name}.weight"
            out.append(_piece(there, full, (i, e), signature[full][1][2:], 1))
    return out


def _of_layer(encoder: TransformerConfig) -> Iterator[tuple[str, int, str]]:
    yield from _ATTENTION
    yield from _QKV_BIAS if encoder.has_qkv_bias else ()
    yield from _QK_NORM if encoder.qk_norm else ()
    yield from _ROUTER if encoder.moe else _FFN


def _piece(name: str, path: str, index: tuple[int, ...], inner: tuple[int, ...], inputs: int) -> Piece:
    shape = (math.prod(inner[inputs:]), math.prod(inner[:inputs])) if inputs else (math.prod(inner),)
    return Piece(name, path, index, shape, inner, inputs > 0)
