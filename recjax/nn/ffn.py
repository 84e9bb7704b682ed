"""The position-wise feed-forward part of a block."""

from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from recjax.core.module import Initializer, Module, Rngs, param
from recjax.nn.linear import linear

FfnKind = Literal["relu", "gelu", "gelu_tanh", "gated_gelu", "swiglu"]


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": _gelu,
    "gelu_tanh": jax.nn.gelu,
    "gated_gelu": jax.nn.gelu,
    "swiglu": jax.nn.silu,
}
GATED = ("gated_gelu", "swiglu")


class FeedForward(Module):
    """`act(x W_in) W_out`, or gated `(act(x W_gate) * x W_in) W_out` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(
        self,
        *,
        kind: FfnKind,
        width: int,
        mlp_width: int,
        bias: bool,
        init: Initializer,
        out_init: Initializer,
        rngs: Rngs,
    ) -> None:
        self.kind = kind
        zeros = nnx.initializers.zeros
        self.gate = param(rngs, (width, mlp_width), ("embed", "mlp"), init) if kind in GATED else None
        self.inner = param(rngs, (width, mlp_width), ("embed", "mlp"), init)
        self.inner_bias = param(rngs, (mlp_width,), ("mlp",), zeros) if bias else None
        self.outer = param(rngs, (mlp_width, width), ("mlp", "embed"), out_init)
        self.outer_bias = param(rngs, (width,), (None,), zeros) if bias else None

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Computes in the dtype of `x`."""
        act = ACTIVATIONS[self.kind]
        bias = None if self.inner_bias is None else self.inner_bias[...]
        inner = linear(x, self.inner[...], bias)
        inner = act(inner) if self.gate is None else act(linear(x, self.gate[...], None)) * inner
        return linear(inner, self.outer[...], None if self.outer_bias is None else self.outer_bias[...])
