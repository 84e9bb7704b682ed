"""Tasks that ask the same in prompts of different lengths become the points of a line; others do not."""

from pathlib import Path
from typing import Any

import pytest

from recjax.trends import amounts_table, context_table, plot_amounts, plot_context, tasks_by_context


def task(name: str, told: float, asked: str, auc: float) -> dict[str, Any]:
    systems = {"model": auc, "DCNv2": 0.7}
    return {
        "protocol": {"task": name, "mean_events_told": told, "examples_hash": asked, "metrics": ["auc"], "k": []},
        "rows": {system: {"auc": value} for system, value in systems.items()},
        "intervals": {system: {"auc": (value - 0.02, value + 0.02)} for system, value in systems.items()},
    }


@pytest.fixture
def metrics() -> dict[str, Any]:
    others = [task("like_8", 7.5, "a", 0.66), task("love", 30.0, "b", 0.9), task("like_4", 3.9, "a", 0.64)]
    return {**task("like", 30.0, "a", 0.68), "tasks": others}


def test_the_shortest_prompts_come_first_and_other_questions_do_not(metrics: dict[str, Any]) -> None:
    assert [one["protocol"]["task"] for one in tasks_by_context(metrics)] == ["like_4", "like_8", "like"]
    table = context_table(metrics)
    assert [row[0] for row in table.rows] == ["like_4", "like_8", "like"]
    assert table.rows[0] == ["like_4", "3.9", ".6400 [.6200, .6600]", ".7000 [.6800, .7200]"]


def test_one_length_alone_is_no_line(metrics: dict[str, Any], tmp_path: Path) -> None:
    alone = {**metrics, "tasks": [metrics["tasks"][1]]}
    assert tasks_by_context(alone) == [] and plot_context(tmp_path / "x.png", alone) is None


def test_the_plot_is_an_image(metrics: dict[str, Any], tmp_path: Path) -> None:
    path = plot_context(tmp_path / "context.png", metrics)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")


def test_a_line_by_training_needs_two_stages(metrics: dict[str, Any], tmp_path: Path) -> None:
    points = [{**metrics, "stage": name, "tokens": tokens} for name, tokens in (("ninth", 1000), ("all", 9000))]
    assert amounts_table(metrics).rows == []
    assert plot_amounts(tmp_path / "x.png", {**metrics, "amounts": points[:1]}) is None
    told = {**metrics, "amounts": points}
    assert amounts_table(told).rows[1] == ["all", "9,000", ".6800 [.6600, .7000]"]
    path = plot_amounts(tmp_path / "amounts.png", told)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
