"""The report says what metrics.json says, marks simulated data, and leaves whole files."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from recjax.plots import plot_points
from recjax.report import Report, published_values, write_report
from recjax.results import Result, System
from recjax.tables import buckets_table, differences_table, main_cutoff, number, plain, signed, systems_table

USERS = 40
EXPECTED = "recall@10 .3152, NDCG@10 .1821 (MovieLens-1M, leave one out, full ranking)"


def result(*, simulated=False, cold=True):
    rng = np.random.default_rng(0)
    systems = {
        name: System(
            rank=rng.integers(0, top, USERS).astype(np.int32),
            values={f"{m}@{k}": 0.1234 for m in ("recall", "ndcg", "mrr", "coverage", "popularity") for k in (5, 10)},
            settings={"steps": 10} if name == "item_graph" else {},
            seconds=1.5,
        )
        for name, top in (("model", 20), ("popularity", 60), ("item_graph", 30))
    }
    sample = {"user_index": 7, "history": ["A *bold* title", "B"], "target": "C", "rank": {"model": 0}}
    return Result(
        systems=systems,
        user_index=np.arange(USERS),
        label=np.full(USERS, 5),
        item_bucket=np.arange(USERS) % 3,
        user_bucket=np.arange(USERS) % 2 if cold else np.ones(USERS, np.int8),
        ks=(5, 10),
        bootstrap_samples=100,
        seed=0,
        protocol={
            "k": [5, 10],
            "users": USERS,
            "catalogue_size": 99,
            "simulated": simulated,
            "seen": "removed",
            "split_rule": "leave one out",
            "seeds": {"recipe": 3},
            "buckets": {"item": "a rule"},
        },
        samples=[{**sample, "recommended": {"model": ["C", "D"]}}],
    )


def report(metrics, **more):
    curve = [{"step": s, "train/loss": 5.0 / s} for s in range(1, 60)]
    curve += [{"step": s, "valid/recall@10": s / 100, "valid/ndcg@10": s / 200} for s in (20, 40)]
    header = {"title": "A title", "paper": "A paper", "expected": EXPECTED}
    given = {"curve": curve, "header": header, "facts": {"training": "3.1 min"}, **more}
    return Report(name="sasrec", command="recjax run sasrec", metrics=metrics, **given)


def test_numbers_read_the_same_everywhere():
    assert [number(x) for x in (0.3152, 0.0005, 1.0, 12.5, None, -0.05)] == [
        ".3152",
        ".0005",
        "1.0000",
        "12.5000",
        "-",
        "-.0500",
    ]
    assert (signed(0.01), signed(-0.01)) == ("+.0100", "-.0100")
    assert plain({"a_b": [1, 2000], "c": None, "d": True}) == "a b: 1, 2,000; c: none; d: yes"


def test_tables_show_what_metrics_hold():
    metrics = result().metrics()
    assert main_cutoff(metrics) == 10
    table = systems_table(metrics)
    assert [row[0] for row in table.rows] == ["model", "popularity", "item_graph"]
    assert all(len(row) == len(table.header) for row in table.rows)
    turned = table.transposed()
    assert turned.header == ["", "model", "popularity", "item_graph"] and turned.transposed() == table
    assert turned.width < 60 < table.width
    difference = metrics["differences"]["popularity"]["recall@10"]
    assert differences_table(metrics).rows[0][1] == (
        f"{signed(difference['mean'])} [{signed(difference['low'])}, {signed(difference['high'])}]"
    )
    buckets = {row[0]: row for row in buckets_table(metrics).rows}
    assert buckets["cold users"][2] == number(metrics["buckets"]["user/cold"]["rows"]["model"]["ndcg@10"])
    assert [row[0] for row in buckets_table(result(cold=False).metrics()).rows] == [
        "popular targets (head)",
        "middling targets (torso)",
        "rare targets (tail)",
    ]


def test_the_header_of_a_recipe_gives_the_published_values():
    assert published_values(EXPECTED) == {"recall@10": 0.3152, "ndcg@10": 0.1821}
    assert published_values("beats the item graph") == {}


def test_report_and_plots(tmp_path):
    metrics = result().metrics()
    stages = [{"stage": "1_train", "steps": 9000}, {"stage": "2_tune", "steps": 10}]
    text = write_report(tmp_path, report(metrics, stages=stages)).read_text()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["buckets.png", "report.md", "systems.png", "training.png"]
    for name in ("buckets", "systems", "training"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"({name}.png)" in text
    low, high = metrics["intervals"]["model"]["recall@10"]
    assert f"| recall@10 | .3152 | .1234 | [{number(low)}, {number(high)}] | -.1918 |" in text
    for words in ("`recjax run sasrec`", "A paper", "3.1 min", "2_tune", "recipe: 3", "*A  bold  title*", "place 1)"):
        assert words in text
    assert "imulated data" not in text
    for line in re.findall(r"^\|.*\|$", text, flags=re.MULTILINE):
        assert line.count("|") >= 3


def test_points_without_a_number_are_left_out(tmp_path):
    groups = {name: {"rows": [1, 2, 3], "pull": [0.1, math.nan, 0.3], "gain": [0.0, 0.1, 0.2]} for name in "ab"}
    path = plot_points(tmp_path / "points.png", groups, y="gain")
    assert path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]


def test_simulated_numbers_are_never_put_beside_published_ones(tmp_path):
    text = write_report(tmp_path, report(result(simulated=True).metrics())).read_text()
    assert "**Simulated data.**" in text and "nothing to compare" in text
    assert "| recall@10 | .3152" not in text


def test_a_report_without_curve_or_published_values(tmp_path):
    text = write_report(tmp_path, report(result().metrics(), curve=(), header={})).read_text()
    assert "## Training" not in text and "published" not in text
    assert not (tmp_path / "training.png").exists()


def test_metrics_are_json_even_where_a_value_is_not_a_number(tmp_path):
    from recjax.result_files import write_json

    path = write_json(tmp_path / "x.json", {"a": float("nan"), "b": np.float32(0.5), "c": [np.int64(3), (1.0,)]})
    assert json.loads(path.read_text()) == {"a": None, "b": 0.5, "c": [3, [1.0]]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads(path.read_text())["b"] == 0.5
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]
