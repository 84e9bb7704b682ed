"""Packed evaluation batches hold every user once, with the same content as rows of their own."""

from __future__ import annotations

import numpy as np
import pytest

from recjax.data.batch import check_fields
from recjax.data.heldout_packed import packed_batches
from recjax.data.record import Column
from recjax.data.shards import MemorySource

LENGTH = 20


def source_of(users=70, seed=0, seen=False) -> MemorySource:
    """Users with 0 to 60 events, most of them few."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(np.exp(rng.normal(2, 1.2, users)).astype(int), 60)
    lengths[3] = 0
    offsets = np.concatenate([[0], lengths.cumsum()])
    columns = {
        "user_index": Column(rng.permutation(5000)[:users]),
        "items": Column(rng.integers(2, 900, offsets[-1]).astype(np.int32), offsets),
        "times": Column(np.arange(offsets[-1]) * 7, offsets),
        "label": Column(rng.integers(2, 900, users).astype(np.int32)),
        "label_time": Column(offsets[1:] * 7 + 3),
    }
    if seen:
        had = np.concatenate([[0], (lengths + 40).cumsum()])
        columns["seen"] = Column(rng.integers(2, 900, had[-1]).astype(np.int32), had)
    return MemorySource(columns, lengths.astype(np.int32))


@pytest.mark.parametrize("seen", [False, True])
def test_every_user_comes_once_with_the_newest_events(seen):
    source = source_of(seen=seen)
    expected = {int(r["user_index"]): r for r in source.__getitems__(range(len(source)))}
    met, filled = [], []
    for batch in packed_batches(source, users=16, row_length=LENGTH, times="target"):
        check_fields(batch)
        rows, asked = batch["query_at"].shape
        assert asked & (asked - 1) == 0 and rows * asked <= max(16, asked)
        filled.append((batch["segment_ids"] > 0).mean())
        used = np.zeros_like(batch["segment_ids"], bool)
        for query in np.flatnonzero(batch["row_weight"]):
            row, number = divmod(int(query), asked)
            met.append(int(batch["user_index"][query]))
            record, span = expected[met[-1]], batch["segment_ids"][row] == number + 1
            newest = record["items"][-LENGTH:]
            used[row] |= span
            assert span.sum() == len(newest) and batch["label_ids"][query] == record["label"]
            np.testing.assert_array_equal(batch["history_ids"][row, span], newest)
            np.testing.assert_array_equal(batch["positions"][row, span], np.arange(len(newest)))
            np.testing.assert_array_equal(batch["history_time"][row, span], record["times"][-LENGTH:])
            if len(newest):
                asked_at = np.append(record["times"][-LENGTH:][1:], record["label_time"])
                np.testing.assert_array_equal(batch["query_time"][row, span], asked_at)
                assert batch["query_at"][row, number] == np.flatnonzero(span)[-1]
            else:
                assert batch["query_at"][row, number] == -1
            had = record["seen"] if seen else record["items"]
            np.testing.assert_array_equal(batch["seen_ids"][query][: len(had)], had)
            assert not batch["seen_ids"][query][len(had) :].any()
        fill = batch["row_weight"] == 0
        assert (batch["user_index"][fill] == -1).all() and not batch["seen_ids"][fill].any()
        assert (batch["query_at"].reshape(-1)[fill] == -1).all()
        for name in ("history_ids", "segment_ids", "history_time", "query_time"):
            assert not batch[name][~used].any()
    assert sorted(met) == sorted(expected)
    assert np.mean(filled[:-1]) > 0.7


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batches_of_one(count):
    source = source_of()
    whole = list(packed_batches(source, users=16, row_length=LENGTH, parts=4))
    parts = [
        list(packed_batches(source, users=16, row_length=LENGTH, parts=4, process_index=p, process_count=count))
        for p in range(count)
    ]
    assert {len(p) for p in parts} == {len(whole)}
    for k, batch in enumerate(whole):
        assert len(batch["query_at"]) % 4 == 0
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([p[k][name] for p in parts]), batch[name])


def test_short_histories_make_short_rows():
    source = source_of()
    short = MemorySource(source.columns, np.minimum(source.lengths, 9))
    assert {b["history_ids"].shape[1] for b in packed_batches(short, users=16, row_length=200)} == {16}


def test_shapes_are_few():
    source = source_of(users=3000)
    shapes = {tuple(v.shape for v in batch.values()) for batch in packed_batches(source, users=64, row_length=LENGTH)}
    assert len(shapes) <= 9
