"""Arms of an experiment: a run with two of them, and what may be compared with what."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from recjax import cli, run
from recjax.arms import Arm, arms_hard_table, arms_table, compare_arms, groups
from recjax.core.errors import ConfigError
from recjax.core.flags import Flags
from recjax.list import Header, main_stage, read_header
from recjax.metrics.topk import per_user
from recjax.results import Result, System
from recjax.slices import Group, Task

KS = (5, 10)


def result(ranks: list[int], **protocol: object) -> Result:
    rank = np.asarray(ranks, np.int32)
    values = {name: float(v.mean()) for name, v in per_user(rank, KS).items()}
    zeros = np.zeros(len(rank), np.int64)
    return Result(
        systems={"model": System(rank=rank, values=values)},
        user_index=np.arange(len(rank)),
        label=zeros,
        item_bucket=zeros,
        user_bucket=zeros,
        ks=KS,
        bootstrap_samples=50,
        seed=0,
        protocol={"examples_hash": "x", "split": "test", "seen": "removed", "target_time_used": False, **protocol},
    )


def arm(name: str, *results: Result) -> Arm:
    return Arm(name=name, title="", results=dict(enumerate(results)))


def test_the_difference_is_that_of_the_means_over_shared_seeds() -> None:
    rng = np.random.default_rng(0)
    one, two = (arm(n, *(result(rng.integers(0, 30, 200).tolist()) for _ in range(s))) for n, s in (("a", 2), ("b", 3)))
    found = compare_arms([one, two])["arms"]
    for metric, difference in found["b"]["difference"].items():
        shared = np.mean([two.results[s].systems["model"].values[metric] for s in (0, 1)])
        assert difference["mean"] == pytest.approx(shared - found["a"]["values"][metric], abs=1e-12)
        assert difference["low"] < difference["mean"] < difference["high"]
    assert found["b"]["values"]["ndcg@10"] == pytest.approx(np.mean(two.seed_values("ndcg@10")))
    assert "difference" not in found["a"]
    table = arms_table(compare_arms([one, two]))
    assert [row[0] for row in table.rows] == ["a", "b"] and "without the time" in table.title


def test_an_arm_may_name_the_one_it_is_compared_with() -> None:
    rng = np.random.default_rng(2)
    one, two, three = (arm(n, result(rng.integers(0, 30, 50).tolist())) for n in "abc")
    named = dataclasses.replace(three, against="b")
    found = compare_arms([one, two, named])["arms"]
    assert [row.get("against") for row in found.values()] == [None, "a", "b"]
    only = compare_arms([two, three])["arms"]["c"]
    assert found["c"]["difference"] == only["difference"] != compare_arms([one, three])["arms"]["c"]["difference"]
    table = arms_table(compare_arms([one, two, named]))
    assert [row[table.header.index("compared with")] for row in table.rows] == ["", "a", "b"]
    assert "compared with" not in arms_table(compare_arms([one, two])).header
    with pytest.raises(ConfigError, match="against z"):
        compare_arms([one, dataclasses.replace(three, against="z")])


def test_tasks_that_ask_the_same_have_a_table_each() -> None:
    """One stage told more and less of a history, against another one: neither task takes the place of the other."""
    rng = np.random.default_rng(0)
    arms = [arm(n, result(rng.integers(0, 30, 40).tolist(), task=t)) for n in ("a", "b") for t in ("long", "short")]
    found = [compare_arms(group) for group in groups(arms)]
    assert [one["task"] for one in found] == ["long", "short"]
    for number, one in enumerate(found):
        want = {a.name: a.seed_values("ndcg@10")[0] for a in arms[number::2]}
        assert {name: row["values"]["ndcg@10"] for name, row in one["arms"].items()} == want
    single = [arm("a", result([1, 2, 3], task="x")), arm("b", result([1, 2, 3], task="y"))]
    assert groups(single) == [single]


def test_answers_to_one_query_are_resampled_together() -> None:
    rng = np.random.default_rng(1)
    few = [result(rng.integers(0, 12, 40).tolist()) for _ in range(2)]
    many = [
        dataclasses.replace(result(np.tile(r.systems["model"].rank, 30).tolist()), cluster=np.tile(np.arange(40), 30))
        for r in few
    ]
    one, other = (
        compare_arms([arm("a", found[0]), arm("b", found[1])])["arms"]["b"]["difference"] for found in (few, many)
    )
    assert one == {name: pytest.approx(bounds) for name, bounds in other.items()}


def test_hard_tasks_are_compared_on_the_same_users_alone() -> None:
    def with_task(users: list[int], *found: float) -> Result:
        group = Group(user_index=np.array(users), values={"model": {"map": np.array(found)}})
        tasks = {"future": Task(about="", groups={"period": group}, shown=("map",))}
        return dataclasses.replace(result([0, 1, 2]), hard=tasks)

    base = arm("a", with_task([0, 1, 2], 0.0, 0.5, 1.0), with_task([0, 1, 2], 0.5, 0.5, 0.5))
    same = arm("b", with_task([0, 1, 2], 1.0, 1.0, 1.0), with_task([0, 1, 2], 1.0, 0.5, 1.0))
    others = arm("c", with_task([0, 1, 7], 1.0, 1.0, 1.0), with_task([0, 1, 7], 1.0, 0.5, 1.0))
    found = compare_arms([base, same, others])
    part = {name: row["hard"]["future"]["period"] for name, row in found["arms"].items()}
    assert part["b"]["difference"]["map"]["mean"] == pytest.approx(np.mean([0.75, 0.25, 0.25]))
    assert "difference" not in part["a"] and "difference" not in part["c"]
    [row] = arms_hard_table(found).rows
    assert row[0] == "future, period: map" and row[1] == ".5000" and row[2].startswith(".9167 +.4167 [")


def test_an_arm_against_itself_differs_by_nothing() -> None:
    same = result([0, 3, 12, 7])
    found = compare_arms([arm("a", same), arm("b", same)])["arms"]["b"]["difference"]
    assert all((d["mean"], d["low"], d["high"]) == (0, 0, 0) for d in found.values())


def test_who_knows_the_time_of_the_target_stands_apart() -> None:
    blind, told = arm("a", result([1, 2])), arm("b", result([0, 0], target_time_used=True))
    elsewhere = arm("c", result([0, 0], examples_hash="y"))
    assert [[a.name for a in g] for g in groups([blind, told, elsewhere])] == [["a"], ["b"], ["c"]]
    with pytest.raises(ValueError, match="conditions"):
        compare_arms([blind, told])
    assert "told the time" in arms_table(compare_arms([told])).title


STAGE = """# title: {title}
# role: {role}
# infer: {infer}
from __gin__ import dynamic_registration
from recjax import recipe
from recjax.core import warm_start

