"""`recjax train`: take a recipe from its last checkpoint, or from nothing, to its last step.

The loop knows neither models nor losses: it fetches a batch, dispatches the step, and reads the metrics of the step
before, so that the device never waits for the host. Whatever is needed to go on is in the checkpoint (state, data
position, progress); a run that was killed and started again is the run that was not.

Told to stop (SIGTERM) it saves and exits with `errors.INTERRUPTED`. An error from anywhere but the training itself
saves what is sound before it goes on its way: nothing but the step under way is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recjax import cli, command
from recjax.core import flops, mirror, switch
from recjax.core.checkpoint import Checkpointer
from recjax.core.config import Snapshot
from recjax.core.errors import INTERRUPTED, CheckpointError, ConfigError, TrainingError
from recjax.core.interruption import Stop, is_sound
from recjax.core.lock import LOCK, held
from recjax.core.optim import eval_params, learning_rate
from recjax.core.remote import is_url
from recjax.core.state import TrainState
from recjax.core.warm_start import WarmStart
from recjax.core.writer import LateMetrics, RunWriter, StepMetrics
from recjax.data.field_tables import FieldTables, coverage
from recjax.models.sequence import count_parameters
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe
from recjax.results import System

CHECKPOINTS = "checkpoints"


@dataclasses.dataclass
class Progress:
    """What the loop remembers besides the state; kept in every checkpoint."""

    best: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best one

    def note(self, step: int, value: float, mode: str) -> None:
        """Take in the metric of an evaluation."""
        if self.best is None or (value > self.best if mode == "max" else value < self.best):
            self.best, self.best_step, self.stale = value, step, 0
        else:
            self.stale += 1


class Pace:
    """Tokens per second over the steps since it was last asked; the first step, which compiles, does not count."""

    def __init__(self) -> None:
        self._tokens = self._seconds = self._waited = 0.0
        self._is_warm = False

    def add(self, found: StepMetrics) -> None:
        """Count a step."""
        if self._is_warm:
            self._tokens += found.values["tokens"]
            self._seconds += found.seconds
            self._waited += found.waited
        self._is_warm = True

    def take(self, flops_per_token: float) -> dict[str, float]:
        """`tokens_per_second`, model FLOP/s, MFU where a peak is known, and the share of time spent on the loader."""
        tokens, seconds, waited = self._tokens, self._seconds, self._waited
        self._tokens = self._seconds = self._waited = 0.0
        if not seconds:
            return {}
        rate = tokens / seconds
        used = flops.mfu(rate * flops_per_token)
        out = {"tokens_per_second": rate, "flops_per_second": rate * flops_per_token, "data_wait": waited / seconds}
        return out if used is None else out | {"mfu": used}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: its last step, the best validation metric and its step, and why it stopped before its end."""

    step: int
    best: float | None
    best_step: int
    stopped: str  # "", "patience" or "signal"
    seconds: float


def train(
    recipe: Recipe,
    workdir: Path,
    *,
    snapshot: Snapshot | None = None,
    cache: Path | None = None,
    initial: WarmStart | None = None,
    profile: tuple[int, int] | None = None,
    words: Sequence[str] = (),
    devices: Sequence[Any] | None = None,
) -> Outcome:
    """Train `recipe` in `workdir`, a folder or a URL, going on from the newest whole checkpoint there.

    `initial` says where the parameters of a fresh run come from, instead of the recipe; `profile` is a range of steps
    to trace into `workdir/profile`; `words` is the command line for the manifest; `devices` are used instead of all.
    Raises `TrainingError` when the loss is not a number, `CheckpointError` when a checkpoint is of another model, or
    cannot be brought from or to a URL, or another process trains in this folder.
    """
    assembly = Assembly(recipe, ensure_prepared(recipe.mixture, cache), devices)
    told = {"recipe": recipe.name, "vocabulary": assembly.vocabulary_hash}
    with contextlib.ExitStack() as closing:
        folder = closing.enter_context(mirror.local(workdir, error=CheckpointError, cache=cache))
        if jax.process_index() == 0 and not is_url(workdir) and not closing.enter_context(held(folder / LOCK)):
            raise CheckpointError(
                "another process trains in this folder",
                where=str(folder),
                mend="wait until it has ended, or give another --workdir",
            )
        run = _Run(assembly, folder, profile)
        closing.enter_context(assembly.mesh.activate())
        checkpoints = closing.enter_context(Checkpointer(folder / CHECKPOINTS, recipe.checkpoints, **told))
        begin = run.restore_or_start(checkpoints, initial or recipe.warm_start)
        with RunWriter(folder, first_step=int(begin.step), total_steps=recipe.train_steps) as writer:
            writer.describe(run.facts(words), snapshot)
            with Stop(assembly.mesh) as stop:
                return run.loop(begin, checkpoints, writer, stop)


