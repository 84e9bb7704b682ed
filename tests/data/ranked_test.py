"""Every layout asks about every candidate once, behind its own prompt, at the slot where it ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.errors import ExamplesError
from recjax.data.batch import check_fields
from recjax.data.ranked import LAYOUTS, ranked_batches, width_of
from recjax.data.ranking_records import Cost, RankingRecords, pieces_of
from recjax.data.record import Column


def column(values: list[np.ndarray]) -> Column:
    lengths = [len(v) for v in values]
    return Column(
        np.concatenate([np.zeros(0, np.int32), *values]).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)])
    )


def make_columns(seed: int, records: int, *, most: int = 6, longest: int = 20) -> dict[str, Column]:
    rng = np.random.default_rng(seed)
    many = rng.integers(0 if records > 1 else 1, most + 1, records)
    sizes = [rng.integers(1, 6, k) for k in many]
    return {
        "items": column([rng.integers(2, 90, n) for n in rng.integers(1, longest + 1, records)]),
        "suffixes": column([rng.integers(2, 90, int(s.sum())) for s in sizes]),
        "suffix_lengths": column(sizes),
        "labels": column([rng.integers(0, 2, k) for k in many]),
        "user_index": Column(rng.integers(0, 5, records).astype(np.int64)),
        "history_events": Column(rng.integers(0, 50, records).astype(np.int32)),
        "total_events": Column(rng.integers(50, 90, records).astype(np.int32)),
    }


def sequence_of(records: RankingRecords, candidate: int) -> list[int]:
    record = int(records.record[candidate])
    prompt = records.tokens[records.prefix[record] : records.prefix[record + 1]]
    return [*prompt, *records.suffix_tokens[records.suffix[candidate] : records.suffix[candidate + 1]]]


def read_row(batch: dict[str, np.ndarray], row: int, slot: int) -> tuple[list[int], list[int]]:
    """The tokens that a slot of a row of text sees, and their positions."""
    segments, positions = batch["segment_ids"][row], batch["positions"][row]
    parent = batch["parents"][row, slot] if "parents" in batch else 0
    seen = (segments == segments[slot]) | ((parent > 0) & (segments == parent))
    seen &= np.arange(len(seen)) <= slot
    return batch["history_ids"][row, seen].tolist(), positions[seen].tolist()


def read_beside(batch: dict[str, np.ndarray], row: int, number: int) -> tuple[list[int], list[int]]:
    end, last = batch["query_at"][row, 0], batch["suffix_at"][row, number]
    assert (batch["segment_ids"][row] == (np.arange(batch["segment_ids"].shape[1]) <= end)).all()
    assert not batch["suffix_ids"][row, number, last + 1 :].any()
    tokens = [*batch["history_ids"][row, : end + 1], *batch["suffix_ids"][row, number, : last + 1]]
    return tokens, [*batch["positions"][row, : end + 1], *range(end + 1, end + 2 + last)]


@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.sampled_from(LAYOUTS),
    st.sampled_from([16, 64, 400]),
    st.integers(1, 3),
)
def test_every_candidate_is_asked_about_once(seed: int, count: int, layout: str, slots: int, parts: int) -> None:
    records = RankingRecords.of(make_columns(seed, count))
    found, cost = [], Cost()
    for batch, candidate, took in ranked_batches(records, layout=layout, slots=slots, parts=parts):
        check_fields(batch)
        assert {x.dtype for x in batch.values()} == {np.dtype(np.int32)} and len(batch["history_ids"]) % parts == 0
        asked = batch["suffix_at"] if layout == "cached" else batch["query_at"]
        np.testing.assert_array_equal(asked.reshape(-1) >= 0, candidate >= 0)
        for at in np.flatnonzero(candidate >= 0):
            row, number = divmod(int(at), asked.shape[1])
            if layout == "cached":
                tokens, positions = read_beside(batch, row, number)
            else:
                tokens, positions = read_row(batch, row, int(asked[row, number]))
            assert tokens == sequence_of(records, candidate[at])
            assert positions == list(range(len(tokens)))
        found += candidate[candidate >= 0].tolist()
        beside = batch["suffix_ids"].size if layout == "cached" else 0
        assert took.slots == batch["history_ids"].size + beside
        real = (batch["segment_ids"] > 0).sum() + ((batch["suffix_ids"] > 0).sum() if layout == "cached" else 0)
        assert took.tokens == real
        cost += took
    assert sorted(found) == list(range(records.candidates))
    assert (cost.candidates, cost.alone) == (records.candidates, records.tokens_alone)
    assert cost.tokens == cost.alone if layout == "naive" else cost.tokens <= cost.alone


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_share_a_batch_and_its_shape(layout: str) -> None:
    records = RankingRecords.of(make_columns(0, 20))
    whole = list(ranked_batches(records, layout=layout, slots=300, parts=2))
    halves = [
        list(ranked_batches(records, layout=layout, slots=300, parts=2, process_index=i, process_count=2))
        for i in (0, 1)
    ]
    for all_rows, *mine in zip(whole, *halves, strict=True):
        for name, x in all_rows.batch.items():
            np.testing.assert_array_equal(x, np.concatenate([m.batch[name] for m in mine]))
        for part in mine:
            np.testing.assert_array_equal(part.candidate, all_rows.candidate)


def test_the_same_shapes_come_again() -> None:
    records = RankingRecords.of(make_columns(1, 400, longest=120))
    for layout in LAYOUTS:
        batches = list(ranked_batches(records, layout=layout, slots=1024))
        shapes = {tuple(x.shape for x in asked.batch.values()) for asked in batches}
        assert len(batches) > len(shapes) and len(shapes) <= 20


@pytest.mark.parametrize(("count", "most"), [(20, 1), (100, 3), (3000, 12)])
def test_a_shape_of_its_own_is_for_those_that_are_many(count: int, most: int) -> None:
    """Each is compiled, which a few rows are not worth; what their padding costs is bounded."""
    records, slots = RankingRecords.of(make_columns(2, count, longest=120)), 4096
    asked = list(ranked_batches(records, layout="cached", slots=slots))
    shapes = {asked.batch["suffix_ids"].shape[1:] + asked.batch["history_ids"].shape[1:] for asked in asked}
    assert len(shapes) <= most
    tokens, taken = (sum(getattr(one.cost, name) for one in asked) for name in ("tokens", "slots"))
    assert taken < 3 * tokens + 4 * slots * (len(shapes) + 1)


def test_a_shared_prompt_is_read_once() -> None:
    """Prompts of 1024 tokens with 32 candidates of 64: eleven times fewer tokens than alone."""
    many = 3
    columns = {
        "items": column([np.full(1024, 5)] * many),
        "suffixes": column([np.full(32 * 64, 6)] * many),
        "suffix_lengths": column([np.full(32, 64)] * many),
        "labels": column([np.zeros(32)] * many),
        "user_index": Column(np.arange(many)),
    }
    records = RankingRecords.of(columns)
    for layout in ("cached", "shared"):
        cost = sum((asked.cost for asked in ranked_batches(records, layout=layout, slots=4096)), Cost())
        told = cost.report()
        assert told["tokens_per_candidate"] == 96 and told["padding"] == 0
        np.testing.assert_allclose(told["prefix_reuse"], 1 - 3072 / (32 * 1088))


def test_pieces_are_even_and_cover_a_record() -> None:
    records = RankingRecords.of(make_columns(2, 30, most=11))
    pieces = pieces_of(records, np.full(30, 4))
    sizes = pieces.stop - pieces.first
    assert sizes.max() <= 4 and sizes.sum() == records.candidates
    for record in range(30):
        mine = pieces.record == record
        covered = np.concatenate(
            [np.arange(a, b) for a, b in zip(pieces.first[mine], pieces.stop[mine], strict=True)] or [[]]
        )
        np.testing.assert_array_equal(covered, np.arange(records.first[record], records.first[record + 1]))
        assert not mine.any() or np.ptp(sizes[mine]) <= 1


def test_widths_are_few_and_hold_what_they_must() -> None:
    sizes = np.arange(1, 5000)
    widths = width_of(sizes, 1)
    assert (widths >= sizes).all() and (widths[5:] < 1.51 * sizes[5:]).all() and len(np.unique(widths)) < 27
    assert width_of(np.array([1, 2, 3, 5, 7, 13, 25]), 1).tolist() == [1, 2, 3, 6, 8, 16, 32]


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("labels", lambda c: None, "no labels"),
        ("labels", lambda c: column([np.zeros(1)] * 3), "do not fit"),
        ("suffix_lengths", lambda c: Column(c.values + 1, c.offsets), "do not fit"),
        ("items", lambda c: column([np.zeros(0)] * 3), "do not fit"),
    ],
)
def test_records_that_do_not_fit_together_say_so(name: str, change, words: str) -> None:
    columns = make_columns(3, 3)
    columns["suffix_lengths"], columns["suffixes"] = column([np.full(2, 2)] * 3), column([np.full(4, 7)] * 3)
    columns["labels"] = column([np.zeros(2)] * 3)
    RankingRecords.of(columns)
    changed = change(columns[name])
    columns = {n: c for n, c in {**columns, name: changed}.items() if c is not None}
    with pytest.raises(ExamplesError, match=words):
        RankingRecords.of(columns)
