"""A stack of plain layers over the last dimension."""

from collections.abc import Sequence
from itertools import pairwise

import jax
from flax import nnx
from jaxtyping import Array, Float

from recjax.core.module import Module, Rngs, param
from recjax.nn.config import fan_in_normal


class Mlp(Module):
    """x W_1 + b_1, a ReLU, x W_2 + b_2, ..., the last layer without ReLU.

    `widths` are those of the input, of the layers in between, and of the output.
    """

    def __init__(self, widths: Sequence[int], *, rngs: Rngs) -> None:
        self.layers = len(widths) - 1
        # Every other width is split over devices, so that layer after layer only activations travel.
        axes = [*("mlp" if i % 2 else None for i in range(self.layers)), None]
        for i, (inner, outer) in enumerate(pairwise(widths)):
            setattr(self, f"layer{i}", param(rngs, (inner, outer), (axes[i], axes[i + 1]), fan_in_normal))
            setattr(self, f"layer{i}_bias", param(rngs, (outer,), (axes[i + 1],), nnx.initializers.zeros))

    def __call__(self, x: Float[Array, "n i"]) -> Float[Array, "n o"]:
        for i in range(self.layers):
            x = x @ getattr(self, f"layer{i}")[...] + getattr(self, f"layer{i}_bias")[...][None]
            x = jax.nn.relu(x) if i < self.layers - 1 else x
        return x
