"""`recjax study`: how loss falls with size and data, and what a larger model will reach before it is trained.

    recjax study scaling_law --gin.DATA_DIR=DIR            everything, in order; started again, it goes on

    grid      train the cells: learning rates, sizes, and the further parts
    fit       the laws, as tables
    predict   write the prediction of the held-out sizes; once, and before they are trained
    verify    train the held-out sizes and compare
    report    report.md and its plots from what there is
    all       grid of sizes, predict, verify, further parts, report (default)

A study is a gin file that binds `grid.Study`; its name is that of a file in `configs/study/`. In `<workdir>`:
cells.jsonl, cells/<key>/, prediction-<date>.json, report.md, *.png.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from recjax import cli, command
from recjax.core import mirror
from recjax.core.errors import CheckpointError, ConfigError
from recjax.core.flags import Flags, config_root, did_you_mean, parse_argv
from recjax.evaluate import show
from recjax.study import prediction, report
from recjax.study.findings import find, fitted_cells, held_out_cells
from recjax.study.grid import KINDS, Cell
from recjax.study.runner import Interrupted, Runner
from recjax.train import INTERRUPTED

STEPS = ("grid", "fit", "predict", "verify", "report", "all")
_ROOT = Path("runs")
_FIRST = ("sweep", "scale", "twice")


def study_file(name: str) -> Path | None:
    """The study of that name in `configs/study/`, or None."""
    path = config_root() / "study" / f"{name}.gin"
    return path if path.is_file() else None


def run_study(
    step: str, flags: Flags, workdir: Path, *, cache: Path | None = None, words: Sequence[str] = ()
) -> Path | None:
    """Take a study through one of `STEPS`; the report where one was written.

    Raises `Interrupted` when told to stop, and `ConfigError` for a step that cannot be taken.
    """
    runner = Runner(flags, workdir, cache=cache, say=lambda text: print(text, flush=True))
    with runner.lock():
        if step in ("grid", "all"):
            for kind in _FIRST:
                runner.run(runner.cells(kind))
        held_out = bool(runner.study.held_out)
        if step == "predict" or (step == "all" and held_out and prediction.existing(workdir) is None):
            path = _predict(runner)
            print(f"predicted: {path}", flush=True)
        if step == "verify" or (step == "all" and held_out):
            path = prediction.existing(workdir)
            if path is None:
                raise ConfigError("nothing has been predicted", where=str(workdir), mend="`recjax study predict` first")
            runner.run(held_out_cells(runner, prediction.read(path, runner.ledger)), predicted=True)
        if step in ("grid", "all"):
            for kind in (kind for kind in KINDS if kind not in _FIRST):
                runner.run(runner.cells(kind))
        found = find(runner)
        if step in ("fit", "verify"):
            show(report.tables(runner.study, found))
        if step in ("report", "all"):
            return report.write_report(runner, found, words)
    return None


def plan(runner: Runner) -> list[tuple[Cell, bool]]:
    """Every cell as it is known now, and whether it is finished; rates follow from the sweep and may change."""
    cells = [cell for kind in KINDS for cell in runner.cells(kind)] + held_out_cells(runner)
    return [(cell, runner.key(cell) in runner.ledger) for cell in cells]


def _predict(runner: Runner) -> Path:
    study = runner.study
    missing = [cell for kind in _FIRST for cell in runner.cells(kind) if runner.key(cell) not in runner.ledger]
    if missing:
        raise ConfigError(
            f"{len(missing)} cells are missing for a prediction", where=missing[0].label(), mend="`recjax study grid`"
        )
    converged, fitted = fitted_cells(runner)
    left_out = [name for name, one in converged.items() if not one.is_converged]
    if left_out and study.only_converged:
        print(f"not converged, and left out of the fit: {', '.join(left_out)}", flush=True)
    rates = runner.rates()
    # A run with any other rate would tell about the size as well.
    cells = [
        cell
        for size in study.of("held_out")
        for lr in {*study.learning_rates, rates(size)}
        for cell in runner.cells("held_out", lambda _, lr=lr: float(lr))
        if cell.size == size
    ]
    held_out = [
        (size, rates(size), [runner.folder(cell) for cell in cells if cell.size == size])
        for size in study.of("held_out")
    ]
    samples = study.bootstrap_samples
    return prediction.write(runner.workdir, fitted, held_out, split=study.split, law=study.law, samples=samples)


def main(argv: list[str]) -> int:
    """Take a study from its grid to its report."""
    flags = parse_argv(argv)
    parser = cli.ArgumentParser("study", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="STEP NAME", help="a step (default: all), and the name of a study")
    parser.add_argument("--workdir", type=Path, help="default: runs/<study>")
    parser.add_argument("--cache", type=Path, help="where prepared examples are kept (default: RECJAX_CACHE)")
    parser.add_argument("--list", action="store_true", help="list the cells, and train nothing")
    args = parser.parse_args(list(flags.rest))
    steps = [word for word in args.words if word in STEPS]
    names = [word for word in args.words if word not in STEPS]
    if len(steps) > 1 or len(names) + bool(flags.gin_files) != 1:
        known = sorted(path.stem for path in (config_root() / "study").glob("*.gin"))
        raise ConfigError(
            "which study?" if len(steps) < 2 else "one step at a time",
            expected=f"a step ({', '.join(STEPS)}) and a study ({', '.join(known)}) or --gin_file=FILE",
        )
    if names:
        found = study_file(names[0])
        if found is None:
            known = [path.stem for path in (config_root() / "study").glob("*.gin")]
            near = did_you_mean(names[0], [*known, *STEPS])
            raise ConfigError(f"no study {names[0]}", expected=", ".join(sorted(known)), mend=near)
        flags = dataclasses.replace(flags, gin_files=(str(found),))
    workdir = args.workdir or _ROOT / Path(flags.gin_files[0]).stem
    command.start_jax()
    with mirror.local(workdir, error=CheckpointError, cache=args.cache) as folder:
        if args.list:
            for cell, is_finished in plan(Runner(flags, folder, cache=args.cache)):
                print(f"{'done' if is_finished else '    '}  {cell.label()}")
            return 0
        step = steps[0] if steps else "all"
        try:
            path = run_study(step, flags, folder, cache=args.cache, words=["recjax", "study", *argv])
        except Interrupted as stopped:
            print(f"stopped in: {stopped}; the same command goes on", file=sys.stderr)
            return INTERRUPTED
    if path is not None:
        print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
