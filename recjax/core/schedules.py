"""Learning-rate schedules: a factor of the peak learning rate as a function of the step.

The peak itself belongs to the optimiser (`core.optim`), so that one macro sets it. Steps count from 0, and the
warm-up already moves at step 0.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax

from recjax.core.errors import ConfigError

KINDS = ("constant", "linear", "cosine", "rsqrt", "drops")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up over `warmup_steps`, then `kind` until `total_steps` (those of the run when None).

    "linear" and "cosine" (Loshchilov & Hutter 2017) end at `end_factor` of the peak and stay there; "rsqrt" is
    sqrt(w / max(step + 1, w)) with w = max(warmup_steps, 1) (Vaswani et al. 2017) and knows no end. "drops" multiplies
    by `drop_factor` at each of the `drops`, shares of `total_steps`.
    """

    kind: str = "constant"
    warmup_steps: int = 0
    end_factor: float = 0.0
    total_steps: int | None = None
    drops: tuple[float, ...] = ()
    drop_factor: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"no schedule {self.kind!r}", expected="one of " + ", ".join(KINDS))
        if self.warmup_steps < 0 or (self.total_steps is not None and self.total_steps < 1):
            raise ConfigError("a schedule cannot count these steps", where=repr(self), expected="positive numbers")
        object.__setattr__(self, "drops", tuple(self.drops))
        rising = all(0 < a < b <= 1 for a, b in zip(self.drops, (*self.drops[1:], 1.0), strict=False))
        if not rising or self.drop_factor <= 0 or bool(self.drops) != (self.kind == "drops"):
            raise ConfigError(
                f"Schedule.drops, drop_factor = {self.drops}, {self.drop_factor} of kind {self.kind!r}",
                expected='with the kind "drops" rising shares between 0 and 1, a factor above 0; without it no drops',
            )


def make(schedule: Schedule, peak: float, total_steps: int) -> optax.Schedule:
    """step -> learning rate; `total_steps` is the length of the run."""
    total = schedule.total_steps or total_steps
    warmup = schedule.warmup_steps
    if not total_steps:  # nothing is trained
        return optax.constant_schedule(peak)
    if schedule.kind == "rsqrt":
        return lambda step: peak * _rsqrt(step, max(warmup, 1))
    if schedule.kind in ("linear", "cosine") and warmup >= total:
        raise ConfigError(
            f"the warm-up of {warmup} steps leaves nothing of the {total} steps of the run",
            mend="train longer, or set Schedule.warmup_steps lower",
        )
    after: dict[str, optax.Schedule] = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, peak * schedule.end_factor, max(total - warmup, 1)),
        "drops": optax.piecewise_constant_schedule(
            peak, {max(round(share * total) - warmup, 1): schedule.drop_factor for share in schedule.drops}
        ),
        "cosine": optax.cosine_decay_schedule(peak, max(total - warmup, 1), schedule.end_factor),
    }
    if not warmup:
        return after[schedule.kind]
    rise = optax.linear_schedule(peak / warmup, peak * (warmup + 1) / warmup, warmup)
    return optax.join_schedules([rise, after[schedule.kind]], [warmup])


def _rsqrt(step, warmup: int):
    step = jnp.asarray(step, jnp.float32) + 1
    return jnp.minimum(step / warmup, jnp.sqrt(warmup / jnp.maximum(step, warmup)))
