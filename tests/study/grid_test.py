"""Cells, their keys, learning rates and convergence, and the ledger; nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recjax.core.errors import ConfigError
from recjax.core.flags import Flags, config_root
from recjax.study.grid import Size, cells
from recjax.study.ledger import Finished, Ledger
from recjax.study.rates import Rates, convergence, sweeps_of
from recjax.study.runner import Runner, build, without_study

STUDIES = sorted((config_root() / "study").glob("*.gin"))
NAMES = ("scaling_law", "scaling_law_more")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_that_is_shipped_can_be_built(path: Path, tmp_path: Path) -> None:
    runner = Runner(Flags(gin_files=(str(path),)), tmp_path)
    study = runner.study
    known = {size.name: size for part in ("sizes", "held_out", "shapes") for size in study.of(part)}
    assert {known[n].parameters for n in ("3k", "6k", "14k", "25k", "55k", "98k", "197k")} == {
        *(3072, 6144, 13824, 24576, 55296, 98304, 196608)
    }
    some = [cell for kind in ("sweep", "scale", "twice", "data", "repeat", "ablation") for cell in runner.cells(kind)]
    for cell in {cell.arm: cell for cell in some}.values():
        recipe, snapshot = runner._recipe(cell, steps=50_000, every=3)
        assert recipe.train_steps == 50_000 and recipe.eval_every == 3 and recipe.seed == cell.seed
        assert recipe.feed.user_fraction == cell.user_fraction
        assert recipe.optimizer.learning_rate == cell.learning_rate
        assert f"TransformerConfig.width = {cell.size.width}" in snapshot.config
    short, _ = runner._recipe(some[0], steps=50, every=3)
    assert recipe.optimizer.schedule.warmup_steps == 100 and short.optimizer.schedule.warmup_steps == 12
    shapes = study.of("shapes")
    if shapes:
        n, aspect = [s.parameters for s in shapes], [s.aspect for s in shapes]
        assert max(n) / min(n) < 1.05 and max(aspect) / min(aspect) >= 16 and min(s.num_layers for s in shapes) == 1
    if study.budgets:
        assert len(study.budgets) >= 4 and len(study.iso_sizes) >= 5
    if study.ablation_sizes:
        layers = [size.num_layers for size in study.of("ablation_sizes")]
        assert min(layers) == 2 and max(layers) >= 12 and len(study.arms) == 4


def test_a_key_is_of_what_decides_the_outcome(make_runner: Callable[..., Any], tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    scale = runner.cells("scale")
    keys = {runner.key(cell) for cell in scale}
    assert len(keys) == 3
    grown = make_runner(tmp_path, "grid.Study.tolerance=0.1", "grid.Study.seeds=[0,1]")
    both = {grown.key(cell) for cell in grown.cells("scale")}
    assert keys < both and len(both) == 6  # what is done need not be done again
    other = make_runner(tmp_path, "transformer.TransformerConfig.dropout=0.3")
    assert not keys & {other.key(cell) for cell in other.cells("scale")}
    [repeat, *_] = make_runner(tmp_path, "grid.Study.repeat_sizes=['a']", "grid.Study.repeats=[0.5]").cells("repeat")
    assert runner.key(repeat) == runner.key(scale[0])  # one run, in two parts of the study


def test_the_further_parts_share_the_cells_of_the_first(tmp_path: Path) -> None:
    first, more = (Runner(Flags(gin_files=(f"configs/study/{name}.gin",)), tmp_path) for name in NAMES)
    for kind in ("sweep", "scale", "twice", "data", "repeat"):
        keys = {first.key(cell) for cell in first.cells(kind)}
        assert keys and keys <= {more.key(cell) for cell in more.cells(kind)}


def test_the_study_leaves_no_trace_in_the_text_of_a_run(study_gin: Path) -> None:
    text = build(Flags(gin_files=(str(study_gin),)))[1]
    assert "grid.Study.sizes" in text
    assert "grid.Study." not in without_study(text) and "Recipe.name = 'scaling_law'" in without_study(text)


def test_mistakes_are_told(make_runner: Callable[..., Any], tmp_path: Path) -> None:
    for binding, said in {
        "SEED=1": "SEED is set for every cell by the grid",
        "grid.Study.sizes=[]": "a study needs sizes",
        "grid.Study.held_out=[('d', 1, 8, 1)]": "d has N = 768, and 6,912 is fitted",
        "grid.Study.shapes=[('a', 2, 8, 1)]": "two sizes are called a",
        "grid.Study.twice=['z']": "no size 'z'",
        "grid.Study.user_fractions=[1.5]": "user_fractions",
        "grid.Study.passes=0": "passes = 0",
        "grid.Study.law='cubic'": "cubic",
        "grid.Study.split='train'": "train",
        "grid.Study.ablation_sizes=[('e', 1, 8, 1)]": "needs arms",
        "grid.Study.learning_rates=[]": "needs a learning rate",
        "checkpoint.Checkpoints.metric='ndcg@10'": "best by 'nll'",
        "grid.Study.siezs=[]": "has no parameter siezs",
    }.items():
        with pytest.raises(ConfigError) as caught:
            make_runner(tmp_path, binding)
        assert said in caught.value.message, binding


def test_each_size_takes_the_best_rate_of_its_sweep(
    make_runner: Callable[..., Any], finished: Callable[..., Finished], tmp_path: Path
) -> None:
    study = make_runner(tmp_path, "grid.Study.learning_rates=[0.001, 0.002, 0.004, 0.008]").study
    assert len(cells(study, "sweep", lambda size: 0.0)) == 12
    best = {"a": 0.008, "b": 0.002, "c": 0.002}
    sweep = [
        finished(6.0 + (lr != best[name]) + i / 100, size=name, learning_rate=lr)
        for name in best
        for i, lr in enumerate(study.learning_rates)
    ]
    rates = Rates(study, sweeps_of(sweep))
    assert {name: rates(study.of("sizes")[at]) for at, name in enumerate("abc")} == best
    assert rates.is_at_the_edge("a") and not rates.is_at_the_edge("b")
    # In powers of two N is 0, 2, 3.2 above that of a; the line through the rates 3, 1, 1 is at .2 for d, 2.1 between.
    assert rates(Size("d", 1, 32, 1)) == 0.001 and rates(Size("between", 2, 8, 1)) == 0.004
    assert Rates(study, {})(Size("d", 4, 16, 2)) == 0.001


def test_convergence(finished: Callable[..., Finished]) -> None:
    falling = finished(6.0, curve=[[1, 6.2], [2, 6.0]])
    flat = finished(6.0, curve=[[1, 6.01], [2, 6.0]])
    early = finished(6.0, curve=[[1, 6.0], [2, 6.4]])
    assert not convergence(falling, None, 0.005).is_converged
    assert convergence(flat, None, 0.005).is_converged and convergence(early, None, 0.005).is_converged
    assert not convergence(finished(6.0, curve=[[1, 6.0]]), None, 0.005).is_converged
    # A run twice as long decides.
    assert convergence(falling, finished(5.98), 0.005).is_converged
    longer = convergence(flat, finished(5.9), 0.005)
    assert not longer.is_converged and longer.twice_fall == pytest.approx(0.1 / 6)


def test_the_ledger_survives_a_line_cut_short(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    one, two = finished(6.0), finished(5.0)
    ledger = Ledger(tmp_path)
    ledger.add(one)
    ledger.add(two)
    path = tmp_path / "cells.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-30])
    again = Ledger(tmp_path)
    assert one.key in again and two.key not in again and again[one.key] == one
    again.add(two)
    assert path.read_text() == whole and Ledger(tmp_path)[two.key] == two
