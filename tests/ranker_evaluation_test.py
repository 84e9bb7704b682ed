"""A ranker judged: exact whatever the batches and devices, beside rates of training, corrected for left-out rows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError, TrainingError
from recjax.core.module import Functional, Module, Rngs, param
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.data.examples import Examples
from recjax.data.fields import Categorical, Numeric
from recjax.data.label_store import LabelStore
from recjax.data.rated_world import RatedWorld
from recjax.data.rows_feed import RowReader
from recjax.data.sources import DataDir
from recjax.infer import infer
from recjax.metrics.auc import auc, grouped_auc
from recjax.ranker_evaluation import RankerEvaluation, RankerEvaluator
from recjax.result_files import compare, save
from recjax.tasks.cache import place_of
from recjax.tasks.impressions import Impressions

TASK = Impressions(
    data=DataDir(simulate=RatedWorld(rows=1200, users=25, items=20)),
    fields=(Categorical(columns=("user_id", "item_id")), Numeric(columns=("price",))),
    labels={"click": "click", "like": "rating >= 4"},
    domain="domain",
)


class Additive(Module):
    """A weight for each row of the table, summed; the second head is the first, turned round."""

    def __init__(self, *, rows: int, rngs: Rngs) -> None:
        self.table = param(rngs, (rows, 1), ("items", None), jax.nn.initializers.normal(1.0))

    def __call__(self, batch: Any, *, train: bool, key: Any) -> dict[str, jax.Array]:
        weight = self.table[...][:, 0]
        z = weight[batch["field/user_id"]] + weight[batch["field/item_id"]] + 0.1 * batch["field/price"]
        return {"logit/click": z, "logit/like": -z}


def prepared(prepare_here: Callable[..., None], **settings: Any) -> Examples:
    task = dataclasses.replace(TASK, **settings)
    prepare_here(task)
    return Examples.open(place_of(task).path)


@pytest.fixture(scope="module")
def examples(prepare_here: Callable[..., None]) -> Examples:
    return prepared(prepare_here)


def model_of(examples: Examples) -> Functional:
    return Functional(lambda rngs: Additive(rows=examples.manifest["table_rows"], rngs=rngs))


def evaluator_of(examples: Examples, split: str = "test", mesh: Any = None, **settings: Any) -> RankerEvaluator:
    told = {"batch_size": 64, "bootstrap_samples": 200, **settings}
    return RankerEvaluator(examples, split=split, config=RankerEvaluation(**told), model=model_of(examples), mesh=mesh)


@pytest.fixture(scope="module")
def params(examples: Examples) -> Any:
    return model_of(examples).init(jax.random.key(0))


def plain_logits(examples: Examples, params: Any, split: str = "test") -> np.ndarray:
    reader = RowReader(examples, split)
    out = model_of(examples).apply(params, reader.read(np.arange(len(reader))), train=False, key=None)
    return np.asarray(out["logit/click"], np.float64)


def test_metrics_are_those_of_all_rows(examples: Examples, params: Any) -> None:
    z, reader = plain_logits(examples, params), RowReader(examples, "test")
    label, user = reader.column("labels"), reader.column("user_index")
    found = evaluator_of(examples)(params).values
    for prefix, head, logit in (("", 0, z), ("click/", 0, z), ("like/", 1, -z)):
        positive, p = label[:, head] > 0, 1 / (1 + np.exp(-logit))
        loss = -np.where(positive, np.log(p), np.log(1 - p)).mean()
        rate = positive.mean()
        wanted = {
            "auc": auc(logit, positive),
            "grouped_auc": grouped_auc(logit, positive, user, int(user.max()) + 1),
            "log_loss": loss,
            "normalised_entropy": loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)),
            "calibration": p.sum() / positive.sum(),
        }
        domain = reader.column("domain")
        each = [auc(logit[domain == d], positive[domain == d]) for d in range(3)]
        wanted |= {"weighted_auc": np.average(each, weights=np.bincount(domain)), "domain_auc": np.mean(each)}
        for name, value in wanted.items():
            assert np.isclose(found[prefix + name], value, rtol=1e-6), prefix + name


def test_neither_batches_nor_devices_matter(examples: Examples, params: Any) -> None:
    whole = evaluator_of(examples).scores(params)
    mesh = make_mesh(MeshConfig(shape="data=8"))
    for other in (evaluator_of(examples, batch_size=7), evaluator_of(examples, batch_size=9999)):
        np.testing.assert_array_equal(other.scores(params)["click"], whole["click"])
    on_mesh = evaluator_of(examples, mesh=mesh, batch_size=50).scores(params)
    np.testing.assert_allclose(on_mesh["like"], whole["like"], rtol=1e-6)


def test_baselines_are_rates_of_training(examples: Examples, params: Any) -> None:
    result = evaluator_of(examples, prior=5.0).assess(params, {"recipe": "x"})
    assert list(result.systems) == ["model", "rate", "item_rate", "user_rate"]
    train, test = RowReader(examples, "train"), RowReader(examples, "test")
    label = train.column("labels")[:, 0]
    overall = (label.sum() + 0.5) / (len(label) + 1)
    rates = result.systems["rate"].values
    assert rates["auc"] == 0.5 and np.isclose(rates["calibration"], overall / test.column("labels")[:, 0].mean())
    item = [
        (label[train.column("items") == i].sum() + 5 * overall) / ((train.column("items") == i).sum() + 5)
        for i in test.column("items")
    ]
    assert np.isclose(result.systems["item_rate"].values["auc"], auc(np.array(item), test.column("labels")[:, 0] > 0))


def test_a_result_is_saved_and_compared(examples: Examples, params: Any, tmp_path: Path) -> None:
    ours = evaluator_of(examples).assess(params, {})
    theirs = evaluator_of(examples).assess(jax.tree.map(jnp.negative, params), {})
    save(ours, tmp_path / "ours")
    save(theirs, tmp_path / "theirs")
    found = compare(tmp_path / "ours", tmp_path / "theirs", samples=100)
    z, label = plain_logits(examples, params), RowReader(examples, "test").column("labels")[:, 0] > 0
    assert np.isclose(found.difference["auc"].mean, auc(z, label) - found.theirs["auc"], atol=1e-6)
    metrics = ours.metrics()
    assert metrics["protocol"]["metrics"][0] == "auc" and metrics["protocol"]["rows"] == len(label)
    tasks = metrics["hard"]
    assert list(tasks) == ["domains", "known_users", "known_items", "periods", "tenths"]
    reader = RowReader(examples, "test")
    mine = reader.column("domain") == 1
    group = tasks["domains"]["groups"][f"site1: click ({mine.sum()} rows)"]["rows"]["model"]
    assert np.isclose(group["auc"], auc(z[mine], label[mine]))
    sizes = {task: [rows_in(name) for name in found["groups"] if "like" not in name] for task, found in tasks.items()}
    assert all(sum(found) == len(label) for found in sizes.values())
    tenths = [group["rows"]["model"] for group in tasks["tenths"]["groups"].values()]
    happened = sum(n * tenth["happened"] for n, tenth in zip(sizes["tenths"], tenths, strict=True))
    assert np.isclose(happened, label.sum())
    assert [tenth["said"] for tenth in tenths] == sorted(tenth["said"] for tenth in tenths)


def rows_in(group: str) -> int:
    """How many rows the name of a group says it has."""
    return int(group.rpartition("(")[2].removesuffix(" rows)").replace(",", ""))


def test_predictions_are_corrected_for_negatives_left_out(prepare_here: Callable[..., None]) -> None:
    examples = prepared(prepare_here, keep_negatives=0.25)
    evaluator = evaluator_of(examples)
    params = model_of(examples).init(jax.random.key(0))
    whole, raw = evaluator.scores(params)["click"], evaluator.scores(params, correct=False)["click"]
    np.testing.assert_allclose(whole - raw, np.log(0.25), rtol=1e-12)
    rate = evaluator.assess(params, {}).systems["rate"].values["calibration"]
    assert 0.7 < rate < 1.4  # without the correction it would be near two


def test_a_positive_is_ranked_among_those_drawn_for_it(prepare_here: Callable[..., None]) -> None:
    sparse = DataDir(simulate=RatedWorld(rows=300, users=40, items=60))
    examples = prepared(prepare_here, data=sparse, negatives=7)
    params, reader = model_of(examples).init(jax.random.key(0)), RowReader(examples, "test")
    z, label, request = plain_logits(examples, params), reader.column("labels")[:, 0], reader.column("request")
    found = []
    for number in np.unique(request[label > 0]):
        mine = request == number
        assert mine.sum() == 8 and label[mine].sum() == 1
        found.append(1 / (1 + (z[mine] > z[mine & (label > 0)]).sum()))
    values = evaluator_of(examples)(params).values
    assert np.isclose(values["request_mrr"], np.mean(found), atol=1e-6)
    assert "request_mrr" not in evaluator_of(prepared(prepare_here))(params).values


def test_rows_are_told_apart_by_the_characters_of_a_text(prepare_here: Callable[..., None]) -> None:
    examples = prepared(prepare_here, lengths="device", labels={"click": "click"})  # phone, tablet, desktop, tv
    params, reader = model_of(examples).init(jax.random.key(0)), RowReader(examples, "test")
    length, label = reader.column("length"), reader.column("labels")[:, 0]
    assert set(length.tolist()) == {2, 5, 6, 7}
    groups = evaluator_of(examples, lengths=(3, 6)).assess(params, {}).hard["lengths"].groups
    assert [name.rpartition(" (")[0] for name in groups] == [
        "1 to 3 characters",
        "4 to 6 characters",
        "above 6 characters",
    ]
    z = plain_logits(examples, params)
    for group, mine in zip(groups.values(), (length == 2, (length == 5) | (length == 6), length == 7), strict=True):
        assert np.isclose(group.values["model"]["auc"].mean(), auc(z[mine], label[mine] > 0), atol=1e-6)
    assert "lengths" not in evaluator_of(prepared(prepare_here)).assess(params, {}).hard


def test_the_head_that_runs_are_compared_by_can_be_chosen(examples: Examples, params: Any) -> None:
    found = evaluator_of(examples, head="like")(params).values
    assert found["auc"] == found["like/auc"] != found["click/auc"]
    with pytest.raises(ConfigError, match="no head 'buy'"):
        evaluator_of(examples, head="buy")


def test_rows_of_any_split_can_be_scored(examples: Examples, params: Any) -> None:
    found = evaluator_of(examples).scores(params, split="train")["click"]
    np.testing.assert_allclose(found, plain_logits(examples, params, "train"), rtol=1e-6)


def test_a_teacher_labels_every_training_row(examples: Examples, params: Any, tmp_path: Path) -> None:
    out = infer(model_of(examples), params, examples, kind="row_labels", out=tmp_path / "said", history_length=1)
    said = LabelStore(path=str(out)).read(examples).values
    np.testing.assert_allclose(said["click"], plain_logits(examples, params, "train"), rtol=1e-3)
    np.testing.assert_array_equal(said["like"], -said["click"])


def test_a_sample_of_rows_is_fixed(examples: Examples, params: Any) -> None:
    one, other = (evaluator_of(examples, max_rows=50) for _ in range(2))
    assert len(one.reader) == 50
    np.testing.assert_array_equal(one.scores(params)["click"], other.scores(params)["click"])
    assert np.isin(one.scores(params)["click"], evaluator_of(examples).scores(params)["click"]).all()


def test_what_is_no_number_stops_the_evaluation(examples: Examples, params: Any) -> None:
    with pytest.raises(TrainingError, match="not a number"):
        evaluator_of(examples)(jax.tree.map(lambda x: x * jnp.nan, params))


@pytest.mark.parametrize(
    "settings", [{"known": (5, 1)}, {"baselines": ("best",)}, {"main": "recall@50"}, {"batch_size": 0}, {"prior": 0.0}]
)
def test_settings_that_judge_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RankerEvaluation(**settings)
