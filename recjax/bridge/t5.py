"""What the parameters of T5 1.1 are called elsewhere, and how they lie there.

`recjax.models.seq2seq.EncoderDecoder` keeps the layers of a stack in one array; Hugging Face and T5X have an array for
each layer, with heads joined. Hugging Face keeps weights as [out, in] and T5X as [in, out], the head alone the other
way round. `pieces` says for every parameter which foreign arrays it is made of; nothing is read or written here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax
import numpy as np

from recjax.core import saved
from recjax.core.module import Functional
from recjax.models.seq2seq import EncoderDecoder, t5_stack

World = Literal["hf", "t5x"]

# A parameter of a layer, how many of its dimensions are inputs of a product (0: a vector, everywhere the same), and its
# names in Hugging Face and T5X.
_ATTENTION = (("query", 1, "q"), ("key", 1, "k"), ("value", 1, "v"), ("out", 2, "o"))
_FFN = (("gate", 1, "wi_0"), ("inner", 1, "wi_1"), ("outer", 1, "wo"))


def _layer(stack: str) -> list[tuple[str, int, str, str]]:
    parts = [("attention", "SelfAttention", "attention", "pre_attention_layer_norm")]
    if stack == "decoder":
        parts = [
            ("attention", "SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
            ("cross", "EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
        ]
    out = []
    for i, (part, hf, t5x, norm) in enumerate(parts):
        out.append((f"{part}_norm/scale", 0, f"layer.{i}.layer_norm.weight", f"{norm}/scale"))
        for name, inputs, short in _ATTENTION:
            out.append((f"{part}/{name}", inputs, f"layer.{i}.{hf}.{short}.weight", f"{t5x}/{name}/kernel"))
    last = len(parts)
    out.append(("ffn_norm/scale", 0, f"layer.{last}.layer_norm.weight", "pre_mlp_layer_norm/scale"))
    for name, inputs, short in _FFN:
        out.append((f"ffn/{name}", inputs, f"layer.{last}.DenseReluDense.{short}.weight", f"mlp/{short}/kernel"))
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What tells one T5 1.1 from another; `rows` of its tables, `is_tied` when the input table is the head as well."""

    rows: int
    width: int
    num_heads: int
    head_dim: int
    mlp_width: int
    encoder_layers: int
    decoder_layers: int
    is_tied: bool = False

    def model(self) -> Functional:
        """The model of these sizes; its head is a parameter of its own also where it is tied elsewhere."""
        sizes = {name: getattr(self, name) for name in ("width", "num_heads", "head_dim", "mlp_width")}
        encoder = t5_stack(num_layers=self.encoder_layers, **sizes)
        decoder = t5_stack(num_layers=self.decoder_layers, is_decoder=True, **sizes)
        return Functional(lambda rngs: EncoderDecoder(num_rows=self.rows, encoder=encoder, decoder=decoder, rngs=rngs))

    def signature(self) -> saved.Signature:
        """dtype and shape of every parameter by path."""
        return dict(_signature(self))


@functools.lru_cache(maxsize=8)
def _signature(sizes: Sizes) -> saved.Signature:
    return saved.signature(jax.eval_shape(sizes.model().init, jax.random.key(0)))


@dataclasses.dataclass(frozen=True)
class Piece:
    """A foreign array: the whole of parameter `path` or its layer `layer`, of `shape` there and `inner` here."""

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]
    inner: tuple[int, ...]
    is_turned: bool

    def read(self, there: np.ndarray) -> np.ndarray:
        """The array as it lies here."""
        return (there.T if self.is_turned else there).reshape(self.inner)

    def write(self, here: np.ndarray) -> np.ndarray:
        """Undo `read`."""
        return here.reshape(self.shape[::-1]).T if self.is_turned else here.reshape(self.shape)


def pieces(sizes: Sizes, world: World) -> list[Piece]:
    """Every foreign array of a model, in the order of the parameters; a tied head has the name of the input table."""
    signature, hf = sizes.signature(), world == "hf"
    out = []

    def add(path: str, layer: int | None, inputs: int, turned: bool, name: str) -> None:
        inner = signature[path][1][0 if layer is None else 1 :]
        shape = (math.prod(inner[:inputs]), math.prod(inner[inputs:])) if inputs else inner
        out.append(Piece(name, path, layer, shape[::-1] if turned else shape, inner, turned))

    add("table", None, 0, False, "shared.weight" if hf else "token_embedder/embedding")
    head = "shared.weight" if hf else "token_embedder/embedding"
    if not sizes.is_tied:
        head = "lm_head.weight" if hf else "decoder/logits_dense/kernel"
    add("head", None, 1, not hf and not sizes.is_tied, head)
    for stack, layers in (("encoder", sizes.encoder_layers), ("decoder", sizes.decoder_layers)):
        bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight" if hf else "relpos_bias/rel_embedding"
        add(f"{stack}/relative_bias", None, 1, hf, f"{stack}{'.' if hf else '/'}{bias}")
        norm = f"{stack}.final_layer_norm.weight" if hf else f"{stack}/{stack}_norm/scale"
        add(f"{stack}/final_norm/scale", None, 0, False, norm)
        for path, inputs, hf_name, t5x_name in _layer(stack):
            for i in range(layers):
                name = f"{stack}.block.{i}.{hf_name}" if hf else f"{stack}/layers_{i}/{t5x_name}"
                add(f"{stack}/layers/{path}", i, inputs, hf and inputs > 0, name)
    return out
