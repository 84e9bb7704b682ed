"""A union of tasks with rates: what a recipe trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from recjax.core.errors import ConfigError
from recjax.tasks.next_item import NextItem
from recjax.tasks.work import Task


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Tasks, and in what proportion their examples are drawn; rates need not sum to one.

    No rates mean equal rates. All tasks of a mixture share one item vocabulary, which is checked when they are read.
    """

    tasks: Sequence[Task] = (NextItem(),)
    rates: Sequence[float] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "rates", tuple(map(float, self.rates)) or (1.0,) * len(self.tasks))
        if not self.tasks:
            raise ConfigError("a mixture without tasks", where="Mixture.tasks", expected="at least one task")
        if len(self.tasks) != len(self.rates):
            raise ConfigError(
                f"{len(self.tasks)} tasks and {len(self.rates)} rates",
                where="Mixture.rates",
                expected="one rate per task",
            )
        if not all(math.isfinite(r) and r > 0 for r in self.rates):
            raise ConfigError(f"rates {self.rates}", where="Mixture.rates", expected="numbers above 0")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ConfigError(
                f"tasks named {', '.join(names)}", where="Mixture.tasks", expected="a different `name` for each"
            )
