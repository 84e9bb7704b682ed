from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError, ExamplesError
from recjax.data.batch import Batch, check_fields
from recjax.data.examples import Examples, write_examples
from recjax.data.heldout import seen_widths
from recjax.data.pipeline import eval_batches
from recjax.data.record import Column, Field
from recjax.data.vocab import ItemVocab

SCHEMA = [
    Field(name="user_index", dtype="int64", rank=0),
    Field(name="items", dtype="int32", rank=1),
    Field(name="times", dtype="int64", rank=1),
    Field(name="label", dtype="int32", rank=0),
    Field(name="label_time", dtype="int64", rank=0),
]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    """27 users with 1 to 150 items before the target."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.exp(rng.normal(3, 1.2, 27)).astype(int) + 1, 150)
    offsets = np.concatenate([[0], lengths.cumsum()])
    columns = {
        "user_index": Column(rng.permutation(1000)[:27]),
        "items": Column(rng.integers(2, 900, offsets[-1]).astype(np.int32), offsets),
        "times": Column(np.arange(offsets[-1]) * 7, offsets),
        "label": Column(rng.integers(2, 900, 27).astype(np.int32)),
        "label_time": Column(offsets[1:] * 7 + rng.integers(0, 9, 27)),
    }
    frame = pl.DataFrame({"row": [2], "item_id": [0], "train_count": [1]})
    path = tmp_path_factory.mktemp("prepared") / "x"
    vocab = ItemVocab.from_counts(list(range(900)), [1] * 900)
    with write_examples(path, vocab=vocab, items=frame, users=frame, facts={"content_hash": "x"}) as writer:
        writer.add("test", SCHEMA, columns)
        writer.add(
            "valid",
            SCHEMA,
            {k: Column(c.values[:0], None if c.offsets is None else c.offsets[:1]) for k, c in columns.items()},
        )
        writer.add("train", SCHEMA[:3], columns)
    return Examples.open(path)


def batches(examples: Examples, **more: Any) -> list[Batch]:
    return list(eval_batches(examples, "test", **{"batch_size": 4, "history_length": 10, **more}))


def test_queries_whose_time_is_told_come_in_its_order_among_lists_of_a_similar_length(examples: Examples) -> None:
    found = [b for b in batches(examples, times="target")]
    real = np.concatenate([b["row_weight"] for b in found]) > 0
    lengths = np.concatenate([(b["seen_ids"] > 0).sum(1) for b in found])[real]
    times = np.concatenate([b["query_time"].max(1) for b in found])[real]
    bucket = np.ceil(np.log2(np.maximum(lengths, 16)))
    assert len(set(bucket)) == 4 and (np.diff(bucket) <= 0).all()
    assert all((np.diff(times[bucket == b]) >= 0).all() for b in set(bucket))
    users = [set(np.concatenate([b["user_index"] for b in part]).tolist()) for part in (found, batches(examples))]
    assert users[0] == users[1]


def test_every_user_comes_once_with_the_newest_events_and_everything_seen(examples: Examples) -> None:
    expected = {int(r["user_index"]): r for r in examples.source("test").__getitems__(range(27))}
    met = []
    for batch in batches(examples, times="target"):
        check_fields(batch)
        for row in range(4):
            one = {name: values[row] for name, values in batch.items()}
            if one["row_weight"] == 0:
                assert one["user_index"] == -1
                assert all((one[k] == 0).all() for k in one if k != "user_index")
                continue
            met.append(int(one["user_index"]))
            record = expected[met[-1]]
            newest = record["items"][-10:]
            n = len(newest)
            np.testing.assert_array_equal(one["history_ids"], np.pad(newest, (0, 10 - n)))
            np.testing.assert_array_equal(one["history_time"], np.pad(record["times"][-10:], (0, 10 - n)))
            asked = np.append(record["times"][-10:][1:], record["label_time"])
            np.testing.assert_array_equal(one["query_time"], np.pad(asked, (0, 10 - n)))
            np.testing.assert_array_equal(one["positions"], np.pad(np.arange(n), (0, 10 - n)))
            np.testing.assert_array_equal(one["segment_ids"], np.pad(np.ones(n), (0, 10 - n)))
            np.testing.assert_array_equal(one["seen_ids"][: len(record["items"])], record["items"])
            assert (one["seen_ids"][len(record["items"]) :] == 0).all()
            assert one["label_ids"] == record["label"]
    assert sorted(met) == sorted(expected)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batches_of_one(examples: Examples, count: int) -> None:
    whole = batches(examples)
    parts = [batches(examples, process_index=p, process_count=count) for p in range(count)]
    assert {len(p) for p in parts} == {len(whole)}
    for k, batch in enumerate(whole):
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([p[k][name] for p in parts]), batch[name])


def test_seen_items_come_in_few_widths_that_fit(examples: Examples) -> None:
    widths = [b["seen_ids"].shape[1] for b in batches(examples)]
    longest = int(examples.source("test").lengths.max())
    assert widths == sorted(widths, reverse=True)
    assert set(widths) <= set(seen_widths(longest))
    assert all(
        (b["seen_ids"] > 0).any(axis=0).sum() > w / 4 or w == 32 for b, w in zip(batches(examples), widths, strict=True)
    )
    assert seen_widths(2314) == [32, 128, 512, 2048, 2320]
    assert seen_widths(0) == [8]
    fixed = batches(examples, seen_length=longest + 1)
    assert {b["seen_ids"].shape[1] for b in fixed} == {longest + 1}


def test_a_split_without_examples_gives_no_batches(examples: Examples) -> None:
    assert list(eval_batches(examples, "valid", batch_size=4, history_length=10)) == []


def test_only_the_times_asked_for_are_there(examples: Examples) -> None:
    names = {times: set(batches(examples, times=times)[0]) for times in ("none", "history", "target")}
    assert names["history"] - names["none"] == {"history_time"}
    assert names["target"] - names["history"] == {"query_time"}


def test_mistakes_are_told(examples: Examples) -> None:
    with pytest.raises(ConfigError, match="times = 'all'"):
        batches(examples, times="all")
    with pytest.raises(ExamplesError, match="no label"):
        eval_batches(examples, "train", batch_size=4, history_length=10)
    with pytest.raises(ExamplesError, match="has seen .* items"):
        batches(examples, seen_length=20)
    with pytest.raises(ConfigError, match="4 rows cannot be divided by 3"):
        batches(examples, process_count=3)
