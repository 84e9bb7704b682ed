"""The evaluate verb: a checkpoint beside the baselines, two runs against each other, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from recjax import cli, command, evaluate
from recjax.core.checkpoint import Checkpointer
from recjax.core.flags import Flags
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly


@pytest.fixture(scope="module")
def runs(tiny_gin, tmp_path_factory):
    """The workdirs of two runs of different seeds, each with two checkpoints of which the first is the better."""
    folders = []
    for seed in (0, 1):
        recipe, snapshot = command.load(Flags(gin_files=(str(tiny_gin),), bindings=(f"SEED={seed}",)))
        assembly = Assembly(recipe, ensure_prepared(recipe.mixture))
        workdir = tmp_path_factory.mktemp("runs") / f"seed{seed}"
        facts = {"recipe": recipe.name, "vocabulary": assembly.vocab.hash}
        with Checkpointer(workdir / "checkpoints", recipe.checkpoints, **facts) as checkpoints:
            state = assembly.init_state()
            for step, value in ((0, 0.2), (5, 0.1)):
                now = dataclasses.replace(state, step=np.int32(step))
                checkpoints.save(now, metrics={recipe.checkpoints.metric: value})
        (workdir / command.CONFIG).write_text(snapshot.config)
        folders.append(workdir)
    return folders


def test_a_checkpoint_stands_beside_the_baselines(runs, capsys):
    assert cli.run(evaluate.main, [f"--workdir={runs[0]}"]) == 0
    shown = capsys.readouterr().out
    metrics = json.loads((runs[0] / "test" / "metrics.json").read_text())
    assert list(metrics["rows"]) == ["model", "popularity", "item_graph", "item_knn"]
    protocol = metrics["protocol"]
    assert protocol["simulated"] and protocol["split"] == "test" and not protocol["target_time_used"]
    assert protocol["checkpoint_step"] == 0 and protocol["seeds"] == {"recipe": 0, "evaluation": 0}
    for words in ("item_graph", "model - popularity", "simulated data", "popular targets (head)", "recall@10"):
        assert words in shown
    words = [f"--workdir={runs[0]}", "--split=valid", "--checkpoint=5", "--gin.evaluation.Evaluation.baselines=()"]
    assert cli.run(evaluate.main, words) == 0
    metrics = json.loads((runs[0] / "valid" / "metrics.json").read_text())
    assert list(metrics["rows"]) == ["model"]
    assert metrics["protocol"]["checkpoint_step"] == 5 and metrics["protocol"]["split"] == "valid"


def test_two_runs_are_compared(runs, capsys):
    for run in runs:
        assert cli.run(evaluate.main, [f"--workdir={run}", "--gin.evaluation.Evaluation.baselines=()"]) == 0
    capsys.readouterr()
    assert cli.run(evaluate.main, ["--compare", *map(str, runs)]) == 0
    shown = capsys.readouterr().out
    for words in ("seed0", "seed1", "paired bootstrap", "ndcg@10", "95% interval"):
        assert words in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no recipe is given"),
        (["sasrec"], "whose checkpoint is to be evaluated?"),
        (["--workdir=RUN", "--split=train"], "invalid choice: 'train'"),
        (["--workdir=RUN", "--checkpoint=7"], "there is no checkpoint 7"),
        (["--workdir=RUN", "--gin.evaluation.Evaluation.seen='hidden'"], "Evaluation.seen = 'hidden'"),
        (["--compare", "RUN", "RUN/nothing"], "there is no evaluation here"),
    ],
)
def test_mistakes_are_one_message(runs, capsys, words, message):
    assert cli.run(evaluate.main, [word.replace("RUN", str(runs[1])) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
