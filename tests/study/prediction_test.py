"""A prediction is made once, before the run it is about, and stands on results that nobody changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.study import prediction
from recjax.study.grid import Size
from recjax.study.ledger import Finished, Ledger, digest

LARGER = Size("large", 4, 64, 2)
SIZES = (3072, 6144, 13824, 24576, 55296, 98304)


@pytest.fixture
def runs(finished: Callable[..., Finished]) -> list[Finished]:
    noise = np.random.default_rng(0).standard_normal(len(SIZES)) * 0.002
    return [finished(9.5 / n**0.045 * float(np.exp(e)), parameters=n) for n, e in zip(SIZES, noise, strict=True)]


def ledger_of(workdir: Path, runs: list[Finished]) -> Ledger:
    ledger = Ledger(workdir)
    for one in runs:
        ledger.add(one)
    return ledger


def test_it_foretells_a_planted_law(tmp_path: Path, runs: list[Finished], finished: Callable[..., Finished]) -> None:
    ledger = ledger_of(tmp_path, runs)
    path = prediction.write(tmp_path, runs, [(LARGER, 0.004, [tmp_path / "cells/x"])], split="test", samples=300)
    content = prediction.read(path, ledger)
    assert path == prediction.existing(tmp_path) and content["written"][:10] in path.name
    assert content["inputs_sha256"] == digest(runs[::-1]) and len(content["cells"]) == len(SIZES)
    truth = 9.5 / LARGER.parameters**0.045
    [one] = prediction.verify(content, [finished(truth, parameters=LARGER.parameters)])
    assert abs(one["relative_error"]) < 0.01 and one["is_covered"] and one["low"] < one["loss"] < one["high"]
    assert abs(one["relative_error"]) < abs(one["naive_error"])
    assert one["naive"] == runs[-1].test["nll"] and one["learning_rate"] == 0.004
    assert prediction.verify(content, []) == []


def test_it_is_refused_after_the_run_has_begun(tmp_path: Path, runs: list[Finished]) -> None:
    (tmp_path / "cells/x").mkdir(parents=True)
    with pytest.raises(ConfigError, match="large cannot be predicted any more"):
        prediction.write(tmp_path, runs, [(LARGER, 0.004, [tmp_path / "cells/x"])], split="test", samples=50)
    assert prediction.existing(tmp_path) is None


def test_it_is_made_once(tmp_path: Path, runs: list[Finished]) -> None:
    path = prediction.write(tmp_path, runs, [(LARGER, 0.004, [])], split="test", samples=50)
    before = path.read_text()
    with pytest.raises(ConfigError, match="there is a prediction already"):
        prediction.write(tmp_path, runs, [(LARGER, 0.004, [])], split="test", samples=50)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_changed_results_are_noticed(tmp_path: Path, runs: list[Finished]) -> None:
    path = prediction.write(tmp_path / ".", runs, [(LARGER, 0.004, [])], split="test", samples=50)
    better = dataclasses.replace(runs[2], test={**runs[2].test, "nll": runs[2].test["nll"] - 0.01})
    with pytest.raises(ConfigError, match="have changed since"):
        prediction.read(path, ledger_of(tmp_path / "one", [*runs[:2], better, *runs[3:]]))
    with pytest.raises(ConfigError, match="have changed since"):
        prediction.read(path, ledger_of(tmp_path / "other", runs[1:]))


def test_the_law_is_the_one_that_foretells_the_largest_fitted_size(finished: Callable[..., Finished]) -> None:
    pure = [finished(9.5 / n**0.045, parameters=n) for n in SIZES]
    assert prediction.choose_law(pure, "test")[0].name in ("pure", "power")  # both are exact
    floor = [finished(5.0 + 300 / n**0.6, parameters=n) for n in SIZES]
    law, errors = prediction.choose_law(floor, "test")
    assert law.name == "power" and errors["power"] < 0.001 < errors["pure"]
    assert prediction.choose_law(floor, "test", "pure")[0].name == "pure"
    assert prediction.choose_law(floor[:3], "test")[0].name == "pure"  # three points say nothing of an asymptote
    with pytest.raises(ConfigError, match="2 sizes are too few"):
        prediction.choose_law(floor[:2], "test")


def test_nothing_held_out_is_nothing_to_predict(tmp_path: Path, runs: list[Finished]) -> None:
    with pytest.raises(ConfigError, match="nothing is held out"):
        prediction.write(tmp_path, runs, [], split="test")
    assert json.dumps(list(tmp_path.iterdir())) == "[]"
