"""Label logits judged as brute force would, calibrated on the validation split alone, and compared between runs."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest

from recjax.arms import Arm, arms_table, compare_arms, groups
from recjax.core.errors import ConfigError, ExamplesError
from recjax.core.module import Functional
from recjax.data.examples import Examples, write_examples
from recjax.data.record import Column, Field
from recjax.data.vocab import ItemVocab
from recjax.label_evaluation import LabelEvaluation, LabelEvaluator
from recjax.label_metrics import bucket_names
from recjax.metrics.calibration import fit_calibration, probabilities
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.report import Report, write_report
from recjax.result_files import compare, save
from recjax.tables import buckets_table, differences_table, hard_tables, systems_table

PIECES, V = 90, 128
SCHEMA = (
    Field(name="user_index", dtype="int64", rank=0),
    *(Field(name=n, dtype="int32", rank=1) for n in ("items", "suffixes", "suffix_lengths", "labels")),
    *(Field(name=n, dtype="int32", rank=0) for n in ("history_events", "total_events")),
)


def column(values: list[np.ndarray]) -> Column:
    bounds = np.concatenate([[0], np.cumsum([len(v) for v in values])]).astype(np.int64)
    return Column(np.concatenate([np.zeros(0, np.int32), *values]).astype(np.int32), bounds)


def draw(seed: int, *, records: int = 40, classes: int = 2, prompt: int = 7) -> dict[str, Column]:
    """Records of which two of three are of a user with one more; candidates of one length, so that shapes are few."""
    rng = np.random.default_rng(seed)
    return {
        "user_index": Column(np.arange(records, dtype=np.int64) * 2 // 3),
        "items": column([rng.integers(2, PIECES, prompt) for _ in range(records)]),
        "suffixes": column([np.random.default_rng(i).integers(2, PIECES, 8) for i in range(records)]),
        "suffix_lengths": column([np.full(4, 2)] * records),
        "labels": column([rng.integers(0, classes, 4) for _ in range(records)]),
        "history_events": Column(rng.integers(0, 5, records).astype(np.int32)),
        "total_events": Column(rng.integers(0, 200, records).astype(np.int32)),
    }


def folder(path: Path, *, valid: dict, test: dict, classes: int = 2) -> Examples:
    vocab = ItemVocab(tuple(f"t{i}" for i in range(PIECES)))
    frame = pl.DataFrame(
        {"row": np.arange(2, PIECES + 2), "item_id": list(vocab.ids), "train_count": np.arange(PIECES)}
    )
    users = pl.DataFrame({"user_index": np.arange(200), "user_id": np.arange(200)})
    rows = list(range(40, 40 + classes))
    facts = {"task": "like", "simulated": True, "content_hash": path.name, "label_rows": rows, "label_words": rows}
    with write_examples(path, vocab=vocab, items=frame, users=users, facts=facts) as writer:
        writer.add("valid", SCHEMA, valid)
        writer.add("test", SCHEMA, test)
    return Examples.open(path)


@cache
def model_of() -> tuple[Functional, dict]:
    encoder = TransformerConfig(num_layers=1, width=16, num_heads=2, position="rotary", norm="rms", bias=False)
    model = Functional(partial(Sequence, num_rows=V, encoder=encoder))
    return model, jax.tree.map(lambda x: x * 4, jax.jit(model.init)(jax.random.key(0)))


def evaluator(examples: Examples, split: str = "test", **more) -> LabelEvaluator:
    config = LabelEvaluation(bootstrap_samples=60, slots=4096, **more)
    return LabelEvaluator(examples, split=split, config=config, model=model_of()[0], row_length=16)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return folder(tmp_path_factory.mktemp("labels") / "one", valid=draw(0), test=draw(1))


def brute_auc(score: np.ndarray, positive: np.ndarray) -> float:
    return float(np.mean([(p > n) + (p == n) / 2 for p in score[positive] for n in score[~positive]]))


def test_metrics_by_brute_force(prepared: Examples) -> None:
    judge, params = evaluator(prepared), model_of()[1]
    found, records = judge.assess(params, {}), judge.records("test")
    z, user, right = judge.scores(params).logits, records.user_index[records.record], records.label == 1
    score = z[:, 1] - z[:, 0]
    each = [(score[user == u], right[user == u]) for u in np.unique(user)]
    values = found.systems["model"].values
    np.testing.assert_allclose(values["auc"], brute_auc(score, right), rtol=1e-9)
    want = np.mean([brute_auc(s, p) for s, p in each if 0 < p.sum() < len(p)])
    np.testing.assert_allclose(values["grouped_auc"], want, rtol=1e-9)
    p = 1 / (1 + np.exp(-np.where(right, score, -score).astype(float)))
    np.testing.assert_allclose(values["log_loss"], -np.log(p).mean(), rtol=1e-6)
    np.testing.assert_allclose(values["accuracy"], ((score > 0) == right).mean())
    assert found.systems["model"].settings["tokens_per_candidate"] == (7 + 8) / 4
    told = found.metrics()
    assert told["rows"]["prior"]["auc"] == 0.5 and told["protocol"]["users"] == len(each)
    low, high = told["intervals"]["model"]["auc"]
    assert low < values["auc"] < high


def test_groups_by_history_hold_their_own_answers(prepared: Examples) -> None:
    judge, params = evaluator(prepared, history=(30, 120)), model_of()[1]
    found, records = judge.assess(params, {}), judge.records("test")
    z = judge.scores(params).logits
    events = records.total_events[records.record]
    groups = found.metrics()["hard"]["history"]["groups"]
    for name, mine in zip(
        bucket_names((30, 120)), (events <= 30, (events > 30) & (events <= 120), events > 120), strict=True
    ):
        want = brute_auc((z[:, 1] - z[:, 0])[mine], records.label[mine] == 1)
        np.testing.assert_allclose(groups[name]["rows"]["model"]["auc"], want, rtol=1e-9)
        assert groups[name]["users"] == len(np.unique(records.user_index[records.record][mine]))


def test_the_calibration_knows_the_validation_split_alone(tmp_path: Path, prepared: Examples) -> None:
    params, judge = model_of()[1], evaluator(prepared)
    found = judge.assess(params, {})
    held, scores = judge.records("valid"), judge.scores(params, "valid")
    fitted = fit_calibration(scores.logits, held.label)
    told = found.protocol["calibration"]
    assert told == {**fitted.told(), "fitted_on": "valid"}
    other_test = folder(tmp_path / "test", valid=draw(0), test={**draw(1), "labels": draw(7)["labels"]})
    assert evaluator(other_test).assess(params, {}).protocol["calibration"] == told
    other_valid = folder(tmp_path / "valid", valid={**draw(0), "labels": draw(7)["labels"]}, test=draw(1))
    assert evaluator(other_valid).assess(params, {}).protocol["calibration"] != told
    # it turns no order round, and on the split itself there is none
    assert found.systems["calibrated"].values["auc"] == pytest.approx(found.systems["model"].values["auc"])
    assert set(evaluator(prepared, "valid").assess(params, {}).systems) == {"model"}
    assert evaluator(prepared, "valid")(params).values["log_loss"] > -1


@pytest.mark.parametrize("more", [{"layout": "shared"}, {"layout": "naive"}, {"max_users": 40}])
def test_layout_and_batches_change_no_metric(prepared: Examples, more: dict) -> None:
    params = model_of()[1]
    want, got = evaluator(prepared)(params), evaluator(prepared, **more)(params)
    assert got.values == pytest.approx(want.values, abs=1e-5)
    for name, values in want.per_user(()).items():
        np.testing.assert_allclose(got.per_user(())[name], values, atol=1e-4)


def test_several_labels(tmp_path: Path) -> None:
    examples = folder(tmp_path / "stars", valid=draw(2, classes=4), test=draw(3, classes=4), classes=4)
    judge, params = evaluator(examples), model_of()[1]
    records, z = judge.records("test"), judge.scores(params).logits
    p = probabilities(z)
    want = np.mean([brute_auc(p[:, c], records.label == c) for c in range(4)])
    found = judge.assess(params, {})
    np.testing.assert_allclose(found.systems["model"].values["auc"], want, rtol=1e-9)
    assert found.systems["calibrated"].values["log_loss"] < found.systems["model"].values["log_loss"]


def test_runs_compare_on_the_same_questions_however_long_the_prompts(tmp_path: Path, prepared: Examples) -> None:
    params = model_of()[1]
    longer = folder(tmp_path / "longer", valid=draw(0, prompt=8), test={**draw(1), "items": draw(1, prompt=8)["items"]})
    results = [evaluator(e).assess(params, {"seeds": {"recipe": 0}}) for e in (prepared, longer)]
    arms = [Arm(name=n, title=n, results={0: r}) for n, r in zip(("short", "long"), results, strict=True)]
    assert len(groups(arms)) == 1
    found = compare_arms(arms, samples=50)
    difference = found["arms"]["long"]["difference"]["auc"]
    values = [r.systems["model"].values["auc"] for r in results]
    assert difference["mean"] == pytest.approx(values[1] - values[0]) and difference["low"] < difference["mean"]
    assert arms_table(found).header[1:4] == ["auc", "grouped_auc", "log_loss"]
    for name, result in zip(("a", "b"), results, strict=True):
        save(result, tmp_path / name)
    again = compare(tmp_path / "b", tmp_path / "a", samples=50)
    assert again.difference["auc"].mean == pytest.approx(difference["mean"], abs=1e-6)
    others = folder(tmp_path / "others", valid=draw(0), test=draw(9))
    asked = Arm(name="others", title="", results={0: evaluator(others).assess(params, {})})
    assert len(groups([*arms, asked])) == 2


def test_tables_and_reports_show_what_there_is(prepared: Examples, tmp_path: Path) -> None:
    metrics = evaluator(prepared).assess(model_of()[1], {}).metrics()
    assert systems_table(metrics).header[1:4] == ["auc", "grouped_auc", "log_loss"]
    assert [row[0] for row in differences_table(metrics).rows] == ["model - calibrated", "model - prior"]
    [history] = hard_tables(metrics)
    assert history.title == "history" and len(history.rows) > 1 and not buckets_table(metrics).rows
    text = write_report(tmp_path, Report(name="brew", command="recjax run brew", metrics=metrics)).read_text()
    assert "| model - prior |" in text and "grouped_auc" in text and (tmp_path / "systems.png").is_file()


def test_settings_and_splits_that_cannot_be() -> None:
    cases: list[dict[str, Any]] = [{"layout": "tiled"}, {"history": (5, 5)}, {"history": ()}, {"main": "recall@10"}]
    cases.append({"slots": 0})
    for odd in cases:
        with pytest.raises(ConfigError, match="LabelEvaluation"):
            LabelEvaluation(**odd)


def test_a_split_without_records_says_so(tmp_path: Path) -> None:
    nobody = {n: Column(c.values[:0], None if c.offsets is None else c.offsets[:1]) for n, c in draw(0).items()}
    with pytest.raises(ExamplesError, match="no records"):
        evaluator(folder(tmp_path / "empty", valid=nobody, test=draw(0)), "valid")