class _Run:
    """The parts of a run that do not change from step to step."""

    def __init__(self, assembly: Assembly, workdir: Path, profile: tuple[int, int] | None) -> None:
        recipe = assembly.recipe
        self.assembly, self.recipe, self.workdir, self.profile = assembly, recipe, workdir, profile
        self.batches = assembly.batches(process_index=jax.process_index(), process_count=jax.process_count())
        names = [task.name for task in recipe.mixture.tasks]
        self.evaluators = {name: assembly.evaluator("valid", number) for number, name in enumerate(names)}
        self.learning_rate = learning_rate(recipe.optimizer, recipe.train_steps)
        self.flops = assembly.flops_per_token()
        self.progress, self.pace = Progress(), Pace()
        self.data = self.batches.get_state()  # after the last step done, whatever was fetched since
        self.owes_evaluation = False  # of the last step done
        self.epochs: dict[int, float] = {}  # after steps that are not logged yet
        self.taken: dict[str, list[str]] = {}  # what a warm start took over

    def restore_or_start(self, checkpoints: Checkpointer, initial: WarmStart | None) -> TrainState:
        """The state to go on from; the data position and the progress are set to match."""
        restored = checkpoints.restore(self.assembly.abstract_state())
        if restored is not None:
            self.data = restored.iterator["data"]
            self.batches.set_state(self.data)
            self.progress = Progress(**restored.iterator["progress"])
            self.owes_evaluation = restored.iterator.get("owes_evaluation", False)
            return restored.state
        fresh = self.assembly.init_state()
        if initial is None:
            return fresh
        fresh, taken = self.assembly.warm_started(fresh, initial)
        self.taken = taken._asdict()
        return fresh

    def facts(self, words: Sequence[str]) -> dict[str, Any]:
        """What the manifest of the run says about it."""
        return {
            "recipe": self.recipe.name,
            "command": list(words),
            "seed": self.recipe.seed,
            "examples": [str(e.hash) for e in self.assembly.examples],
            "vocabulary": self.assembly.vocab.hash,
            "trained_times": self.assembly.examples[0].manifest.get("trained_times", []),
            "tables": {
                fact.name: coverage(fact(self.assembly.examples), fact.name, self.assembly.examples[0])
                for fact in self.recipe.facts
                if isinstance(fact, FieldTables)
            },
            "warm_start": self.taken,
            "simulated": any(e.manifest["simulated"] for e in self.assembly.examples),
            "parameters": count_parameters(self.assembly.abstract_params()),
            "flops_per_token": dataclasses.asdict(self.flops),
            "epoch_targets": self.batches.epoch_targets,
            "unique_targets": self.batches.unique_targets,
            "row_use": self.batches.row_use,
        }

    def loop(self, begin: TrainState, checkpoints: Checkpointer, writer: RunWriter, stop: Stop) -> Outcome:
        """Step until the last step, until patience runs out, or until told to stop."""
        recipe, now = self.recipe, begin
        train_step, const = self.assembly.train_step(), self.assembly.const()
        late, started, clock = LateMetrics(), time.perf_counter(), writer.clock
        step = first = int(begin.step)
        try:
            if self.owes_evaluation:
                now = self._evaluated(step, now, writer)[0]
            stopped = "patience" if self._is_out_of_patience() else ""
            if not recipe.train_steps and not self.progress.best_step and self.progress.best is None:
                checkpoints.save(now, metrics=self._evaluate(step, now, writer), iterator=self._position())
            while step < recipe.train_steps and not stopped:
                clock.lap("host")
                batch = next(self.batches)
                waited = clock.lap("data")
                self._trace(step - first, jax.block_until_ready, now.step)
                now, metrics = train_step(now, self.assembly.mesh.put_batch(batch), const)
                is_last, evaluated = step + 1 == recipe.train_steps, {}
                is_due = is_last or bool(recipe.eval_every and (step + 1) % recipe.eval_every == 0)
                # The step last: `_rescue` trusts the others only when it agrees with the state.
                self.owes_evaluation, self.data, step = is_due, self.batches.get_state(), step + 1
                if self._is_logged(step):
                    self.epochs[step] = max(self.batches.epochs)
                clock.lap("host")
                self._note(late.put(step, metrics, waited), writer)
                if is_due:
                    self._note(late.flush(), writer)
                    now, evaluated = self._evaluated(step, now, writer)
                stopped = "signal" if stop.is_asked() else "patience" if self._is_out_of_patience() else ""
                if checkpoints.due(step, is_last=is_last or bool(stopped), metrics=evaluated):
                    self._note(late.flush(), writer)
                    checkpoints.save(now, metrics=evaluated, iterator=self._position())
                    clock.lap("save")
                checkpoints.check()
                clock.step()
            checkpoints.wait()
        except (TrainingError, CheckpointError):
            raise
        except (Exception, KeyboardInterrupt):
            if step > first:
                self._rescue(step, now, late, checkpoints, writer)
            raise
        return Outcome(
            step=step,
            best=self.progress.best,
            best_step=self.progress.best_step,
            stopped=stopped,
            seconds=time.perf_counter() - started,
        )

    def _position(self) -> dict[str, Any]:
        """What a checkpoint holds besides the state: where the data is, and what is known of the run."""
        return {
            "data": self.data,
            "progress": dataclasses.asdict(self.progress),
            "owes_evaluation": self.owes_evaluation,
        }

    def _rescue(
        self, step: int, now: TrainState, late: LateMetrics, checkpoints: Checkpointer, writer: RunWriter
    ) -> None:
        """Save what an error is about to take away, if it is whole and finite.

        Several processes cannot: the others are not here, and saving takes all of them.
        """
        if jax.process_count() > 1 or not is_sound(now) or step != int(now.step):
            return
        try:
            with contextlib.suppress(OSError):
                self._note(late.flush(), writer)
            checkpoints.save(now, iterator=self._position())
            checkpoints.wait()
        except (TrainingError, CheckpointError, OSError) as error:
            writer.message(f"the step under way could not be saved: {error}")
        else:
            writer.message(f"saved step {step:,}, the last whole one, before the error")

    def _note(self, found: StepMetrics | None, writer: RunWriter) -> None:
        """Look at the metrics of a step that is done: stop on NaN, log when it is time."""
        writer.clock.lap("device")  # which is what getting them waited for
        if found is None:
            return
        loss = found.values["loss"]
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {found.step} is {loss}",
                where=f"batch {found.step} of seed {self.recipe.seed}, data position {self.batches.get_state()}",
                expected="a number; the last checkpoint is kept and was saved before this step",
                mend="lower LEARNING_RATE, or set optim.Optimizer.clip_norm",
            )
        self.pace.add(found)
        if not self._is_logged(found.step):
            return
        epochs, speed = self.epochs.pop(found.step), self.pace.take(self.flops.total) | writer.clock.take()
        written = {f"train/{name}": value for name, value in found.values.items()}
        written |= {
            "train/learning_rate": float(np.asarray(self.learning_rate(found.step - 1))),
            "train/epochs": epochs,
        }
        writer.write(found.step, written | {f"time/{name}": value for name, value in speed.items()})
        shown = {"tokens/s": f"{speed.get('tokens_per_second', 0):,.0f}"}
        shown |= {"MFU": f"{speed['mfu']:.1%}"} if "mfu" in speed else {}
        writer.progress(found.step, loss=loss, epoch=f"{epochs:.1f}", **shown)

    def _evaluate(self, step: int, now: TrainState, writer: RunWriter) -> Mapping[str, float]:
        """Metrics of the validation split, with the averaged parameters where there are any; means over the tasks."""
        params = self.assembly.with_facts(eval_params(now))
        ranked = {name: evaluator(params) for name, evaluator in self.evaluators.items()}
        values = self._means(ranked)
        metric = self.recipe.best_metric()
        progress = dataclasses.replace(self.progress)
        progress.note(step, values[metric], self.recipe.checkpoints.mode)
        best = "best so far" if progress.best_step == step else f"best at step {progress.best_step}"
        written = {f"valid/{m}": value for m, value in values.items()}
        for name, found in ranked.items():
            line = ", ".join(f"{m} {found.values[m]:.4f}" for m in self.recipe.evaluation.shown() if m in found.values)
            where = f"valid, {name}," if len(ranked) > 1 else "valid"
            writer.message(f"{where} at step {step:,}: {line} ({best}; {found.seconds:.1f} s)")
            if len(ranked) > 1:
                written |= {f"valid/{name}/{m}": value for m, value in found.values.items()}
        writer.write(step, written)
        self.progress = progress
        return values

    def _means(self, ranked: Mapping[str, System]) -> dict[str, float]:
        """Every metric over the tasks that have it; raises `ConfigError` when none has the one that decides."""
        names = dict.fromkeys(m for found in ranked.values() for m in found.values)
        means = {m: float(np.mean([f.values[m] for f in ranked.values() if m in f.values])) for m in names}
        metric = self.recipe.best_metric()
        if metric not in means:
            raise ConfigError(
                f"no task of the mixture is judged by {metric}",
                where="checkpoint.Checkpoints.metric, or the main metric of the evaluation",
                expected=", ".join(means),
            )
        return means

    def _evaluated(self, step: int, now: TrainState, writer: RunWriter) -> tuple[TrainState, Mapping[str, float]]:
        """Evaluate, and tell an optimiser that switches how it goes."""
        evaluated = self._evaluate(step, now, writer)
        now = self._after_evaluation(now, evaluated)
        self.owes_evaluation = False
        writer.clock.lap("evaluate")
        return now, evaluated

    def _after_evaluation(self, now: TrainState, metrics: Mapping[str, float]) -> TrainState:
        """Tell an optimiser that switches how it goes."""
        value = metrics[self.recipe.best_metric()]
        loss = -value if self.recipe.checkpoints.mode == "max" else value
        return dataclasses.replace(now, opt_state=switch.observe(self.recipe.optimizer, now.opt_state, loss))

    def _is_logged(self, step: int) -> bool:
        return step % self.recipe.log_every == 0 or step == self.recipe.train_steps

    def _is_out_of_patience(self) -> bool:
        return 0 < self.recipe.patience <= self.progress.stale

    def _trace(self, done: int, wait: Any, last: jax.Array) -> None:
        """Start and stop the profiler around the steps asked for, with nothing else in flight."""
        if self.profile is None or done not in self.profile:
            return
        wait(last)
        if done == self.profile[0]:
            jax.profiler.start_trace(str(self.workdir / "profile"))
        else:
            jax.profiler.stop_trace()


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ConfigError(f"cannot read --profile {text}", expected="FIRST:LAST, for example 10:20")
    return int(first), int(last)


def main(argv: list[str]) -> int:
    """Train one stage of a recipe."""
    parser = command.parser("train")
    parser.add_argument("--profile", default="", metavar="FIRST:LAST", help="trace these steps of this start")
    parser.add_argument("--warm_start", default="", metavar="DIR", help="checkpoints that a fresh run starts from")
    command.start_jax()
    given = command.parse(parser, argv)
    outcome = train(
        given.recipe,
        given.args.workdir or Path("runs") / given.recipe.name,
        snapshot=given.snapshot,
        cache=given.args.cache,
        initial=WarmStart(checkpoints=given.args.warm_start) if given.args.warm_start else None,
        profile=_steps(given.args.profile) if given.args.profile else None,
        words=["recjax", "train", *argv],
    )
    return INTERRUPTED if outcome.stopped == "signal" else 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
