"""From a table of codes to the arrays of a trie, on the host.

It refuses what cannot be decoded without doubt: two rows with one id, an id that begins another one (whoever needs
that gives the end a code of its own), and codes outside their level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recjax.core.errors import DataError
from recjax.decode.trie import Trie, TrieShape

# A level is a table where that has at most so many entries, or at most so many for each child in it.
SMALL_TABLE = 2**22
FULL_TABLE = 4
_NAMED = 5  # examples in a message


def build_trie(codes: np.ndarray, sizes: Sequence[int], *, dense: int | None = None) -> Trie:
    """The trie of the ids in `codes`, integers [v, l], each a row of codes 0 <= codes[v, l] < sizes[l].

    An id may be shorter than others: -1 from where it ends. A row of -1 throughout has no id. `dense` is the number of
    first levels that are tables over all codes; None takes those whose table is small or well filled. In memory the
    trie has 4 bytes for each code that tells ids apart and 4 to 8 for each prefix, and 8 for each id.

    Raises `DataError` for codes that are no trie: see the head of this file.
    """
    codes, sizes = np.asarray(codes), tuple(int(size) for size in sizes)
    levels = len(sizes)
    if codes.ndim != 2 or codes.shape[1] != levels or not levels or codes.dtype.kind not in "iu":
        raise DataError(
            f"a code table of shape {codes.shape} and type {codes.dtype} for {levels} levels",
            expected="integers [rows, levels], and the number of codes of each level",
        )
    _check_range(codes, sizes)
    rows = np.flatnonzero(codes[:, 0] >= 0)
    if not len(rows):
        raise DataError("no row of the code table has an id", expected="at least one")
    rows = rows[np.lexsort(codes[rows].T[::-1])]
    ids = codes[rows]
    _check_distinct(ids, rows)
    # Behind an id that has ended stands one code, which no other id can follow: certain, whatever a model says.
    ids = np.maximum(ids, 0)

    # Where leaves differ from the one before in their first l codes, a node of level l begins.
    starts = [np.zeros(1, np.int64)]
    differs = np.zeros(len(ids), bool)
    differs[0] = True
    for level in range(levels):
        differs[1:] |= ids[1:, level] != ids[:-1, level]
        starts.append(np.flatnonzero(differs))
    tables = _dense_levels(starts, sizes) if dense is None else min(dense, levels)
    arrays: dict[str, np.ndarray] = {}
    branch = []
    for level, size in enumerate(sizes):
        here, below = starts[level], starts[level + 1]
        first = np.searchsorted(below, np.append(here, len(ids))).astype(np.int32)  # children before each node
        code = ids[below, level]
        arrays[f"leaf_{level}"] = np.append(here, len(ids))
        if level < tables:
            arrays[f"child_{level}"] = _table(first, code, size)
            branch.append(size)
            continue
        arrays[f"code_{level}"] = np.append(code, 0)  # the edge behind the last child is inside, too
        if level < levels - 1:
            arrays[f"first_{level}"] = first
        branch.append(int(np.diff(first).max()))
    arrays["row"] = rows
    arrays["leaf"] = np.full(len(codes), -1)
    arrays["leaf"][rows] = np.arange(len(rows))
    shape = TrieShape(sizes=sizes, branch=tuple(branch), dense=tables, num_ids=len(ids))
    return Trie({name: array.astype(np.int32) for name, array in arrays.items()}, shape)


def _dense_levels(starts: Sequence[np.ndarray], sizes: Sequence[int]) -> int:
    """How many first levels are small or full enough for a table over all codes."""
    for level, size in enumerate(sizes):
        entries = len(starts[level]) * (size + 1)
        if entries > max(SMALL_TABLE, FULL_TABLE * len(starts[level + 1])):
            return level
    return len(sizes)


def _table(first: np.ndarray, code: np.ndarray, size: int) -> np.ndarray:
    """[nodes, size + 1]: how many children of the level come before each code of each node."""
    nodes = len(first) - 1
    parent = np.repeat(np.arange(nodes), np.diff(first))
    is_child = np.zeros((nodes, size), np.int32)
    is_child[parent, code] = 1
    before = np.cumsum(is_child, dtype=np.int32).reshape(nodes, size)
    return np.concatenate([first[:-1, None], before], axis=1)


def _check_range(codes: np.ndarray, sizes: Sequence[int]) -> None:
    """Codes are inside their level, and after an end only ends follow."""
    for level, size in enumerate(sizes):
        column = codes[:, level]
        wrong = (column < -1) | (column >= size)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"row {row} of the code table has code {column[row]} at level {level}",
                where=f"{np.count_nonzero(wrong)} such rows",
                expected=f"a code from 0 to {size - 1}, or -1 from where the id ends",
            )
        if level:
            wrong = (column >= 0) & (codes[:, level - 1] < 0)
            if wrong.any():
                row = int(np.argmax(wrong))
                raise DataError(
                    f"row {row} of the code table goes on after its end: {codes[row].tolist()}",
                    where=f"{np.count_nonzero(wrong)} such rows",
                    expected="-1 from where the id ends",
                )


def _check_distinct(ids: np.ndarray, rows: np.ndarray) -> None:
    """No id equals another one or begins it; `ids` are sorted, so that it would stand right behind."""
    before, after = ids[:-1], ids[1:]
    begins = ((before == after) | (before < 0)).all(axis=1)
    if not begins.any():
        return
    at = np.flatnonzero(begins)
    named = "; ".join(
        f"rows {rows[i]} and {rows[i + 1]}: {_spell(ids[i])}"
        + ("" if (ids[i] == ids[i + 1]).all() else f" and {_spell(ids[i + 1])}")
        for i in at[:_NAMED]
    )
    raise DataError(
        f"{len(at)} ids are those of other rows or begin them",
        where=named + (" and more" if len(at) > _NAMED else ""),
        expected="ids that are all different, none the beginning of another one",
        mend="give rows with equal codes one more level that tells them apart, and the end of an id a code of its own",
    )


def _spell(codes: np.ndarray) -> str:
    return "-".join(str(code) for code in codes[codes >= 0])
