"""What a scaling study is: its config, and the cells (runs) that its parts ask for.

A cell is a recipe with a few bindings on top; nothing is trained here, and no result is read. The learning rate of a
cell comes from `rates.py`, once the sweep is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from recjax.core.errors import ConfigError
from recjax.core.flags import did_you_mean
from recjax.recipe import Recipe

SET_BY_THE_GRID = ("TRAIN_STEPS", "LEARNING_RATE", "SEED")
METRIC = "nll"
KINDS = ("sweep", "scale", "twice", "data", "repeat", "shape", "isoflop", "ablation")
HELD_OUT = "held_out"
_LAWS = ("power", "pure")


class Size(NamedTuple):
    """A transformer by layers n, width d and heads; N = 12 n d^2 without tables, positions, norms and biases."""

    name: str
    num_layers: int
    width: int
    num_heads: int

    @property
    def parameters(self) -> int:
        """N by the formula."""
        return 12 * self.num_layers * self.width**2

    @property
    def aspect(self) -> float:
        """Width over layers."""
        return self.width / self.num_layers


class Arm(NamedTuple):
    """One side of an ablation: a name and the bindings that make it."""

    name: str
    bindings: tuple[str, ...]


Sizes = Sequence[tuple[str, int, int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A scaling study over one recipe. Sizes are (name, layers, width, heads); a part without sizes is left out.

    `sizes` are fitted, `held_out` are predicted from them and trained afterwards, each `passes` times over the data
    and for every one of `seeds`, with `evaluations` evaluations on the way. Before, each size tries every one of
    `learning_rates` for `sweep_passes`. The sizes named in `twice` are trained twice as long as well; a size whose
    loss then falls by more than `tolerance` (relative), or is still falling by that much at its last evaluation, has
    not converged, and is left out of the fit with `only_converged`. `split` is where losses are taken.

    Further parts: `data_sizes` on every one of `user_fractions` (L(D), L(N, D)); `repeat_sizes` for every number of
    passes in `repeats`, on the users of `repeat_fraction`; `shapes` of about equal N; `iso_sizes` under every one of
    `budgets` (training FLOPs in all); `ablation_sizes` for `ablation_passes` under each of `arms`, which are
    (name, bindings). `law` is fitted in N; "" takes the one that predicts the largest fitted size better from the
    others.
    """

    recipe: Recipe
    sizes: Sizes
    held_out: Sizes = ()
    learning_rates: Sequence[float]
    sweep_passes: float
    passes: float
    seeds: Sequence[int] = (0,)
    evaluations: int = 6
    twice: Sequence[str] = ()
    tolerance: float = 0.005
    only_converged: bool = True
    split: str = "test"
    law: str = ""
    bootstrap_samples: int = 1000
    data_sizes: Sequence[str] = ()
    user_fractions: Sequence[float] = ()
    repeat_sizes: Sequence[str] = ()
    repeats: Sequence[float] = ()
    repeat_fraction: float = 1.0
    shapes: Sizes = ()
    iso_sizes: Sequence[str] = ()
    budgets: Sequence[float] = ()
    ablation_sizes: Sizes = ()
    ablation_passes: float = 0.0
    arms: Sequence[tuple[str, Sequence[str]]] = ()

    def __post_init__(self) -> None:
        self._check_sizes()
        for name in ("passes", "sweep_passes", "evaluations", "tolerance", "bootstrap_samples"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"Study.{name} = {getattr(self, name)}", expected="more than 0")
        if not self.learning_rates or not self.seeds or min(self.learning_rates) <= 0:
            raise ConfigError("Study needs a learning rate above 0 and a seed", where=repr(self.learning_rates))
        if not all(0 < f <= 1 for f in (*self.user_fractions, self.repeat_fraction)):
            raise ConfigError(f"Study.user_fractions = {self.user_fractions}", expected="above 0, at most 1")
        if self.split not in ("valid", "test"):
            raise ConfigError(f"Study.split = {self.split!r}", expected="'valid' or 'test'")
        if self.law not in ("", *_LAWS):
            raise ConfigError(f"Study.law = {self.law!r}", expected=f"one of {_LAWS}, or '' to choose")
        if self.ablation_sizes and not (self.arms and self.ablation_passes > 0):
            raise ConfigError("an ablation needs arms and a number of passes", where="Study.arms, ablation_passes")
        kept = self.recipe.checkpoints
        if (kept.metric, kept.mode) != (METRIC, "min"):
            raise ConfigError(
                f"the recipe of a study keeps the checkpoint that is best by {METRIC!r}",
                where=f"checkpoint.Checkpoints.metric = {kept.metric!r}, mode = {kept.mode!r}",
                mend=f"set metric = {METRIC!r}, mode = 'min'",
            )

    def _check_sizes(self) -> None:
        if not self.sizes:
            raise ConfigError("a study needs sizes", where="Study.sizes", expected="(name, layers, width, heads), ...")
        by_name: dict[str, Size] = {}
        for size in (size for part in ("sizes", "held_out", "shapes", "ablation_sizes") for size in self.of(part)):
            if by_name.setdefault(size.name, size) != size:
                raise ConfigError(f"two sizes are called {size.name}", where="Study.sizes, held_out, shapes")
        largest = max(size.parameters for size in self.of("sizes"))
        for size in self.of("held_out"):
            if size.parameters <= largest:
                raise ConfigError(
                    f"{size.name} has N = {size.parameters:,}, and {largest:,} is fitted",
                    where="Study.held_out",
                    expected="a size larger than those that are fitted",
                )
        known = [size.name for size in self.of("sizes")]
        for part in ("twice", "data_sizes", "repeat_sizes", "iso_sizes"):
            for name in getattr(self, part):
                if name not in known:
                    raise ConfigError(f"Study.{part}: no size {name!r}", mend=did_you_mean(name, known))

    def of(self, part: str) -> tuple[Size, ...]:
        """The sizes of a part: of a field with whole sizes, or one with names of `sizes`."""
        found = getattr(self, part)
        if found and isinstance(found[0], str):
            by_name = {size.name: size for size in self.of("sizes")}
            return tuple(by_name[name] for name in found)
        return tuple(map(Size._make, found))

    def swept(self) -> tuple[Size, ...]:
        """Sizes that choose their learning rate by a sweep of their own; there is none with a single rate."""
        return tuple(dict.fromkeys(self.of("sizes") + self.of("shapes"))) if len(self.learning_rates) > 1 else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. `passes` is its length; with a `budget` (FLOPs in all) that says it instead."""

    kind: str
    size: Size
    learning_rate: float
    seed: int
    passes: float = 0.0
    budget: float = 0.0
    user_fraction: float = 1.0
    arm: Arm = Arm("", ())

    def bindings(self) -> tuple[str, ...]:
        """What makes a recipe this cell, apart from the number of steps."""
        return (
            f"transformer.TransformerConfig.num_layers={self.size.num_layers}",
            f"transformer.TransformerConfig.width={self.size.width}",
            f"transformer.TransformerConfig.num_heads={self.size.num_heads}",
            f"pipeline.Feed.user_fraction={self.user_fraction!r}",
            f"LEARNING_RATE={self.learning_rate!r}",
            f"SEED={self.seed}",
            *self.arm.bindings,
        )

    def label(self) -> str:
        """For people."""
        length = f"{self.budget:.2g} FLOPs" if self.budget else f"{self.passes:g} passes"
        more = [f"{self.user_fraction:g} of users"] if self.user_fraction < 1 else []
        more += [self.arm.name] if self.arm.name else []
        return ", ".join(
            [self.kind, self.size.name, f"rate {self.learning_rate:g}", length, *more, f"seed {self.seed}"]
        )


def cells(study: Study, kind: str, rate: Callable[[Size], float]) -> list[Cell]:
    """The cells of one part of the study; `rate` says the learning rate of a size."""
    first, seeds = study.seeds[:1], study.seeds

    def runs(part: str, seeds: Sequence[int], **length: Any) -> list[Cell]:
        sizes = study.of(part)
        return [Cell(kind=kind, size=s, learning_rate=rate(s), seed=seed, **length) for s in sizes for seed in seeds]

    if kind == "sweep":
        rates = [(size, float(lr)) for size in study.swept() for lr in study.learning_rates]
        return [Cell(kind=kind, size=s, learning_rate=r, seed=first[0], passes=study.sweep_passes) for s, r in rates]
    if kind == "scale":
        return runs("sizes", seeds, passes=study.passes)
    if kind == HELD_OUT:
        return runs("held_out", seeds, passes=study.passes)
    if kind == "twice":
        return runs("twice", first, passes=2 * study.passes)
    if kind == "data":
        fractions = [{"passes": study.passes, "user_fraction": f} for f in study.user_fractions]
        return [cell for length in fractions for cell in runs("data_sizes", seeds, **length)]
    if kind == "repeat":
        lengths = [{"passes": p, "user_fraction": study.repeat_fraction} for p in study.repeats]
        return [cell for length in lengths for cell in runs("repeat_sizes", seeds, **length)]
    if kind == "shape":
        return runs("shapes", seeds, passes=study.passes)
    if kind == "isoflop":
        return [cell for budget in study.budgets for cell in runs("iso_sizes", first, budget=budget)]
    if kind == "ablation":
        found = runs("ablation_sizes", seeds, passes=study.ablation_passes)
        arms = [Arm(name, tuple(bindings)) for name, bindings in study.arms]
        return [dataclasses.replace(cell, arm=arm) for cell in found for arm in arms]
    raise ValueError(kind)
