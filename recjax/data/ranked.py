"""Batches of ranking records in three layouts that give the same scores at different cost.

    naive   every candidate behind its own copy of the prompt, as a row of text: what the others are compared with
    shared  one row for the prompt and its candidates, which are segments that see the prompt (`parents`) but not each
            other; each goes on at the position where the prompt ends
    cached  a row of prompts [b, p] and beside it candidates [b, m, t], for a model that keeps what it read

Rows of the first two are packed. Lengths are rounded up to few widths, so that the same shapes come again and again
(each is compiled), and a batch has about as many slots as asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from recjax.data.batch import Batch
from recjax.data.packing import pack
from recjax.data.ranking_records import Cost, Pieces, RankingRecords, pieces_of
from recjax.data.record import spans

LAYOUTS = ("cached", "shared", "naive")
_SHORTEST = 8
_COMPILED = 4  # batches of work that one more shape of batch is worth: it is traced and compiled for it


_Shape = tuple[int, int, int]  # of a prompt, how many candidates, of a candidate


class Asked(NamedTuple):
    """A batch, the candidate that each of its answers is about (int64 [answers], -1 where none is), and its cost.

    The batch holds this process's rows, the candidates are those of all processes.
    """

    batch: Batch
    candidate: np.ndarray
    cost: Cost


def ranked_batches(
    records: RankingRecords,
    *,
    layout: str,
    slots: int,
    parts: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Asked]:
    """Every candidate exactly once, in batches of about `slots` slots and a multiple of `parts` rows.

    "naive" and "shared" make the fields of rows of text, `query_at` [b, q] and for the latter `parents`; "cached"
    those of the prompts, `query_at` [b, 1], `suffix_ids` [b, m, t] and `suffix_at` [b, m]. All are int32.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}")
    make = _cached if layout == "cached" else _rows
    local = process_index, process_count
    for batch, pieces, rows in make(records, layout, slots, parts):
        size = len(batch["history_ids"]) // local[1]
        candidate = batch.pop("candidate").astype(np.int64).reshape(-1)
        mine = {name: x[local[0] * size : (local[0] + 1) * size] for name, x in batch.items()}
        yield Asked(mine, candidate, _cost(records, pieces, rows))


