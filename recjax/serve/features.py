"""From what a caller knows (item ids, oldest first, or a query) to what the model reads: the feature code of a bundle.

The same rule as `recjax.data.pipeline.eval_batches` (a test holds the two equal): every id is encoded, an id outside
the vocabulary becomes the row of unknown items and keeps its place, the last `history_length` rows are the history,
padded on the right, and every known row of the whole history counts as seen. For a model of tokens (`TOKENS`) these
rows are spelled, and a query is the first tokens of its text, as in `recjax.data.spelling.Prompts`. A bundle names the
rule by name and `VERSION` and is refused by code with another: change the version with the rule. It knows no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from time import time as clock

import numpy as np

from recjax.data.text import Tokenizer
from recjax.data.vocab import FIRST_ITEM, OOV, PAD, ItemVocab

NAME, TOKENS = "last_events", "tokens"
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """How a query is spelled: `prompt` and query in pieces, of which the first `length` are read.

    Piece t has row `start + t` of the model's table.
    """

    vocab: Tokenizer
    start: int
    length: int
    prompt: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """One user or query: `history_ids` int32 [at most prompt_length], what the model reads of it; `seen_ids` int32 [n],
    item rows without repeats.

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
        """True when what the model reads has a known item or any text: only then is its answer defined."""
        return bool((self.history_ids >= FIRST_ITEM).any())


def encode_history(
    user_history: Sequence[int | str],
    vocab: ItemVocab,
    history_length: int,
    *,
    spelling: np.ndarray | None = None,
    history_time: Sequence[int] | None = None,
    time: int | None = None,
) -> Encoded:
    """Encode the item ids of one user, oldest first; without `time` the question is asked now.

    `spelling` int32 [item rows, L] has the tokens of each row for a model that reads tokens.
    """
    times = np.zeros(len(user_history), np.int64) if history_time is None else np.array(history_time, np.int64)
    rows = vocab.encode(list(user_history))
    known, newest = rows[rows >= FIRST_ITEM], rows[-history_length:]
    return Encoded(
        history_ids=newest if spelling is None else spelling[newest].reshape(-1),
        seen_ids=np.unique(known).astype(np.int32),
        history_time=times[-history_length:].astype(np.int32),
        query_time=np.array(int(clock()) if time is None else time, np.int64).astype(np.int32),
        unknown=int(np.count_nonzero(rows == OOV)),
    )


def encode_query(query: str, texts: Texts) -> Encoded:
    """Encode a query; `history_ids` is empty where the text model finds nothing in it."""
    pieces = texts.vocab.encode(texts.prompt + query) if len(texts.vocab.encode(query)) else np.zeros(0, np.int32)
    none = np.zeros(0, np.int32)
    return Encoded(
        history_ids=(pieces[: texts.length] + texts.start).astype(np.int32),
        seen_ids=none,
        history_time=none,
        query_time=np.zeros((), np.int32),
        unknown=0,
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
