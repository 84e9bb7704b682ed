"""A union of tasks with rates: what a recipe trains on.

What an example is depends on the kind of task: a user, a pair of query and item. When feeding, rates are those of the
windows that are trained on, of which a user may have several; a seqio mixture knows examples alone.
"""

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

    No rates mean equal rates. With a `temperature` T the rate of a task is also proportional to n ** (1 / T) for the n
    windows that an epoch of it has: T = 1 draws the windows of all tasks equally often, a high T comes near to equal
    rates (Raffel et al. 2020, section 3.5.2). All tasks of a mixture share one item vocabulary, which is checked when
    they are read.

    `unseen` are tasks that nothing is trained on and no choice is made by: a trained model is evaluated on them, too,
    to know what it can do that it was not taught.
    """

    tasks: Sequence[Task] = (NextItem(),)
    rates: Sequence[float] = ()
    temperature: float | None = None
    unseen: Sequence[Task] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "unseen", tuple(self.unseen))
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
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"Mixture.temperature = {self.temperature}", expected="a number above 0")
        names = [task.name for task in self.evaluated]
        if len(set(names)) != len(names):
            raise ConfigError(
                f"tasks named {', '.join(names)}", where="Mixture.tasks", expected="a different `name` for each"
            )

    @property
    def evaluated(self) -> tuple[Task, ...]:
        """All tasks, those that are trained on first."""
        return (*self.tasks, *self.unseen)

    def resolved(self, examples: Sequence[int]) -> tuple[float, ...]:
        """The rates when the tasks have so many windows or examples; as they are when there is no temperature.

        With one, they sum to one. Raises `ConfigError` when a task is without examples.
        """
        if self.temperature is None:
            return tuple(self.rates)
        if len(examples) != len(self.tasks) or min(examples) < 1:
            raise ConfigError(
                f"training examples of the tasks: {', '.join(map(str, examples))}",
                where="Mixture.temperature",
                expected="at least one of each task",
            )
        # By the logarithm, because n ** (1 / T) overflows where T is small.
        weights = [math.log(r) + math.log(n) / self.temperature for r, n in zip(self.rates, examples, strict=True)]
        shares = [math.exp(w - max(weights)) for w in weights]
        return tuple(share / sum(shares) for share in shares)
