"""A whole study on the simulated world: grid, prediction, held-out run, report; interrupted, it loses nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.flags import Flags
from recjax.core.writer import RunWriter
from recjax.study import prediction
from recjax.study.__main__ import main, run_study
from recjax.study.findings import find
from recjax.study.ledger import Finished
from recjax.study.runner import Interrupted


def same(one: Finished) -> dict[str, Any]:
    """Without what the clock says."""
    return dataclasses.asdict(dataclasses.replace(one, seconds=0.0, finished=""))


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """SIGTERM when a certain step has been logged."""
    write = RunWriter.write

    def arm(step: int) -> None:
        def writing(self: RunWriter, at: int, metrics: Any) -> None:
            write(self, at, metrics)
            if at == step and "train/loss" in metrics:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(RunWriter, "write", writing)

    return arm


def planted(runner: Any, finished: Callable[..., Finished]) -> None:
    """Cells finish at once, with losses of a law."""

    def train(cell: Any) -> Finished:
        n, share = cell.size.parameters, cell.user_fraction
        unique = round(1000 * share)
        passes = cell.passes or cell.budget / (6.0 * n * unique)
        worth = unique * (1 + 5 * -np.expm1(-max(passes - 1, 0) / 5))
        loss = float(8.0 / n**0.05 + 20 / worth**0.5 + 0.1 * abs(np.log(cell.learning_rate / 0.01)))
        runner.folder(cell).mkdir(parents=True)
        return finished(
            loss,
            parameters=n,
            key=runner.key(cell),
            size=cell.size.name,
            num_layers=cell.size.num_layers,
            width=cell.size.width,
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            user_fraction=share,
            arm=cell.arm.name,
            budget=cell.budget,
            unique=unique,
            targets=round(unique * passes),
            curve=[[10, loss * 1.001], [20, loss]],
        )

    runner._train = train


MORE = (
    "grid.Study.sizes=[('a', 1, 8, 1), ('b', 1, 16, 1), ('c', 1, 24, 1), ('e', 1, 32, 1), ('f', 1, 40, 1)]",
    "grid.Study.held_out=[('d', 1, 64, 1)]",
    "grid.Study.learning_rates=[0.005, 0.01, 0.02]",
    "grid.Study.passes=8",
    "grid.Study.twice=['a']",
    "grid.Study.data_sizes=['a', 'c', 'f']",
    "grid.Study.user_fractions=[0.1, 0.2, 0.5]",
    "grid.Study.repeat_sizes=['c']",
    "grid.Study.repeats=[1, 2, 4, 8, 16]",
    "grid.Study.shapes=[('deep', 16, 8, 1), ('wide', 1, 32, 1)]",
    "grid.Study.iso_sizes=['a', 'b', 'c', 'e', 'f']",
    "grid.Study.budgets=[1e8, 2e8, 4e8, 8e8]",
    "grid.Study.ablation_sizes=[('two', 2, 16, 1), ('twelve', 12, 16, 1)]",
    "grid.Study.ablation_passes=1",
    "grid.Study.arms=[('neither', ()), ('no norm', ('transformer.TransformerConfig.bias=False',))]",
)


def test_every_part_of_a_study_comes_into_the_report(
    make_runner: Callable[..., Any], finished: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(tmp_path, *MORE)
    planted(runner, finished)
    monkeypatch.setattr("recjax.study.__main__.Runner", lambda *_, **__: runner)
    report = run_study("all", runner.flags, tmp_path, words=["recjax", "study"])
    assert report is not None
    text, found = report.read_text(), find(runner)
    assert "> **Simulated data.**" in text
    for title in ("Learning rate by size", "Sizes", "Loss and size", "Predicted before", "Loss and data", "Repetition"):
        assert f"## {title}" in text
    assert "## Shape: N within 0.0%, width over layers over 64x" in text
    assert "| wide | 1x32 | 32.0 |" in text and found.rates.best["wide"] == 0.01
    assert "## IsoFLOP" in text and "## Ablation" in text and "| twelve | 12 | 36,864 |" in text
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        *("law_n", "residuals", "law_d", "law_nd", "repetition", "isoflop", "metrics")
    }
    assert {one.learning_rate for one in found.scale} == {0.01} and not found.rates.is_at_the_edge("a")
    [one] = found.verified
    assert abs(one["relative_error"]) < 0.005 and one["is_covered"] and found.is_monotone()
    assert found.repetition["c"].fit.values["r"] == pytest.approx(5, rel=0.2)
    assert len(found.isoflops) == 4 and set(found.of_d) == {"a", "c", "f"} and set(found.surface) == {"joint", "kaplan"}
    numbers = json.loads((tmp_path / "study.json").read_text())
    assert numbers["verified"][0]["size"] == "d" and numbers["laws"]["pure"]["points"] == 5
    run_study("fit", runner.flags, tmp_path)


def test_a_cell_is_counted_and_run_once(make_runner: Callable[..., Any], tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    [cell, *_] = runner.cells("scale")
    runner.run([cell])
    [(_, one)] = runner.finished([cell])
    assert one.parameters == 768 and one.steps == one.curve[-1][0] and len(one.curve) == 2
    assert one.unique > 0 and 0.5 <= one.passes < 0.7
    assert one.flops["total"] > one.flops["backbone"] > 6 * 768
    assert one.valid["nll"] == min(loss for _, loss in one.curve) and 0 < one.test["nll"] < 7
    again = make_runner(tmp_path)
    again._train = lambda cell: pytest.fail("it is finished")
    again.run([cell])
    with pytest.raises(ConfigError, match="d is held out and nothing has been predicted"):
        again.run(again.cells("held_out"))


@pytest.mark.heavy
def test_from_grid_to_report(
    make_runner: Callable[..., Any], study_gin: Path, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    workdir = tmp_path / "study"
    runner = make_runner(workdir)
    [held_out] = runner.cells("held_out")
    [first, *_] = scale = runner.cells("scale")
    alone = make_runner(tmp_path / "alone")
    alone.run([first])
    flags = Flags(gin_files=(str(study_gin),))
    stop_at(3)
    with pytest.raises(Interrupted):
        run_study("all", flags, workdir)
    stop_at(-1)
    assert not (workdir / "cells.jsonl").exists() and prediction.existing(workdir) is None
    with pytest.raises(ConfigError, match="3 cells are missing for a prediction"):
        run_study("predict", flags, workdir)

    report = run_study("all", flags, workdir, words=["recjax", "study"])
    again = make_runner(workdir)
    [(_, resumed)] = again.finished([first])
    assert same(resumed) == same(alone.finished([first])[0][1])  # killed in the middle, and yet the same numbers
    assert len((workdir / "cells.jsonl").read_text().splitlines()) == 4
    assert resumed.parameters == 768 and [one.parameters for _, one in again.finished(scale)] == [768, 3072, 6912]

    path = prediction.existing(workdir)
    assert path is not None and report is not None
    written = json.loads(path.read_text())["written"]
    [(_, held)] = again.finished([held_out])
    assert written <= held.finished and resumed.finished <= written
    text = report.read_text()
    assert "d (N = 12,288): predicted" in text and "| held out |" in text and "not identifiable" not in text
    assert {p.name for p in workdir.glob("*.png")} == {"law_n.png", "residuals.png", "metrics.png"}

    before = (workdir / "cells.jsonl").read_text()
    run_study("all", flags, workdir)  # there is nothing left to do
    assert (workdir / "cells.jsonl").read_text() == before
    with pytest.raises(ConfigError, match="there is a prediction already"):
        run_study("predict", flags, workdir)
    path.unlink()
    with pytest.raises(ConfigError, match="d cannot be predicted any more: it has been run"):
        run_study("predict", flags, workdir)


def test_a_model_of_another_shape_is_refused(make_runner: Callable[..., Any], tmp_path: Path) -> None:
    runner = make_runner(tmp_path, "transformer.TransformerConfig.mlp_width=8")
    with pytest.raises(ConfigError, match="a has 384 weights in its blocks, and 12 n d\\^2 = 768"):
        runner.assemble(runner.cells("scale")[0])


def test_a_budget_says_how_long(make_runner: Callable[..., Any], tmp_path: Path) -> None:
    runner = make_runner(tmp_path, "grid.Study.iso_sizes=['a', 'c']", "grid.Study.budgets=[2e8, 4e8]")
    counts = [runner.assemble(cell)[1] for cell in runner.cells("isoflop")]
    assert counts[2].steps == pytest.approx(2 * counts[0].steps, abs=1)
    assert counts[0].steps > counts[1].steps  # the larger model sees fewer targets for the same money
    part = make_runner(tmp_path, "grid.Study.data_sizes=['a']", "grid.Study.user_fractions=[0.5]").cells("data")
    half = runner.assemble(part[0])[1]
    assert 0.2 * counts[0].unique < half.unique < 0.8 * counts[0].unique


def test_two_processes_do_not_share_a_folder(make_runner: Callable[..., Any], tmp_path: Path) -> None:
    runner = make_runner(tmp_path / "study")
    with runner.lock(), pytest.raises(ConfigError, match="another process works on this study"):
        with make_runner(tmp_path / "study").lock():
            pass


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "which study?"),
        (["fit", "report", "scaling_law"], "one step at a time"),
        (["scaling_lwa"], "did you mean scaling_law?"),
        (["scaling_law", "--gin_file=x.gin"], "which study?"),
    ],
)
def test_a_command_line_that_is_not_clear(argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(argv)
    assert said in caught.value.message


def test_the_cells_can_be_listed(study_gin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", f"--gin_file={study_gin}", f"--workdir={tmp_path / 'none'}"]) == 0
    assert capsys.readouterr().out.count("scale, ") == 3 and not (tmp_path / "none").exists()
