"""From what a caller knows (item ids, oldest first) to what the model reads: the feature code of a bundle.

The same rule as `recjax.data.pipeline.eval_batches` (a test holds the two equal): every id is encoded, an id outside
the vocabulary becomes the row of unknown items and keeps its place, the last `history_length` rows are the history,
padded on the right, and every known row of the whole history counts as seen. A bundle names the rule by `NAME` and
`VERSION` and is refused by code with another: change the version with the rule. numpy only; it knows no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from recjax.data.vocab import FIRST_ITEM, OOV, PAD, ItemVocab

NAME = "last_events"
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """One user: `history_ids` int32 [at most history_length], `seen_ids` int32 [n] without repeats."""

    history_ids: np.ndarray
    seen_ids: np.ndarray
    unknown: int  # events of the whole history whose item is not in the vocabulary

    @property
    def is_known(self) -> bool:
        """True when the history the model reads has an item of the vocabulary: only then is its answer defined."""
        return bool((self.history_ids >= FIRST_ITEM).any())


def encode_history(user_history: Sequence[int | str], vocab: ItemVocab, history_length: int) -> Encoded:
    """Encode the item ids of one user, oldest first."""
    rows = vocab.encode(list(user_history))
    known = rows[rows >= FIRST_ITEM]
    return Encoded(
        history_ids=rows[-history_length:],
        seen_ids=np.unique(known).astype(np.int32),
        unknown=int(np.count_nonzero(rows == OOV)),
    )


def pad(rows: Sequence[np.ndarray], *, count: int, width: int) -> np.ndarray:
    """int32 [count, width]: `rows` padded on the right, then rows of padding; nothing may be longer than `width`."""
    out = np.full((count, width), PAD, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
