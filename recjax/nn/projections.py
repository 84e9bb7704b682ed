"""From the stream to heads."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recjax.core.sharding import active
from recjax.nn.config import TransformerConfig
from recjax.nn.linear import linear
from recjax.nn.rotary import rotary


def project(
    x: Float[Array, "b l d"],
    weights: list[jax.Array],
    biases: list[jax.Array],
    act: Callable[[jax.Array], jax.Array] = lambda y: y,
) -> list[jax.Array]:
    """[b, l, heads, k] for each of the weights [d, heads, k]; one product unless the heads lie on several devices."""
    mesh = active()
    if mesh is not None and mesh.size_of("heads") > 1:
        return [act(_heads(x, w, b)) for w, b in zip(weights, biases or [None] * len(weights), strict=True)]
    ends = [sum(w.shape[1] for w in weights[: i + 1]) for i in range(len(weights) - 1)]
    y = act(_heads(x, jnp.concatenate(weights, axis=1), jnp.concatenate(biases) if biases else None))
    return jnp.split(y, ends, axis=2)


def turn(
    config: TransformerConfig, x: Float[Array, "b l h k"], positions: Int[Array, "b l"]
) -> Float[Array, "b l h k"]:
    """Heads turned by their positions, where the config says so."""
    if "rotary" not in config.position:
        return x
    return rotary(x, positions, theta=config.rope_theta, scaling=config.rope_scaling)


def take_slots(x: Float[Array, "b l d"], slots: Int[Array, "b q"]) -> Float[Array, "b q d"]:
    """The vectors at some slots of each row."""
    return jnp.take_along_axis(x, slots[..., None], axis=1)


def _heads(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """[b, l, h, k] from weights [d, h, k]."""
    flat = linear(x, weight.reshape(x.shape[-1], -1), None if bias is None else bias.reshape(-1))
    return flat.reshape(*x.shape[:2], *weight.shape[1:])
