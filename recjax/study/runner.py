"""Runs the cells of a study, each one a resumable training in a folder of its own.

    <workdir>/cells.jsonl        the finished cells
    <workdir>/cells/<key>/       one run: checkpoints, metrics.jsonl, config.gin, ...

The key is a hash of everything that decides the outcome: the recipe as gin text, and what the cell binds on top. Parts
of a study that ask for the same run share it. A study that was killed and started again trains what is missing, and
goes on in the middle of a cell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recjax.core import config, saved
from recjax.core.errors import ConfigError
from recjax.core.flags import Flags
from recjax.core.lock import LOCK, held
from recjax.core.writer import METRICS, read_metrics
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe
from recjax.study import count
from recjax.study.grid import HELD_OUT, METRIC, SET_BY_THE_GRID, Cell, Size, Study, cells
from recjax.study.ledger import Finished, Ledger
from recjax.study.rates import Rates, sweeps_of
from recjax.train import CHECKPOINTS, Outcome, train
from recjax.trained import load

ROOT = "grid.Study"
_CELLS = "cells"
_WARM_UP = 4  # a run is at least so many times as long as its warm-up
_BLOCK = re.compile(r"^# Parameters for ", re.MULTILINE)
_IMPORT = re.compile(r"^((?:from \S+ )?import (?:\S+\.)?(\w+)\n)", re.MULTILINE)


class Interrupted(Exception):
    """The study was told to stop; started again, it goes on."""


class Runner:
    """A study in a folder: its cells, what is finished, and the learning rates that follow from it."""

    def __init__(
        self, flags: Flags, workdir: Path, *, cache: Path | None = None, say: Callable[[str], None] = print
    ) -> None:
        """Raises `ConfigError` for a configuration that is no study or sets what the grid sets."""
        for binding in flags.bindings:
            name = binding.partition("=")[0]
            if name in SET_BY_THE_GRID:
                raise ConfigError(f"{name} is set for every cell by the grid", where=f"--gin.{binding}")
        self.flags, self.workdir, self.cache, self.say = flags, workdir, cache, say
        self.study, text = build(flags)
        self._base = without_study(text)
        self.ledger = Ledger(workdir)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder; raises `ConfigError` when one is at work in it."""
        with held(self.workdir / LOCK) as mine:
            if not mine:
                raise ConfigError("another process works on this study", where=str(self.workdir))
            yield

    def key(self, cell: Cell) -> str:
        """The hash that stands for the cell's run."""
        length = {"passes": cell.passes, "budget": cell.budget, "evaluations": self.study.evaluations}
        content = json.dumps([self._base, cell.bindings(), length], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def folder(self, cell: Cell) -> Path:
        """Where the cell is run."""
        return self.workdir / _CELLS / self.key(cell)

    def rates(self) -> Rates:
        """Learning rates by the sweeps that are finished."""
        swept = cells(self.study, "sweep", lambda size: 0.0)
        return Rates(self.study, sweeps_of([one for _, one in self.finished(swept)]))

    def cells(self, kind: str, rate: Callable[[Size], float] | None = None) -> list[Cell]:
        """The cells of one part, with the learning rates as they are known now."""
        return cells(self.study, kind, rate or self.rates())

    def finished(self, found: Sequence[Cell]) -> list[tuple[Cell, Finished]]:
        """Those of the cells that are finished, under the names that the cells have."""
        known = [(cell, self.ledger.get(self.key(cell))) for cell in found]
        return [
            (cell, dataclasses.replace(one, size=cell.size.name, arm=cell.arm.name, budget=cell.budget))
            for cell, one in known
            if one is not None
        ]

    def run(self, found: Sequence[Cell], *, predicted: bool = False) -> None:
        """Train what is not finished; raises `Interrupted` when told to stop.

        Raises `ConfigError` for a held-out size unless the caller says that its loss is `predicted`.
        """
        held_out = {size.parameters for size in self.study.of("held_out")}
        for number, cell in enumerate(found, start=1):
            if (cell.kind == HELD_OUT or cell.size.parameters in held_out) and not predicted:
                raise ConfigError(
                    f"{cell.size.name} is held out and nothing has been predicted about it",
                    mend="`recjax study predict` first",
                )
            if self.key(cell) in self.ledger:
                continue
            self.say(f"[{cell.kind} {number}/{len(found)}] {cell.label()} -> {self.key(cell)}")
            one = self._train(cell)
            self.ledger.add(one)
            self.say(f"    valid {one.valid[METRIC]:.4f}, test {one.test[METRIC]:.4f} nats, {one.seconds:.0f} s")

    def assemble(self, cell: Cell) -> tuple[Assembly, count.Count]:
        """The cell joined with its examples, before its number of steps is known, and what it will take."""
        recipe, _ = self._recipe(cell, steps=10**9, every=0)
        assembly = Assembly(recipe, ensure_prepared(recipe.mixture, self.cache))
        return assembly, count.count(assembly, cell)

    def _recipe(self, cell: Cell, *, steps: int, every: int) -> tuple[Recipe, config.Snapshot]:
        """The cell's recipe for so many steps, a quarter of which at most are warm-up."""
        bindings = (*self.flags.bindings, *cell.bindings(), f"TRAIN_STEPS={steps}", f"recipe.Recipe.eval_every={every}")
        recipe = build(dataclasses.replace(self.flags, bindings=bindings))[0].recipe
        if _WARM_UP * recipe.optimizer.schedule.warmup_steps > steps:
            bindings = (*bindings, f"schedules.Schedule.warmup_steps={steps // _WARM_UP}")
            recipe = build(dataclasses.replace(self.flags, bindings=bindings))[0].recipe
        return recipe, config.snapshot()

    def _train(self, cell: Cell) -> Finished:
        started, folder = time.perf_counter(), self.folder(cell)
        assembly, counted = self.assemble(cell)
        every = max(1, -(-counted.steps // self.study.evaluations))
        recipe, snapshot = self._recipe(cell, steps=counted.steps, every=every)
        outcome: Outcome = train(recipe, folder, snapshot=snapshot, cache=self.cache, words=[cell.label()])
        if outcome.stopped == "signal":
            raise Interrupted(cell.label())
        best = load(recipe, folder, cache=self.cache)
        records = [r for r in read_metrics(folder / METRICS) if f"valid/{METRIC}" in r]
        [at_best] = [r for r in records if r["step"] == best.step]
        newest = folder / CHECKPOINTS / saved.name_of(saved.steps(folder / CHECKPOINTS)[-1])
        examples = best.assembly.examples
        return Finished(
            key=self.key(cell),
            label=cell.label(),
            size=cell.size.name,
            num_layers=cell.size.num_layers,
            width=cell.size.width,
            num_heads=cell.size.num_heads,
            parameters=counted.parameters,
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            user_fraction=cell.user_fraction,
            arm=cell.arm.name,
            budget=cell.budget,
            unique=counted.unique,
            targets=count.targets_seen(recipe, examples, newest),
            flops={"backbone": counted.backbone, "total": counted.total},
            steps=outcome.step,
            best_step=best.step,
            curve=[[int(r["step"]), r[f"valid/{METRIC}"]] for r in records],
            valid={name.removeprefix("valid/"): v for name, v in at_best.items() if name.startswith("valid/")},
            test=dict(best.assembly.evaluator("test")(best.params).values),
            examples=",".join(str(e.hash) for e in examples),
            seconds=round(time.perf_counter() - started, 1),
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


def build(flags: Flags) -> tuple[Study, str]:
    """The study that gin files and bindings describe, and its text."""
    config.parse(flags)
    study: Any = config.build(ROOT)
    return study, config.snapshot().config


def without_study(text: str) -> str:
    """Gin text without what is bound for the study, and without imports of that alone: what decides what a run does."""
    first, *blocks = _BLOCK.split(text)
    imports = _IMPORT.findall(first)
    bound = _IMPORT.sub("", first)
    bound += "".join(f"# Parameters for {b}" for b in blocks if not b.partition(":")[0].endswith(ROOT))
    return "".join(line for line, name in imports if re.search(rf"\b{re.escape(name)}\.", bound)) + bound
