"""Several tasks on one trunk: what each of them reads is a mixture of experts of its own making.

MMoE (Ma et al. 2018, KDD) shares all experts and gives every task a gate; PLE (Tang et al. 2020, RecSys) gives every
task experts that no other reads, layer upon layer. Both are called with what the interaction made, [b, i], and give
[b, m, o], a vector for each of m tasks.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs
from recjax.nn.dense import Dense, Pass
from recjax.nn.tower import TowerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mmoe:
    """`experts` towers; task k reads sum_e softmax(gate_k(x))_e expert_e(x). `gate` are hidden layers of the gates."""

    experts: int = 8
    expert: TowerConfig = TowerConfig(widths=(256, 128))
    gate: TowerConfig = TowerConfig(widths=())

    def __post_init__(self) -> None:
        _check(self.expert, experts=self.experts)

    def make(self, inputs: int, tasks: int, *, rngs: Rngs) -> MmoeLayers:
        """The module."""
        return MmoeLayers(self, inputs, tasks, rngs=rngs)


class MmoeLayers(Module):
    """See `Mmoe`."""

    def __init__(self, config: Mmoe, inputs: int, tasks: int, *, rngs: Rngs) -> None:
        self.experts, self.tasks, self.width = config.experts, tasks, config.expert.widths[-1]
        for e in range(config.experts):
            setattr(self, f"expert{e}", config.expert.make(inputs, rngs=rngs))
        for k in range(tasks):
            setattr(self, f"gate{k}", Gate(config.gate, inputs, config.experts, rngs=rngs))

    def __call__(self, x: Float[Array, "b i"], call: Pass) -> Float[Array, "b m o"]:
        made = [getattr(self, f"expert{e}")(x, call.part(e)) for e in range(self.experts)]
        known = jnp.stack(made, axis=1)
        gates = [getattr(self, f"gate{k}")(x, call.part(self.experts + k)) for k in range(self.tasks)]
        return jnp.einsum("bme,beo->bmo", jnp.stack(gates, axis=1), known)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ple:
    """`layers` of customised gate control, each with `shared` experts and `own` experts for every task.

    Task k mixes its own experts and the shared ones, in this order; between layers the shared input is a mixture of
    the shared experts alone, as in the code of FuxiCTR. (The paper mixes all experts there.)
    """

    layers: int = 1
    shared: int = 1
    own: int = 1
    expert: TowerConfig = TowerConfig(widths=(256, 128))
    gate: TowerConfig = TowerConfig(widths=())

    def __post_init__(self) -> None:
        _check(self.expert, layers=self.layers, shared=self.shared, own=self.own)

    def make(self, inputs: int, tasks: int, *, rngs: Rngs) -> PleLayers:
        """The module."""
        return PleLayers(self, inputs, tasks, rngs=rngs)


class PleLayers(Module):
    """See `Ple`."""

    def __init__(self, config: Ple, inputs: int, tasks: int, *, rngs: Rngs) -> None:
        self.layers, self.width = config.layers, config.expert.widths[-1]
        for i in range(config.layers):
            width, is_last = self.width if i else inputs, i == config.layers - 1
            setattr(self, f"layer{i}", GateControl(config, width, tasks, is_last=is_last, rngs=rngs))

    def __call__(self, x: Float[Array, "b i"], call: Pass) -> Float[Array, "b m o"]:
        tasks: list[jax.Array] = []
        for i in range(self.layers):
            tasks, x = getattr(self, f"layer{i}")(tasks, x, call.part(i))
        return jnp.stack(tasks, axis=1)


class GateControl(Module):
    """One layer of `Ple`; the last has no use for a shared output and has none."""

    def __init__(self, config: Ple, inputs: int, tasks: int, *, is_last: bool, rngs: Rngs) -> None:
        self.shared, self.own, self.tasks = config.shared, config.own, tasks
        for e in range(config.shared):
            setattr(self, f"shared{e}", config.expert.make(inputs, rngs=rngs))
        for k in range(tasks):
            for e in range(config.own):
                setattr(self, f"task{k}_expert{e}", config.expert.make(inputs, rngs=rngs))
            setattr(self, f"gate{k}", Gate(config.gate, inputs, config.own + config.shared, rngs=rngs))
        self.gate_shared = None if is_last else Gate(config.gate, inputs, config.shared, rngs=rngs)

    def __call__(self, tasks: list[jax.Array], x: Float[Array, "b i"], call: Pass) -> tuple[list[jax.Array], jax.Array]:
        """What every task reads next and what is shared; in the first layer, no `tasks`, all read `x`."""
        calls = iter(call.part(n) for n in range((self.tasks + 1) * (self.own + self.shared + 1)))
        shared = [getattr(self, f"shared{e}")(x, next(calls)) for e in range(self.shared)]
        out = []
        for k in range(self.tasks):
            mine = tasks[k] if tasks else x
            own = [getattr(self, f"task{k}_expert{e}")(mine, next(calls)) for e in range(self.own)]
            out.append(_mix(getattr(self, f"gate{k}")(mine, next(calls)), own + shared))
        return out, x if self.gate_shared is None else _mix(self.gate_shared(x, next(calls)), shared)


class Gate(Module):
    """softmax over experts, behind hidden layers where there are any."""

    def __init__(self, config: TowerConfig, inputs: int, experts: int, *, rngs: Rngs) -> None:
        self.tower = config.make(inputs, rngs=rngs)
        self.out = Dense(self.tower.width, experts, rngs=rngs)

    def __call__(self, x: Float[Array, "b i"], call: Pass) -> Float[Array, "b e"]:
        return jax.nn.softmax(self.out(self.tower(x, call), call), axis=-1)


def _mix(weights: jax.Array, made: list[jax.Array]) -> jax.Array:
    return jnp.einsum("be,beo->bo", weights, jnp.stack(made, axis=1))


def _check(expert: TowerConfig, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} = {value} of a mixture of experts", expected="at least 1")
    if not expert.widths:
        raise ConfigError("an expert without layers", expected="TowerConfig.widths with at least one width")
