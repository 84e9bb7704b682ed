"""From data to answers over prompts: a language model trained on two kinds of task, evaluated, exported and asked."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from recjax.core.adapters import Adapters
from recjax.core.checkpoint import restore_params
from recjax.core.errors import ConfigError, UnservableError
from recjax.core.optim import Optimizer
from recjax.core.sharding import MeshConfig
from recjax.core.warm_start import WarmStart
from recjax.data.pipeline import Feed
from recjax.data.ranking_records import RankingRecords
from recjax.data.sources import DataDir, World
from recjax.evaluate import evaluate_run
from recjax.export import export_run
from recjax.export_score import export_score_run
from recjax.label_evaluation import LabelEvaluation, LabelEvaluator
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.prepare import ensure_prepared
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.prompts.writer import Budget
from recjax.recipe import Assembly, Recipe
from recjax.result_files import METRICS, PER_USER
from recjax.serve.score_bundle import ScoreBundle
from recjax.tasks.documents import Documents
from recjax.tasks.mixtures import Mixture
from recjax.tasks.prompted import Periods, Told, Wording
from recjax.tasks.prompted_ranking import Rated
from recjax.train import train
from recjax.trained import load

ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def recipe(prepare_here: Callable[..., None]) -> Recipe:
    told = Told(
        data=DataDir(simulate=World(num_events=1500, ratings=True)),
        wording=Wording(tokenizer=TokenizerConfig(size=600)),
        periods=Periods(by="last", held_out=2),
    )
    tasks = [
        Rated(told=told, budget=Budget(length=192), history=4, per_user=1, candidates=2),
        Documents(told=told, sources=("items",), held_out=0.1),
    ]
    for task in tasks:
        prepare_here(task)
    encoder = TransformerConfig(num_layers=1, width=16, num_heads=2, position="rotary", norm="rms", bias=False)
    return Recipe(
        name="brew",
        mixture=Mixture(tasks=tasks),
        feed=Feed(batch_size=8, row_length=192, history_length=192),
        model=functools.partial(Sequence, encoder=encoder),
        objectives=[CatalogueSoftmax()],
        evaluation=LabelEvaluation(slots=2048, max_users=12, bootstrap_samples=20),
        mesh=MeshConfig(shape="data=-1"),
        train_steps=2,
        log_every=1,
    )


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    train(recipe, workdir, devices=ONE)
    return workdir


def test_each_task_is_judged_in_its_own_way(recipe: Recipe, finished: Path) -> None:
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for record in logged for name, value in record.items()}
    assert {"valid/auc", "valid/nll", "valid/like/log_loss", "valid/documents/nll"} <= set(last)
    found = evaluate_run(recipe, finished)
    assert list(found["like"].systems) == ["model", "calibrated", "prior"]
    assert list(found["documents"].systems) == ["model", "unigram"]
    # two steps from nothing: about the logarithm of the vocabulary
    assert 5 < found["documents"].systems["model"].values["nll"] < 8
    told = json.loads((finished / "test" / "like" / METRICS).read_text())
    assert told["protocol"]["calibration"]["fitted_on"] == "valid" and told["hard"]["history"]["groups"]
    assert (finished / "test" / "like" / PER_USER).is_file()


def test_a_bundle_answers_as_the_evaluation_scores(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    run = load(recipe, finished)
    path = export_score_run(
        run.assembly, run.params, tmp_path / "bundle", widths=(192,), platforms=("cpu",), name="brew"
    )
    bundle = ScoreBundle(path)
    judge = judge_of(run.assembly)
    records: RankingRecords = judge.records("test")
    want = judge.scores(run.params).logits
    columns = bundle.task().label_columns
    for record in range(3):
        prefix = records.tokens[records.prefix[record] : records.prefix[record + 1]]
        mine = range(records.first[record], records.first[record + 1])
        suffixes = [records.suffix_tokens[records.suffix[c] : records.suffix[c + 1]] for c in mine]
        np.testing.assert_allclose(bundle.logits(prefix, suffixes)[:, columns], want[mine], rtol=1e-4, atol=1e-4)
    told = bundle.manifest["tasks"][0]
    assert (told["name"], told["label_words"], told["tells_history"]) == ("like", ["No", "Yes"], True)
    assert np.isfinite([told["temperature"], *told["bias"]]).all()


def test_what_adapters_learnt_is_in_what_is_served(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    adapted = dataclasses.replace(
        recipe,
        adapters=Adapters(rank=2, quantised="int8", block=16),
        warm_start=WarmStart(checkpoints=str(finished / "checkpoints")),
        optimizer=Optimizer(learning_rate=0.1),
    )
    train(adapted, tmp_path / "run", devices=ONE)
    assembly = Assembly(adapted, ensure_prepared(adapted.mixture))
    params, _ = restore_params(tmp_path / "run" / "checkpoints", assembly.abstract_state().params)
    judge = judge_of(assembly)
    unmerged = judge.scores(assembly.with_facts(params)).logits
    before = load(recipe, finished)
    assert np.abs(unmerged - judge_of(before.assembly).scores(before.params).logits).max() > 1e-2
    run = load(adapted, tmp_path / "run")
    path = export_score_run(run.assembly, run.params, tmp_path / "bundle", widths=(192,), platforms=("cpu",), name="a")
    records, bundle = judge.records("test"), ScoreBundle(path)
    mine = range(records.first[0], records.first[1])
    suffixes = [records.suffix_tokens[records.suffix[c] : records.suffix[c + 1]] for c in mine]
    found = bundle.logits(records.tokens[: records.prefix[1]], suffixes)[:, bundle.task().label_columns]
    np.testing.assert_allclose(found, unmerged[mine], rtol=1e-4, atol=1e-4)


def judge_of(assembly: Assembly) -> LabelEvaluator:
    """What judges the test split of the first task."""
    judge = assembly.evaluator("test")
    assert isinstance(judge, LabelEvaluator)
    return judge


def test_a_recipe_without_questions_has_no_bundle(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    run = load(recipe, finished)
    run.assembly.evaluated[:] = run.assembly.evaluated[1:]
    with pytest.raises(UnservableError, match="asks about candidates"):
        export_run(run, tmp_path / "none")


def test_a_metric_that_no_task_has_stops_the_run(recipe: Recipe, tmp_path: Path) -> None:
    text = Mixture(tasks=recipe.mixture.tasks[1:])
    with pytest.raises(ConfigError, match="judged by auc"):
        train(dataclasses.replace(recipe, mixture=text), tmp_path, devices=ONE)
