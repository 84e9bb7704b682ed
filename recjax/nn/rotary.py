"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary(
    x: Float[Array, "b l h k"], positions: Int[Array, "b l"], *, base: float = 10000.0
) -> Float[Array, "b l h k"]:
    """Turn each pair (x_i, x_{i + k/2}) by the angle `position * base^(-2i/k)`, as Llama lays the pairs out."""
    half = x.shape[-1] // 2
    rates = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None, None] * rates[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    low, high = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
