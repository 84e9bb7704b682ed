"""Normalisation by the domain of a row: STAR's partitioned normalisation, for batches that mix domains.

(Sheng et al. 2021, One model to serve all, arXiv 2101.11427, section 3.3.) There a batch is of one domain and is
normalised by its own moments; here every row is normalised by the rows of its domain in the batch, which is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recjax.core.module import Rngs, param
from recjax.nn.dense import Pass, shares
from recjax.nn.interaction import Inputs
from recjax.nn.tower import Running


class DomainNorm(Running):
    """(x - mean_d) / sd_d times `scale` s_d plus `bias` + b_d, d being the domain of a row; s_d is 1 at first, b_d 0.

    In training mean and sd are those of the domain's rows in the batch, otherwise running moments of the domain, which
    move when it has rows in a batch (see `tower.BatchNorm`). A row of no known domain is given the mean of all.
    """

    def __init__(self, width: int, domains: int, *, epsilon: float = 1e-5, momentum: float = 0.1, rngs: Rngs) -> None:
        zeros, ones = nnx.initializers.zeros, nnx.initializers.ones
        self.epsilon, self.momentum, self.domains = epsilon, momentum, domains
        every, axes = (domains, width), (None, None)
        self.adapter_mean = param(rngs, every, axes, zeros, trained=False)
        self.adapter_variance = param(rngs, every, axes, ones, trained=False)
        self.adapter_batches = param(rngs, (domains,), (None,), zeros, trained=False)
        self.adapter_scale = param(rngs, every, axes, ones)
        self.adapter_shift = param(rngs, every, axes, zeros)
        self.scale = param(rngs, (width,), (None,), ones)
        self.bias = param(rngs, (width,), (None,), zeros)

    def __call__(self, x: Float[Array, "b i"], call: Pass) -> Float[Array, "b i"]:
        if call.domain is None:
            raise ValueError("a norm by domain needs the domain of every row")
        own = shares(call.domain, self.domains)
        mean, variance = self.adapter_mean[...], self.adapter_variance[...]
        if call.train:
            count = own.sum(0)
            among = own.T / jnp.maximum(count, 1)[:, None]
            mean = _product(among, x)
            variance = _product(among, jnp.square(x - _product(own, mean)))
            unbiased = variance * (count / jnp.maximum(count - 1, 1))[:, None]
            for name, value in (("mean", mean), ("variance", unbiased), ("count", count)):
                call.seen[f"{self.path}/{name}"] = value
        own = jnp.where(own.sum(1)[:, None] > 0, own, 1 / self.domains)
        y = (x - _product(own, mean)) * jax.lax.rsqrt(_product(own, variance) + self.epsilon)
        scale, bias = self.scale[...][None], self.bias[...][None]
        return y * _product(own, scale * self.adapter_scale[...]) + _product(own, bias + self.adapter_shift[...])

    def of_inputs(self, inputs: Inputs, call: Pass) -> Inputs:
        """What an interaction reads, normalised; rows no longer share anything."""
        _, fields, width = inputs.vectors.shape
        y = self(inputs.flat(), call)
        vectors, numbers = y[:, : fields * width], y[:, fields * width :]
        return inputs._replace(vectors=vectors.reshape(inputs.vectors.shape), numbers=numbers, alike=None)

    def moved(self, seen: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The running moments, by path, after micro-batches that have `seen` [n, m, ...] these."""
        if f"{self.path}/count" not in seen:
            return {}
        there = (seen[f"{self.path}/count"] > 0).astype(jnp.float32)
        times = there.sum(0)
        batches = self.adapter_batches[...] + (times > 0)
        share = jnp.where(times > 0, jnp.maximum(self.momentum, 1 / jnp.maximum(batches, 1)), 0)[:, None]
        values = {f"{self.path}/adapter_batches": batches}
        for name in ("mean", "variance"):
            of_now = (seen[f"{self.path}/{name}"] * there[..., None]).sum(0) / jnp.maximum(times, 1)[:, None]
            before = getattr(self, f"adapter_{name}")[...]
            values[f"{self.path}/adapter_{name}"] = (1 - share) * before + share * of_now
        return values


def _product(shares: Float[Array, "b m"], values: Float[Array, "m i"]) -> Float[Array, "b i"]:
    """Exact: a share of 1 takes the value as it is."""
    return jnp.matmul(shares, values, precision=jax.lax.Precision.HIGHEST)