include '{tiny}'

recipe.Recipe.name = 'two'
"""
WARM = """
STAGES = ''
TRAIN_STEPS = 0
recipe.Recipe.warm_start = @warm_start.WarmStart()
warm_start.WarmStart.checkpoints = %STAGES
warm_start.WarmStart.stage = '1_teacher'
"""


@pytest.fixture(scope="module")
def finished(tiny_gin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    files = []
    for name, role, infer, more in (
        ("1_teacher", "teacher", "item_vectors, recommendations", ""),
        ("2_same", "main", "", WARM),
        ("3_more", "arm", "", WARM.replace("TRAIN_STEPS = 0", "TRAIN_STEPS = 6")),
    ):
        files.append(folder / f"{name}.gin")
        files[-1].write_text(STAGE.format(title=name, role=role, infer=infer, tiny=tiny_gin) + more)
    found = run.run(files, Flags(), folder / "run", seeds=[0], cache=None, words=["recjax", "run"])
    assert found is not None and {stage.name for stage in found[1]} == {"2_same"}
    return folder / "run"


def test_a_stage_without_steps_is_the_stage_it_starts_from(finished: Path) -> None:
    teacher, same = (
        json.loads((finished / "seed0" / stage / "test" / "metrics.json").read_text())["rows"]["model"]
        for stage in ("1_teacher", "2_same")
    )
    assert teacher == same


def test_a_run_compares_its_arms_and_leaves_what_headers_ask_for(finished: Path) -> None:
    assert {p.name for p in (finished / "seed0" / "1_teacher" / "artifacts").iterdir()} == {
        "item_vectors",
        "recommendations",
    }
    [group] = json.loads((finished / "metrics.json").read_text())["arms"]
    assert list(group["arms"]) == ["2_same", "3_more"] and group["first"] == "2_same"
    assert set(group["arms"]["3_more"]["per_seed"]) == {"0"}
    report = (finished / "report.md").read_text()
    assert "The arms side by side" in report and "3_more" in report


def test_stages_that_differ_in_length_alone_are_the_points_of_a_line(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    none, six = metrics["amounts"]
    assert (none["stage"], six["stage"]) == ("2_same", "3_more")
    config = (finished / "seed0" / "3_more" / "config.gin").read_text()
    [batch], [row] = (re.findall(rf"{name} = (\d+)", config) for name in ("BATCH_SIZE", "Feed.row_length"))
    assert none["tokens"] == 0 and six["tokens"] == 6 * int(batch) * int(row)
    for one in metrics["amounts"]:
        tested = json.loads((finished / "seed0" / one["stage"] / "test" / "metrics.json").read_text())
        assert one["rows"]["model"] == tested["rows"]["model"]
    assert "![amounts](amounts.png)" in (finished / "report.md").read_text() and (finished / "amounts.png").exists()


def test_the_main_stage_has_the_bundle_and_the_head_of_the_report(finished: Path) -> None:
    tested = json.loads((finished / "seed0" / "2_same" / "test" / "metrics.json").read_text())["rows"]["model"]
    assert json.loads((finished / "metrics.json").read_text())["rows"]["model"] == tested
    assert (finished / "report.md").read_text().startswith("# two: 2_same\n")
    manifest = json.loads((finished / "bundle" / "manifest.json").read_text())
    assert Path(manifest["checkpoint"]).is_relative_to(finished / "seed0" / "2_same") and manifest["step"] == 0


def test_without_a_main_stage_the_last_that_is_no_teacher_is_it() -> None:
    def found(*roles: str) -> str:
        return main_stage({str(i): Header(role=role) for i, role in enumerate(roles)})

    assert found("arm", "main", "arm") == "1"
    assert found("arm", "", "teacher") == "1"
    assert found("teacher", "teacher") == "1"
    with pytest.raises(ConfigError, match="one main stage"):
        found("main", "arm", "main")


def test_a_role_nobody_knows_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "1_x.gin"
    path.write_text("# title: x\n# role: pupil\n")
    with pytest.raises(ConfigError, match="pupil"):
        read_header(path)
    assert dataclasses.asdict(read_header(_written(tmp_path, "# role: arm\n")))["role"] == "arm"


def _written(folder: Path, text: str) -> Path:
    (folder / "2_y.gin").write_text(text)
    return folder / "2_y.gin"


def test_the_command_names_a_stage_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _written(tmp_path, "# role: pupil\n")
    assert cli.run(run.main, [f"--gin_file={path}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "pupil" in capsys.readouterr().err
