"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), and how to slow it down for longer texts.

The pairs of a head lie as Llama and Hugging Face lay them out, x_i beside x_{i + k/2} ("rotate half"); a checkpoint
that interleaves its pairs, as Mistral's own files do, has to be permuted first. A scaling does not depend on the length
of what is read, so that kept keys stay valid while a text grows; it has no parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from recjax.core.errors import ConfigError

THETA = 10000.0
_KINDS = ("linear", "ntk", "yarn", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Positions up to `factor` times the `trained_length` in the place of those trained on.

    "linear": all pairs turn `factor` times slower (Chen et al. 2023, arXiv 2306.15595). "ntk": theta grows by
    factor^(k / (k - 2)), so that the slowest pair turns `factor` times slower and the fastest as before. "yarn": pairs
    of less than `slow` turns over the trained length are slowed down, those of more than `fast` are not, with a ramp
    between them, and cosines and sines grow by 0.1 ln(factor) + 1 (Peng et al. 2023, arXiv 2309.00071, with the ramp
    over the pair's number as in their code). "llama3": the same ramp in turns, from 1 to 4 unless `slow` and `fast` are
    given, without the growth (Llama 3.1). `fast` and `slow` are those of yarn, 32 and 1, unless given.
    """

    kind: Literal["linear", "ntk", "yarn", "llama3"] = "yarn"
    factor: float = 1.0
    trained_length: int = 4096
    fast: float | None = None
    slow: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError(f"RopeScaling.kind = {self.kind!r}", expected=f"one of {_KINDS}")
        if self.factor < 1 or self.trained_length < 1 or not 0 < self.turns[0] < self.turns[1]:
            raise ConfigError(
                f"RopeScaling: factor = {self.factor}, trained_length = {self.trained_length}, "
                f"slow, fast = {self.turns}",
                expected="a factor and a length of at least 1, and 0 < slow < fast",
            )

    @property
    def turns(self) -> tuple[float, float]:
        """Turns over the trained length below which a pair is slowed down whole, and above which not at all."""
        return self.slow or 1.0, self.fast or (4.0 if self.kind == "llama3" else 32.0)

    def slower(self, theta: float, width: int) -> float:
        """The theta of "ntk" for heads of `width`."""
        return theta * self.factor ** (width / (width - 2))

    @property
    def growth(self) -> float:
        """What cosines and sines are multiplied by."""
        return 0.1 * math.log(self.factor) + 1 if self.kind == "yarn" else 1.0


@functools.lru_cache(maxsize=64)
def rates(width: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """float32 [width / 2]: by how much each pair of a head of `width` turns from one position to the next."""
    number = np.arange(width // 2, dtype=np.float64)
    plain = theta ** (-2 * number / width)
    if scaling is None:
        return plain.astype(np.float32)
    if scaling.kind == "ntk":
        return rates(width, scaling.slower(theta, width), None)
    return (plain * (1 - _slowed(scaling, width, theta, plain) * (1 - 1 / scaling.factor))).astype(np.float32)


def _slowed(scaling: RopeScaling, width: int, theta: float, plain: np.ndarray) -> np.ndarray:
    """How much of the slowing down each pair gets, between 0 and 1."""
    slow, fast = scaling.turns
    turns = scaling.trained_length * plain / (2 * math.pi)
    if scaling.kind == "linear":
        return np.ones_like(plain)
    if scaling.kind == "llama3":
        return np.clip((fast - turns) / (fast - slow), 0, 1)

    def pair(turns: float) -> float:  # the number, not whole, of the pair that makes so many turns
        return width * math.log(scaling.trained_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), width - 1)
    return np.clip((np.arange(width // 2) - first) / (last - first or 0.001), 0, 1)


def rotary(
    x: Float[Array, "b l h k"],
    positions: Int[Array, "b l"],
    *,
    theta: float = THETA,
    scaling: RopeScaling | None = None,
) -> Float[Array, "b l h k"]:
    """Turn each pair (x_i, x_{i + k/2}) by the angle `position * theta^(-2i/k)`, or less of it as `scaling` says."""
    half = x.shape[-1] // 2
    angle = positions.astype(jnp.float32)[..., None, None] * rates(2 * half, theta, scaling)[None, None, None]
    growth = 1.0 if scaling is None else scaling.growth
    cos, sin = jnp.cos(angle) * growth, jnp.sin(angle) * growth
    low, high = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
