"""A recipe from data to report, in its tiny mode: what is left behind, and that it agrees with itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from recjax import cli, evaluate, run, stages
from recjax.core.errors import ConfigError
from recjax.core.flags import Flags, recipe_files
from recjax.evaluation import assess
from recjax.serve.bundle import Bundle


@pytest.fixture(scope="module")
def finished(tiny_gin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    assert cli.run(run.main, [f"--gin_file={tiny_gin}", f"--workdir={workdir}", "--seeds=0,1"]) == 0
    return workdir


def test_a_run_leaves_report_plots_metrics_and_bundle(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"report.md", "metrics.json", "training.png", "systems.png", "buckets.png", "bundle"} <= names
    report = (finished / "report.md").read_text()
    assert "Simulated data" in report and "item_graph" in report and "recjax run" in report
    bundle = Bundle(finished / "bundle")
    assert bundle.manifest["step"] == 2 and len(bundle.users) == 20


def test_values_are_means_over_seeds(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    each = [json.loads((finished / f"seed{s}" / "test" / "metrics.json").read_text()) for s in (0, 1)]
    assert metrics["protocol"]["seeds"]["recipe"] == [0, 1]
    for name, value in metrics["rows"]["model"].items():
        np.testing.assert_allclose(value, np.mean([m["rows"]["model"][name] for m in each]), rtol=1e-12)
    assert each[0]["rows"]["model"] != each[1]["rows"]["model"]
    assert metrics["rows"]["popularity"] == each[0]["rows"]["popularity"]


def test_a_finished_run_is_neither_trained_nor_evaluated_again(
    finished: Path, tiny_gin: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = (finished / "seed0" / "metrics.jsonl").read_bytes()
    metrics, report = ((finished / name).read_bytes() for name in ("metrics.json", "report.md"))
    monkeypatch.setattr(evaluate, "assess", None)
    assert cli.run(run.main, [f"--gin_file={tiny_gin}", f"--workdir={finished}", "--seeds=0,1"]) == 0
    assert (finished / "seed0" / "metrics.jsonl").read_bytes() == curve
    assert (finished / "metrics.json").read_bytes() == metrics
    assert but_for_training((finished / "report.md").read_bytes()) == but_for_training(report)
    shown = capsys.readouterr().out
    assert "1. " in shown and "3. " in shown and str(finished / "report.md") in shown


def but_for_training(report: bytes) -> list[str]:
    """Lines without what training took."""
    return [re.sub(r"done before|[\d.]+ min", "", line) for line in report.decode().splitlines()]


def test_another_evaluation_is_taken_again(finished: Path, tiny_gin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(evaluate, "assess", lambda *args: taken.append(args) or assess(*args))
    words = [f"--gin_file={tiny_gin}", f"--workdir={finished}", "--seeds=0"]
    assert cli.run(run.main, [*words, "--gin.evaluation.Evaluation.bootstrap_samples=20"]) == 0
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds=0,0", "quickstart"], "--seeds"),
        (["--seeds=x", "quickstart"], "--seeds"),
        (["quickstart", "--gin.SEED=3"], "--seeds"),
        ([], "which recipe"),
        (["quickstar"], "quickstart"),
        (["scaling_law", "--seeds=0,1"], "seeds of its own"),
        (["scaling_law", "--gin.TRAIN_STEPS=3"], "set for every cell"),
    ],
)
def test_a_command_that_cannot_be_run_says_why(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(run.main, words) == 2
    assert message in capsys.readouterr().err


def test_a_mistake_in_the_last_stage_is_told_before_the_first_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sixth arm has no such model."""
    words = ["search_and_rec", f"--workdir={tmp_path / 'run'}", "--gin.sequence.Sequence.max_length=50"]
    assert cli.run(run.main, words) == 2
    assert "sequence.Sequence.max_length" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_prompts_too_long_for_the_last_stage_are_told_before_the_first_is_trained(
    tiny_gin: Path, tmp_path: Path
) -> None:
    last = tmp_path / "2_last.gin"
    last.write_text(
        "from __gin__ import dynamic_registration\nfrom recjax.data import pipeline\n"
        "include 'configs/recipe/brew360/5_instruct.gin'\ninclude 'configs/run/tiny_text.gin'\n"
        "pipeline.Feed.row_length = 32\npipeline.Feed.history_length = 32\n"
    )
    with pytest.raises(ConfigError, match="would be cut"):
        run.run([tiny_gin, last], Flags(), tmp_path / "run", seeds=[0], cache=None, words=[])
    assert not (tmp_path / "run").exists()


def test_a_stage_is_given_the_data_it_takes(tmp_path: Path) -> None:
    """Of a system that is trained on one log and used on another; where there is one log, a mistake stays one."""
    first, second = tmp_path / "1_first.gin", tmp_path / "2_second.gin"
    first.write_text("SOURCE_DIR = ''\nDATA_DIR = %SOURCE_DIR\n")
    second.write_text("DATA_DIR = ''\n")
    given = Flags(bindings=("SOURCE_DIR='/a'", "DATA_DIR='/b'", "TRAIN_STEPS=3"))
    assert stages.bindings_for(first, [first, second], given) == ["SOURCE_DIR='/a'", "TRAIN_STEPS=3"]
    assert stages.bindings_for(second, [first, second], given) == ["DATA_DIR='/b'", "TRAIN_STEPS=3"]
    assert stages.bindings_for(second, [second], given) == list(given.bindings)


def test_a_gin_file_beside_a_name_varies_every_stage(tmp_path: Path) -> None:
    extra = tmp_path / "wide.gin"
    module = "from __gin__ import dynamic_registration\nfrom recjax.nn import transformer\n"
    extra.write_text(module + "WIDTH = 48\ntransformer.TransformerConfig.width = %WIDTH\n")
    files = recipe_files("hstu")
    for binding, width in ((), 48), (("WIDTH=56",), 56):
        flags = Flags(gin_files=(str(extra),), bindings=binding)
        texts = [stages.recipe_of_stage(file, files, flags, tmp_path, 0)[1].config for file in files]
        assert all(f"WIDTH = {width}\n" in text and "width = %WIDTH\n" in text for text in texts)
        assert len(set(texts)) == len(files) == 2


def test_what_a_further_file_sets_for_other_stages_is_not_a_mistake(tmp_path: Path) -> None:
    extra = tmp_path / "queries.gin"
    extra.write_text("RANKED = []\n")
    files = recipe_files("brew360")
    flags = Flags(gin_files=(str(extra),))
    stages.recipe_of_stage(files[0], files, flags, tmp_path, 0)
    extra.write_text("RANKD = []\n")
    with pytest.raises(ConfigError, match="RANKD is set but nothing uses it"):
        stages.recipe_of_stage(files[0], files, flags, tmp_path, 0)


@pytest.mark.parametrize(
    ("recipe", "further"),
    [
        ("hstu", "hstu/short"),
        ("hstu_target_time", "hstu/short"),
        ("dllm2rec", "dllm2rec/gru4rec"),
        ("brew360", "brew360/queries"),
    ],
)
def test_the_variants_that_are_shipped_can_be_built(recipe: str, further: str, tmp_path: Path) -> None:
    files = recipe_files(recipe)
    flags = Flags(gin_files=(f"configs/recipe/{further}.gin",))
    for file in files:
        stages.recipe_of_stage(file, files, flags, tmp_path, 0)
