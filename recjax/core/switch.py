"""One optimiser until a step, another from then on, in a state that a checkpoint can carry.

Adam until it converges, then SGD (Zhang et al. 2024, section on the switching optimiser). The step of the switch is
part of the optimiser's state: fixed from the start, or written there when evaluation stops getting better, so that
a run restored on either side of it goes on exactly as if it had never stopped.

Both optimisers hold state all the time, three slots a parameter, so that one compiled step serves the whole run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recjax.core import optim
from recjax.core.errors import ConfigError
from recjax.core.module import Params
from recjax.core.schedules import Schedule

NEVER = np.iinfo(np.int32).max
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamThenSGD(optim.Optimizer):
    """`kind` (Adam or AdamW) for the updates 0 .. s-1 and SGD with momentum from update s on.

    s is `switch_step`, or, when that is None, the update after an evaluation that was the `patience`-th in a row
    without a lower loss (`observe`). SGD starts with no momentum, at `sgd_learning_rate` and `sgd_schedule`, whose
    steps count from the switch. Groups, decay, clipping and average are the same on both sides.
    """

    switch_step: int | None = None
    patience: int | None = None
    sgd_learning_rate: float = 0.1
    sgd_schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.switch_step is None) == (self.patience is None):
            raise ConfigError(
                "AdamThenSGD has to know when to switch",
                where=f"switch_step = {self.switch_step}, patience = {self.patience}",
                expected="one of the two",
            )
        if self.kind not in ("adam", "adamw") or any(g.kind for _, g in self.groups):
            raise ConfigError("AdamThenSGD starts with 'adam' or 'adamw' in every group", where=f"kind = {self.kind!r}")

    def transform(self, params: Params, total_steps: int) -> optax.GradientTransformation:
        """Both optimisers in one, whose state is a `SwitchState`."""
        # As plain optimisers: the fields added above are not theirs.
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(optim.Optimizer)}
        after = common | {"kind": "sgd", "learning_rate": self.sgd_learning_rate, "schedule": self.sgd_schedule}
        adam = optim.Optimizer(**common).transform(params, total_steps)
        sgd = optim.Optimizer(**after).transform(params, total_steps)
        return _switched(adam, sgd, NEVER if self.switch_step is None else self.switch_step)


class SwitchState(NamedTuple):
    """`count` updates done; SGD from update `switch_step` on; `best` loss and the evaluations since (`stale`)."""

    count: jax.Array
    switch_step: jax.Array
    best: jax.Array
    stale: jax.Array
    adam: Any
    sgd: Any


def _switched(
    adam: optax.GradientTransformation, sgd: optax.GradientTransformation, switch_step: int
) -> optax.GradientTransformation:
    def init(params: Any) -> SwitchState:
        return SwitchState(
            count=jnp.zeros((), jnp.int32),
            switch_step=jnp.asarray(switch_step, jnp.int32),
            best=jnp.asarray(jnp.inf, jnp.float32),
            stale=jnp.zeros((), jnp.int32),
            adam=adam.init(params),
            sgd=sgd.init(params),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, SwitchState]:
        def before(_: None) -> tuple[Any, Any, Any]:
            new, adam_state = adam.update(updates, state.adam, params)
            return new, adam_state, state.sgd

        def after(_: None) -> tuple[Any, Any, Any]:
            new, sgd_state = sgd.update(updates, state.sgd, params)
            return new, jax.tree.map(jnp.zeros_like, state.adam), sgd_state

        is_adam = state.count < state.switch_step
        new, adam_state, sgd_state = jax.lax.cond(is_adam, before, after, None)
        return new, state._replace(count=state.count + 1, adam=adam_state, sgd=sgd_state)

    return optax.GradientTransformation(init, update)


def observe(config: optim.Optimizer, opt_state: T, loss: float) -> T:
    """Tell the optimiser a validation loss; with `patience` it may switch from the next update on.

    For every other optimiser, or once switched, the state comes back as it is. Runs on the host, between steps.
    """
    if not isinstance(config, AdamThenSGD) or config.patience is None:
        return opt_state
    patience = config.patience

    def note(state: SwitchState) -> SwitchState:
        if is_switched(state):
            return state
        count, best, stale = jax.device_get((state.count, state.best, state.stale))
        is_better = loss < best
        stale = 0 if is_better else int(stale) + 1
        state = _write(state, stale=stale, **({"best": loss} if is_better else {}))
        return _write(state, switch_step=int(count)) if stale >= patience else state

    return _in_switch(opt_state, note)


def request_switch(opt_state: T, step: int) -> T:
    """Have SGD take over from update `step` on (now, when that has passed), unless it already has."""

    def ask(state: SwitchState) -> SwitchState:
        return state if is_switched(state) else _write(state, switch_step=max(step, int(jax.device_get(state.count))))

    return _in_switch(opt_state, ask)


def is_switched(opt_state: Any) -> bool:
    """Whether the next update is SGD's; False for an optimiser that never switches."""
    states = [s for s in _leaves(opt_state) if isinstance(s, SwitchState)]
    return any(count >= step for count, step in jax.device_get([(s.count, s.switch_step) for s in states]))


def _leaves(opt_state: Any) -> list[Any]:
    return jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SwitchState))


def _in_switch(opt_state: T, change: Callable[[SwitchState], SwitchState]) -> T:
    """`opt_state` with `change` applied to the switch in it, wherever the average has put it."""
    return jax.tree.map(
        lambda x: change(x) if isinstance(x, SwitchState) else x,
        opt_state,
        is_leaf=lambda x: isinstance(x, SwitchState),
    )


def _write(state: SwitchState, **scalars: int | float) -> SwitchState:
    """New scalars that lie on the devices as the old ones did, so that the compiled step still fits them."""
    old = state._asdict()
    return state._replace(
        **{k: jax.device_put(np.asarray(v, old[k].dtype), old[k].sharding) for k, v in scalars.items()}
    )