def width_of(sizes: np.ndarray, least: int = _SHORTEST) -> np.ndarray:
    """Each size rounded up to 1, 2, 3, 4, 6, 8, 12, ..., 2^k, 3 * 2^(k-1), ..., and to `least` at least."""
    sizes = np.maximum(sizes, least)
    upper = 1 << np.ceil(np.log2(sizes)).astype(np.int64)
    return np.where((upper >= 4) & (sizes <= upper // 4 * 3), upper // 4 * 3, upper)


def _cost(records: RankingRecords, pieces: Pieces, slots: int) -> Cost:
    prefix = records.prefix_lengths[pieces.record]
    many = pieces.stop - pieces.first
    own = int((records.suffix[pieces.stop] - records.suffix[pieces.first]).sum())
    return Cost(
        candidates=int(many.sum()),
        tokens=int(prefix.sum()) + own,
        slots=slots,
        alone=int((many * prefix).sum()) + own,
    )


# The candidates beside their prompts


def _cached(records: RankingRecords, _: str, slots: int, parts: int) -> Iterator[tuple[Batch, Pieces, int]]:
    prefix = width_of(records.prefix_lengths)
    longest = np.zeros(len(records), np.int64)
    np.maximum.at(longest, records.record, records.suffix_lengths)
    tokens = width_of(longest)
    pieces = pieces_of(records, np.maximum((slots - prefix) // tokens, 1))
    many = width_of(pieces.stop - pieces.first, 1)
    shapes = _merged(np.stack([prefix[pieces.record], many, tokens[pieces.record]], axis=1), slots)
    for shape in np.unique(shapes, axis=0):
        members = np.flatnonzero((shapes == shape).all(axis=1))
        p, m, t = shape.tolist()
        size = _rows_of(len(members), slots // _area((p, m, t)), parts)
        for start in range(0, len(members), size):
            chosen = pieces.take(members[start : start + size])
            yield _beside(records, chosen, (size, p, m, t)), chosen, size * _area((p, m, t))


def _merged(shapes: np.ndarray, slots: int) -> np.ndarray:
    """The shapes [n, 3], those together whose rows save less by being apart than a shape of its own costs."""
    known, which, counts = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
    groups = [(shape, [k]) for k, shape in enumerate(map(tuple, known.tolist()))]

    def waste(a: int, b: int) -> int:
        """Slots that two groups together take beyond what they take apart; where no batch holds them, too many."""
        joint = _joint(groups[a][0], groups[b][0])
        if _area(joint) > max(slots, *(_area(groups[k][0]) for k in (a, b))):
            return _COMPILED * slots
        return sum(int(counts[groups[k][1]].sum()) * (_area(joint) - _area(groups[k][0])) for k in (a, b))

    while len(groups) > 1:
        least, a, b = min((waste(a, b), a, b) for b in range(len(groups)) for a in range(b))
        if least >= _COMPILED * slots:
            break
        shape, members = groups.pop(b)
        groups[a] = _joint(groups[a][0], shape), groups[a][1] + members
    for shape, members in groups:
        known[members] = shape
    return known[which.reshape(-1)]


def _joint(one: _Shape, other: _Shape) -> _Shape:
    p, m, t = (max(pair) for pair in zip(one, other, strict=True))
    return p, m, t


def _area(shape: Sequence[int]) -> int:
    """Slots of a row with its candidates."""
    p, m, t = shape
    return p + m * t


def _rows_of(there: int, wanted: int, parts: int) -> int:
    """Rows of a batch: about as many as `wanted`, not many more than `there` are, and a multiple of `parts`."""
    return -(-max(min(int(width_of(np.array(there), 1)), wanted), 1) // parts) * parts


def _beside(records: RankingRecords, pieces: Pieces, shape: tuple[int, int, int, int]) -> Batch:
    size, p, m, t = shape
    batch: Batch = {name: np.zeros((size, p), np.int32) for name in ("history_ids", "positions", "segment_ids")}
    batch["query_at"] = np.full((size, 1), -1, np.int32)
    batch["suffix_ids"] = np.zeros((size, m, t), np.int32)
    batch["suffix_at"] = np.full((size, m), -1, np.int32)
    batch["candidate"] = np.full((size, m), -1, np.int64)
    row = np.arange(len(pieces.record))
    lengths = records.prefix_lengths[pieces.record]
    to = spans(row * p, lengths)
    batch["history_ids"].reshape(-1)[to] = records.tokens[spans(records.prefix[pieces.record], lengths)]
    batch["positions"].reshape(-1)[to] = spans(np.zeros_like(lengths), lengths)
    batch["segment_ids"].reshape(-1)[to] = 1
    batch["query_at"][row, 0] = lengths - 1
    many = pieces.stop - pieces.first
    candidate, at = spans(pieces.first, many), spans(row * m, many)
    own = records.suffix_lengths[candidate]
    tokens = records.suffix_tokens[spans(records.suffix[candidate], own)]
    batch["suffix_ids"].reshape(-1)[spans(at * t, own)] = tokens
    batch["suffix_at"].reshape(-1)[at] = own - 1
    batch["candidate"].reshape(-1)[at] = candidate
    return batch


# The candidates in rows of text


def _rows(records: RankingRecords, layout: str, slots: int, parts: int) -> Iterator[tuple[Batch, Pieces, int]]:
    shared, prefix = layout == "shared", records.prefix_lengths
    longest = np.zeros(len(records), np.int64)
    np.maximum.at(longest, records.record, records.suffix_lengths)
    most = np.maximum((slots - prefix) // np.maximum(longest, 1), 1) if shared else np.ones(len(records), np.int64)
    pieces = pieces_of(records, most)
    lengths = prefix[pieces.record] + records.suffix[pieces.stop] - records.suffix[pieces.first]
    row_length = int(width_of(lengths.max(initial=1, keepdims=True))[0])
    plan = pack(lengths, row_length)
    asked = np.bincount(plan.row, pieces.stop - pieces.first, minlength=plan.num_rows).astype(np.int64)
    order = np.argsort(-asked, kind="stable")
    by_row = np.lexsort((plan.offset, plan.row))
    bounds = np.searchsorted(plan.row[by_row], np.arange(plan.num_rows + 1))
    size = _rows_of(plan.num_rows, slots // row_length, parts)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        held = np.diff(bounds)[rows]
        members = by_row[spans(bounds[rows], held)]
        place = np.repeat(np.arange(len(rows)), held)
        queries = int(width_of(asked[rows[:1]], 1)[0])
        chosen = pieces.take(members)
        shape = size, row_length, queries
        yield _in_rows(records, chosen, place, plan.offset[members], shape, shared), chosen, size * row_length


def _in_rows(
    records: RankingRecords,
    pieces: Pieces,
    row: np.ndarray,
    offset: np.ndarray,
    shape: tuple[int, int, int],
    shared: bool,
) -> Batch:
    """Rows with these pieces, which come row by row, from left to right."""
    size, length, queries = shape
    names = ("history_ids", "positions", "segment_ids", *(("parents",) if shared else ()))
    batch: Batch = {name: np.zeros((size, length), np.int32) for name in names}
    batch["query_at"] = np.full((size, queries), -1, np.int32)
    batch["candidate"] = np.full((size, queries), -1, np.int64)
    flat = {name: x.reshape(-1) for name, x in batch.items()}
    many, lengths = pieces.stop - pieces.first, records.prefix_lengths[pieces.record]
    begin = row * length + offset
    segment = _counted(np.where(shared, 1 + many, 1), row) + 1
    to = spans(begin, lengths)
    flat["history_ids"][to] = records.tokens[spans(records.prefix[pieces.record], lengths)]
    flat["positions"][to] = spans(np.zeros_like(lengths), lengths)
    flat["segment_ids"][to] = np.repeat(segment, lengths)

    candidate = spans(pieces.first, many)
    own = records.suffix_lengths[candidate]
    after = records.suffix[candidate] - np.repeat(records.suffix[pieces.first], many)  # tokens of those before it
    start = np.repeat(begin + lengths, many) + after
    to, number = spans(start, own), spans(np.zeros_like(many), many) + 1
    flat["history_ids"][to] = records.suffix_tokens[spans(records.suffix[candidate], own)]
    flat["positions"][to] = spans(np.repeat(lengths, many), own)
    flat["segment_ids"][to] = np.repeat(np.repeat(segment, many) + number * shared, own)
    if shared:
        flat["parents"][to] = np.repeat(np.repeat(segment, many), own)
    query = np.repeat(row, many) * queries + _counted(np.ones_like(candidate), np.repeat(row, many))
    flat["query_at"][query] = (start + own - 1) % length
    flat["candidate"][query] = candidate
    return batch


def _counted(counts: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The sum of the counts before each entry within its row; rows come one after another."""
    before = np.cumsum(counts) - counts
    return before - before[np.searchsorted(row, row)] if len(row) else before
