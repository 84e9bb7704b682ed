"""Heads of numbers from the log to the metrics: what a user goes on to do, beside clicks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from recjax.core.module import Functional, Module, Rngs, param
from recjax.data.ahead import Ahead
from recjax.data.examples import Examples
from recjax.data.fields import Categorical
from recjax.data.rated_world import RatedWorld
from recjax.data.rows_feed import RowReader
from recjax.data.sources import DataDir
from recjax.ranker_evaluation import RankerEvaluation, RankerEvaluator
from recjax.tasks.cache import place_of
from recjax.tasks.impressions import Impressions

TASK = Impressions(
    data=DataDir(simulate=RatedWorld(rows=1200, users=25, items=20)),
    fields=(Categorical(columns=("user_id", "item_id")),),
    labels={"click": "click"},
    ahead=(Ahead(seconds=7200),),
    negatives=1,
    keep_negatives=0.5,
    split="user_time",
)


class Additive(Module):
    """A weight for each row of the table, summed, for both heads."""

    def __init__(self, *, rows: int, rngs: Rngs) -> None:
        self.table = param(rngs, (rows, 1), ("items", None), jax.nn.initializers.normal(1.0))

    def __call__(self, batch: Any, *, train: bool, key: Any) -> dict[str, jax.Array]:
        weight = self.table[...][:, 0]
        z = weight[batch["field/user_id"]] + weight[batch["field/item_id"]]
        return {"logit/click": z, "logit/value": z}


@pytest.fixture(scope="module")
def examples(prepare_here: Callable[..., None]) -> Examples:
    prepare_here(TASK)
    return Examples.open(place_of(TASK).path)


def test_values_are_labels_and_judged_as_numbers(examples: Examples) -> None:
    heads = examples.manifest["heads"]
    assert heads["value"]["kind"] == "value" and "kind" not in heads["click"]
    reader = RowReader(examples, "test")
    value = reader.column("labels")[:, reader.heads.index("value")]
    known = value >= 0
    assert value.max() > 5 and 0.2 < known.mean() < 1

    model = Functional(lambda rngs: Additive(rows=examples.manifest["table_rows"], rngs=rngs))
    params = model.init(jax.random.key(0))
    config = RankerEvaluation(batch_size=64, bootstrap_samples=50)
    evaluator = RankerEvaluator(examples, split="test", config=config, model=model)
    said = evaluator.scores(params)
    np.testing.assert_allclose(said["value"] + np.log(0.5), said["click"], rtol=1e-9)  # only clicks were left out
    result = evaluator.assess(params, {})
    found = result.systems["model"].values
    predicted, told = np.maximum(np.expm1(said["value"][known]), 0), value[known]
    want = np.sqrt(np.mean((np.log1p(predicted) - np.log1p(told)) ** 2))
    assert np.isclose(found["value/rmse"], want) and "value/auc" not in found and "click/auc" in found
    assert np.isclose(found["value/calibration"], predicted.sum() / told.sum())
    train = RowReader(examples, "train")
    trained = train.column("labels")[:, train.heads.index("value")]
    mean = np.log1p(trained[trained >= 0]).mean()
    rate = result.systems["rate"].values["value/rmse"]
    assert np.isclose(rate, np.sqrt(np.mean((mean - np.log1p(told)) ** 2)))
