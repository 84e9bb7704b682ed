"""Gated recurrent units over packed rows, in the place of a transformer (GRU4Rec: Hidasi et al. 2016, 1511.06939)."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs, param
from recjax.core.sharding import constrain
from recjax.nn.config import fan_in_normal
from recjax.nn.dropout import dropout
from recjax.nn.layout import Layout
from recjax.nn.linear import linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """`num_layers` GRUs of `hidden` units (None: as many as `width`), then a product back to `width`.

    `width` is that of item vectors. `dropout` acts on what each layer gives.
    """

    num_layers: int = 1
    width: int = 64
    hidden: int | None = None
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    logit_scale: float = 1.0
    tied_head: bool = True

    def __post_init__(self) -> None:
        for name in ("num_layers", "width", "hidden"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ConfigError(f"RecurrentConfig.{name} = {size}", expected="at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"RecurrentConfig.dropout = {self.dropout}", expected="a rate in [0, 1)")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"RecurrentConfig.dtype = {self.dtype!r}", expected="'float32' or 'bfloat16'")

    def make(self, *, rngs: Rngs) -> Module:
        """The stack of layers."""
        return Recurrent(self, rngs=rngs)

    @property
    def units(self) -> int:
        """Width of the state."""
        return self.hidden or self.width

    @property
    def causal(self) -> bool:
        """A state knows nothing of later events."""
        return True

    @property
    def has_positions(self) -> bool:
        """Order is in the recurrence."""
        return False

    @property
    def longest(self) -> int | None:
        """There is no bound on the length."""
        return None

    @property
    def attention_shape(self) -> tuple[int, int]:
        """No layer attends."""
        return 0, self.width


class Gru(Module):
    """One layer (Cho et al. 2014, as PyTorch has it), whose state is zero at the start of every example.

    With a = x W + b and c = h U + d in three parts each: r = sigmoid(a_1 + c_1), z = sigmoid(a_2 + c_2),
    n = tanh(a_3 + r c_3), and the new state is (1 - z) n + z h.
    """

    def __init__(self, width: int, units: int, *, rngs: Rngs) -> None:
        zeros = nnx.initializers.zeros
        self.input = param(rngs, (width, 3, units), ("embed", None, "mlp"), fan_in_normal)
        self.input_bias = param(rngs, (3, units), (None, "mlp"), zeros)
        self.state = param(rngs, (units, 3, units), ("embed", None, "mlp"), fan_in_normal)
        self.state_bias = param(rngs, (3, units), (None, "mlp"), zeros)

    def __call__(self, x: Float[Array, "b l d"], positions: Int[Array, "b l"]) -> Float[Array, "b l u"]:
        """The state after every slot."""
        units = self.state.shape[0]
        inputs = linear(x, self.input[...].reshape(x.shape[-1], -1), self.input_bias[...].reshape(-1))
        weight, bias = (p[...].reshape(*p.shape[:-2], -1).astype(x.dtype) for p in (self.state, self.state_bias))

        def step(state: jax.Array, xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            a, is_first = xs
            state = jnp.where(is_first[:, None], jnp.zeros((), state.dtype), state)
            c = state @ weight + bias[None]
            both = jax.nn.sigmoid(a[:, : 2 * units] + c[:, : 2 * units])
            r, z = both[:, :units], both[:, units:]
            new = jnp.tanh(a[:, 2 * units :] + r * c[:, 2 * units :])
            state = new + z * (state - new)
            return state, state

        zero = jnp.zeros((x.shape[0], units), x.dtype)
        _, states = jax.lax.scan(step, zero, (inputs.swapaxes(0, 1), (positions == 0).swapaxes(0, 1)))
        return states.swapaxes(0, 1)


class Recurrent(Module):
    """Layers of `Gru` and a product back to the width of item vectors."""

    def __init__(self, config: RecurrentConfig, *, rngs: Rngs) -> None:
        c = self.config = config
        for i in range(c.num_layers):  # attributes, as parameter paths are made of names
            setattr(self, f"layer_{i}", Gru(c.units if i else c.width, c.units, rngs=rngs))
        self.out = param(rngs, (c.units, c.width), ("mlp", "embed"), fan_in_normal)
        self.out_bias = param(rngs, (c.width,), (None,), nnx.initializers.zeros)

    def __call__(
        self, x: Float[Array, "b l d"], layout: Layout, *, train: bool, key: Key[Array, ""] | None
    ) -> Float[Array, "b l d"]:
        """Vectors of what came so far; `key` seeds the dropout and may be None when not training."""
        c = self.config
        if layout.prefix is not None or layout.parents is not None:
            raise ConfigError("a recurrent encoder reads from left to right and knows no prefix and no parents")
        x = x.astype(c.dtype)
        keys: Any = jax.random.split(key, c.num_layers) if train and key is not None else [None] * c.num_layers
        for i, layer_key in enumerate(keys):
            x = constrain(getattr(self, f"layer_{i}")(x, layout.positions), "batch", "length", None)
            if layer_key is not None:
                x = dropout(x, c.dropout, layer_key)
        return linear(x, self.out[...], self.out_bias[...])
