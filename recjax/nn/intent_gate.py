"""How much the person counts, by what is asked for.

A ranker that knows the person may bend a plain query to their taste, which hurts its relevance (UniCoRn, Bhattacharya
et al. 2024, warn of it; the gate is ours). The fields of the person are scaled by a factor that the query decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs, param
from recjax.nn.interaction import InputShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntentGate:
    """The vectors of the fields `of`, times 2 sigmoid(w x + b), x being the vector of the field `by`; 1 when fresh."""

    by: str
    of: Sequence[str]

    def __post_init__(self) -> None:
        if not self.of or self.by in self.of:
            raise ConfigError(
                f"the field {self.by!r} cannot gate {', '.join(self.of) or 'nothing'}",
                where="IntentGate",
                expected="the names of fields other than itself in `of`",
            )

    def make(self, inputs: InputShape, *, rngs: Rngs) -> IntentGateLayer:
        """The module; `ConfigError` for a field that has no vector."""
        return IntentGateLayer(self, inputs, rngs=rngs)


class IntentGateLayer(Module):
    """See `IntentGate`."""

    def __init__(self, config: IntentGate, inputs: InputShape, *, rngs: Rngs) -> None:
        [self.by], self.of = inputs.places((config.by,)), inputs.places(tuple(config.of))
        self.weight = param(rngs, (inputs.width,), (None,), nnx.initializers.zeros)
        self.bias = param(rngs, (), (), nnx.initializers.zeros)

    def __call__(self, vectors: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """All vectors, those of the gated fields scaled."""
        factor = 2 * jax.nn.sigmoid(vectors[:, self.by] @ self.weight[...] + self.bias[...])
        gated = jnp.isin(jnp.arange(vectors.shape[1]), jnp.asarray(self.of))
        return jnp.where(gated[None, :, None], factor[:, None, None], 1) * vectors
