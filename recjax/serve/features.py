"""From what a caller knows (item ids, oldest first) to what the model reads: the feature code of a bundle.

The same rule as `recjax.data.pipeline.eval_batches` (a test holds the two equal): every id is encoded, an id outside
the vocabulary becomes the row of unknown items and keeps its place, the last `history_length` rows are the history,
padded on the right, and every known row of the whole history counts as seen. A bundle names the rule by `NAME` and
`VERSION` and is refused by code with another: change the version with the rule. numpy only; it knows no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from time import time as clock

import numpy as np

from recjax.data.vocab import FIRST_ITEM, OOV, PAD, ItemVocab

NAME = "last_events"
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """One user: `history_ids` int32 [at most history_length], `seen_ids` int32 [n] without repeats.

    `history_time` are the times of `history_ids` and `query_time` that of the question, in seconds since 1970 as
    int32 (what goes beyond wraps around; only differences count).
    """

    history_ids: np.ndarray
    seen_ids: np.ndarray
    history_time: np.ndarray
    query_time: np.ndarray
    unknown: int  # events of the whole history whose item is not in the vocabulary

    @property
    def is_known(self) -> bool:
        """True when the history the model reads has an item of the vocabulary: only then is its answer defined."""
        return bool((self.history_ids >= FIRST_ITEM).any())


def encode_history(
    user_history: Sequence[int | str],
    vocab: ItemVocab,
    history_length: int,
    *,
    history_time: Sequence[int] | None = None,
    time: int | None = None,
) -> Encoded:
    """Encode the item ids of one user, oldest first; without `time` the question is asked now."""
    times = np.zeros(len(user_history), np.int64) if history_time is None else np.array(history_time, np.int64)
    rows = vocab.encode(list(user_history))
    known = rows[rows >= FIRST_ITEM]
    return Encoded(
        history_ids=rows[-history_length:],
        seen_ids=np.unique(known).astype(np.int32),
        history_time=times[-history_length:].astype(np.int32),
        query_time=np.array(int(clock()) if time is None else time, np.int64).astype(np.int32),
        unknown=int(np.count_nonzero(rows == OOV)),
    )


def pad(rows: Sequence[np.ndarray], *, count: int, width: int) -> np.ndarray:
    """int32 [count, width]: `rows` padded on the right, then rows of padding; nothing may be longer than `width`."""
    out = np.full((count, width), PAD, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def pad_times(users: Sequence[Encoded], times: str, *, count: int, width: int) -> list[np.ndarray]:
    """What a bundle reads of time, by the `times` of its manifest, for `count` rows as `pad` makes them."""
    if times == "none":
        return []
    found = [pad([user.history_time for user in users], count=count, width=width)]
    return [*found, pad([user.query_time[None] for user in users], count=count, width=1)[:, 0]][
        : 1 + (times == "target")
    ]
