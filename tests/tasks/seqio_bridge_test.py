"""Tasks as seqio sees them."""

import dataclasses
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ExamplesError
from recjax.data.record import Column
from recjax.data.sources import DataDir, World
from recjax.data.tables import Tables
from recjax.tasks import seqio_bridge
from recjax.tasks.mixtures import Mixture
from recjax.tasks.next_item import NextItem
from recjax.tasks.search import Search
from recjax.tasks.work import Work, columns_of, examples_of


def random_work(seed: int, *, users: int = 60, events: int = 900, **settings: Any) -> Work:
    rng = np.random.default_rng(seed)
    log = pl.DataFrame(
        {
            "user_id": rng.integers(0, users, events),
            "item_id": np.minimum(rng.zipf(1.3, events), 80),
            "timestamp": rng.integers(0, 300, events),
        }
    ).sort(["user_id", "timestamp"], maintain_order=True)
    log = log.with_columns(order=pl.int_range(pl.len()).over("user_id"))
    return NextItem(**settings).work_on(
        Tables(interactions=log, items=pl.DataFrame({"item_id": list(range(0, 80, 3))}))
    )


def joined(parts: list[dict[str, Column]]) -> dict[str, np.ndarray]:
    """Values and lengths of all parts, one after the other."""
    found = {}
    for name in parts[0]:
        found[name] = np.concatenate([p[name].values for p in parts])
        if parts[0][name].offsets is not None:
            found[name + " lengths"] = np.concatenate([np.diff(p[name].offsets) for p in parts])
    return found


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"split": "global_time"},
        {"catalogue": "items"},
        {"split": "global_time", "min_events": 12},
        {"split": "leave_last", "held_out": 5},
    ],
)
def test_seqio_and_numpy_give_the_same_examples(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seqio_bridge, "_AT_ONCE", 16)
    for seed in range(2):
        work = random_work(seed, **settings)
        task = seqio_bridge.seqio_task(work)
        for split, schema in work.schemas.items():
            found = joined(list(seqio_bridge.materialise(task, split)))
            expected = joined([columns_of(list(examples_of(work, split)), schema)])
            assert set(found) == set(expected)
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name])
                assert found[name].dtype == expected[name].dtype or name.endswith("lengths")


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "settings",
    [{"prompt": "search: "}, {"split": "query", "per_item": 2}, {"test_fraction": 0.0}],
)
def test_seqio_spells_queries_as_sentencepiece_alone_does(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seqio_bridge, "_AT_ONCE", 16)
    tables = World(num_events=2000).tables()
    assert tables.queries is not None
    odd = pl.col("text") + pl.Series(["", "  twice  ", " Ünknown 字", " <extra_id_0>", " CASE"]).gather(
        np.arange(tables.queries.height) % 5
    )
    work = Search(**settings).work_on(dataclasses.replace(tables, queries=tables.queries.with_columns(text=odd)))
    task = seqio_bridge.seqio_task(work)
    assert work.text is not None and task.output_features["text"].vocabulary.vocab_size == work.text.size
    for split, schema in work.schemas.items():
        expected = list(examples_of(work, split))
        assert expected or settings.get("test_fraction") == 0.0
        parts = list(seqio_bridge.materialise(task, split))
        assert bool(parts) == bool(expected)
        if parts:
            found, wanted = joined(parts), joined([columns_of(expected, schema)])
            assert set(found) == set(wanted)
            for name in wanted:
                np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.tensorflow
def test_batches_of_equal_lengths_are_read_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seqio_bridge, "_AT_ONCE", 1)
    work = random_work(0, users=5, events=40)
    found = joined(list(seqio_bridge.materialise(seqio_bridge.seqio_task(work), "train")))
    expected = joined([columns_of(list(examples_of(work, "train")), work.schemas["train"])])
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.tensorflow
def test_a_seqio_user_can_take_the_mixture() -> None:
    import seqio

    tasks = tuple(
        NextItem(name=name, data=DataDir(simulate=World(num_events=2000, seed=seed)))
        for name, seed in (("a", 0), ("b", 1))
    )
    mixture = seqio_bridge.seqio_mixture(Mixture(tasks=tasks, rates=(3.0, 1.0)))
    assert isinstance(mixture, seqio.Mixture)
    assert [t.name for t in mixture.tasks] == ["a", "b"]
    assert [mixture.get_rate(t) for t in mixture.tasks] == [3.0, 1.0]
    assert not {"a", "b", "mixture"} & {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    dataset = mixture.get_dataset({"items": 6}, split="train", shuffle=True, seed=0, num_epochs=None)
    for example in dataset.take(5).as_numpy_iterator():
        assert 2 <= len(example["items"]) <= 6 and example["items"].dtype == np.int32
    test = seqio.get_dataset(
        mixture.tasks[0], {"items": 8}, seqio.PassThroughFeatureConverter(), dataset_split="test", shuffle=False
    )
    heated = seqio_bridge.seqio_mixture(Mixture(tasks=tasks, temperature=2.0))
    sizes = [task.work().facts["counts"]["train"]["examples"] for task in tasks]
    assert heated.get_rate(heated.tasks[0]) / heated.get_rate(heated.tasks[1]) == pytest.approx(
        (sizes[0] / sizes[1]) ** 0.5
    )
    expected = list(examples_of(tasks[0].work(), "test"))
    found = list(test.as_numpy_iterator())
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one["label"], one["user_index"]) == (other["label"], other["user_index"])
        np.testing.assert_array_equal(one["items"], other["items"][:8])


def test_without_tensorflow_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seqio_bridge, "_NEEDED", ("tensorflow_that_is_not_there", "numpy"))
    with pytest.raises(ExamplesError, match="tensorflow_that_is_not_there not installed(.|\n)*RECJAX_CACHE"):
        seqio_bridge.check_available()
