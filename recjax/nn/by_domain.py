"""What a ranker of several domains does for each of them apart: towers, experts, a gate between adapters.

The domain of a row chooses what of this it is given; where the row is of none that is known, it is given the mean.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs, param
from recjax.nn.dense import Dense, Domain, Pass, shares
from recjax.nn.experts import Mmoe, Ple
from recjax.nn.tower import TowerConfig

_OWN = 4.0  # how far a gate begins on the side of the row's own domain


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByDomain:
    """A `tower` for each of `domains`, over what is shared, or over what `experts` make with the domains as tasks.

    Without experts it is a shared bottom; where nothing before it is shared either, separate models.
    """

    domains: int
    tower: TowerConfig = TowerConfig(widths=(64,))
    experts: Mmoe | Ple | None = None

    def __post_init__(self) -> None:
        if self.domains < 1 or not (self.tower.widths or self.experts):
            raise ConfigError(
                f"ByDomain of {self.domains} domains, towers {self.tower.widths}",
                expected="at least 1, and a tower of at least one layer, or experts",
            )

    def make(self, inputs: int, tasks: int, *, rngs: Rngs) -> ByDomainLayers:
        """The module; all of the heads, `tasks` in number, are given the same."""
        return ByDomainLayers(self, inputs, tasks, rngs=rngs)


class ByDomainLayers(Module):
    """See `ByDomain`."""

    def __init__(self, config: ByDomain, inputs: int, tasks: int, *, rngs: Rngs) -> None:
        self.domains, self.tasks = config.domains, tasks
        self.experts = config.experts.make(inputs, config.domains, rngs=rngs) if config.experts else None
        inputs = self.experts.width if self.experts else inputs
        for d in range(config.domains):
            setattr(self, f"tower{d}", config.tower.make(inputs, rngs=rngs))
        self.width = config.tower.widths[-1] if config.tower.widths else inputs

    def __call__(self, x: Float[Array, "b i"], call: Pass) -> Float[Array, "b m o"]:
        if call.domain is None:
            raise ValueError("what is by domain needs the domain of every row")
        read = self.experts(x, call.part(self.domains)) if self.experts else None
        towers = [getattr(self, f"tower{d}") for d in range(self.domains)]
        made = [t(x if read is None else read[:, d], call.part(d)) for d, t in enumerate(towers)]
        own = shares(call.domain, self.domains)
        own = jnp.where(own.sum(1)[:, None] > 0, own, 1 / self.domains)
        mixed = jnp.einsum("bm,bmo->bo", own, jnp.stack(made, axis=1))
        return jnp.broadcast_to(mixed[:, None], (mixed.shape[0], self.tasks, self.width))


class DomainGate(Module):
    """softmax over domains of `own` (4 at first) for the row's own one and x W (zero at first) for each.

    The gate of MoE-MLoRA (the code of Kenyaggel/MLoRA), which mixes the adapters that domains have been given before.
    """

    def __init__(self, inputs: int, domains: int, *, rngs: Rngs) -> None:
        self.domains = domains
        self.own = param(rngs, (1,), (None,), nnx.initializers.constant(_OWN))
        self.out = Dense(inputs, domains, init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "b i"], call: Pass) -> Domain:
        """[b, m], adding up to 1; to 0 where the row is of no known domain."""
        assert call.domain is not None
        own = shares(call.domain, self.domains)
        mix = jax.nn.softmax(own * self.own[...][None] + self.out(x, call), axis=1)
        return jnp.where(own.sum(1)[:, None] > 0, mix, 0)
