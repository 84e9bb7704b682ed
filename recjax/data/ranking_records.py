"""Ranking records: a prompt, candidates that continue it, and the class of the answer to each.

A record of a prompted task holds `items`, the rows of the tokens that all candidates share (instruction, profile,
history), `suffixes`, the tokens of its candidates up to the slot of the answer, one candidate after another,
`suffix_lengths`, and `labels`, the index of each candidate's answer among the label words. Candidates are numbered
through all records of a split. How they are laid out to be scored is decided in `recjax.data.ranked`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recjax.core.errors import ExamplesError
from recjax.data.record import Columns

FIELDS = ("items", "suffixes", "suffix_lengths", "labels", "user_index")


def has_candidates(names: tuple[str, ...]) -> bool:
    """Whether records with these fields are to be ranked."""
    return "suffixes" in names


@dataclass(frozen=True, kw_only=True)
class RankingRecords:
    """r records with n candidates in all, as flat arrays.

    The prompt of record i is `tokens[prefix[i]:prefix[i + 1]]`, its candidates are number `first[i]` to
    `first[i + 1]` - 1, and candidate c is `suffix_tokens[suffix[c]:suffix[c + 1]]`; `label` [n], `user_index` [r].
    `history_events` and `total_events` [r] are how many events the prompt shows and how many the user had.
    """

    tokens: np.ndarray
    prefix: np.ndarray
    suffix_tokens: np.ndarray
    suffix: np.ndarray
    first: np.ndarray
    label: np.ndarray
    user_index: np.ndarray
    history_events: np.ndarray
    total_events: np.ndarray

    @classmethod
    def of(cls, columns: Columns, *, where: str = "") -> RankingRecords:
        """Raises `ExamplesError` where a field is missing or the parts of a record do not fit together."""
        absent = [name for name in FIELDS if name not in columns]
        if absent:
            raise ExamplesError(
                f"these records have no {', '.join(absent)}",
                where=where,
                expected="the held-out records of a prompted ranking task",
            )
        items, suffixes, sizes, labels = (columns[name] for name in FIELDS[:4])
        user = columns["user_index"].values.astype(np.int64)
        many = sizes.lengths
        bounds = np.concatenate([[0], np.cumsum(sizes.values, dtype=np.int64)])
        first = np.concatenate([[0], np.cumsum(many)]).astype(np.int64)
        whole = bounds[first[1:]] - bounds[first[:-1]]
        odd = (whole != suffixes.lengths) | (labels.lengths != many) | (items.lengths < 1)
        odd |= np.bincount(np.repeat(np.arange(len(many)), many), sizes.values < 1, minlength=len(many)) > 0
        if odd.any():
            raise ExamplesError(
                f"the parts of record {int(np.argmax(odd))} do not fit together",
                where=where,
                expected="a prompt and candidates of at least one token each, suffix_lengths that add up to the "
                "suffixes, and as many labels",
                mend="prepare the task again",
            )
        events = {
            name: columns[name].values.astype(np.int64) if name in columns else np.zeros(len(user), np.int64)
            for name in ("history_events", "total_events")
        }
        assert items.offsets is not None
        return cls(
            tokens=items.values,
            prefix=items.offsets.astype(np.int64),
            suffix_tokens=suffixes.values,
            suffix=bounds,
            first=first,
            label=labels.values.astype(np.int64),
            user_index=user,
            **events,
        )

    def __len__(self) -> int:
        return len(self.user_index)

    @property
    def candidates(self) -> int:
        """n: the candidates of all records."""
        return len(self.label)

    @property
    def record(self) -> np.ndarray:
        """int64 [n]: the record of each candidate."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    @property
    def prefix_lengths(self) -> np.ndarray:
        """int64 [r]: tokens of each prompt."""
        return np.diff(self.prefix)

    @property
    def suffix_lengths(self) -> np.ndarray:
        """int64 [n]: tokens of each candidate."""
        return np.diff(self.suffix)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with a candidate of its own behind it."""
        return int((self.prefix_lengths[self.record] + self.suffix_lengths).max(initial=0))

    @property
    def tokens_alone(self) -> int:
        """Tokens that a model reads which scores every candidate alone."""
        return int((np.diff(self.first) * self.prefix_lengths).sum() + self.suffix_lengths.sum())


class Pieces(NamedTuple):
    """Parts of records that share one reading of the prompt: candidates `first` to `stop` - 1 of `record`."""

    record: np.ndarray
    first: np.ndarray
    stop: np.ndarray

    def take(self, chosen: np.ndarray) -> Pieces:
        """Some of them."""
        return Pieces(*(x[chosen] for x in self))


def pieces_of(records: RankingRecords, most: np.ndarray) -> Pieces:
    """Each record in as few pieces as it takes to have at most `most` [r] candidates in one, about equally many."""
    many = np.diff(records.first)
    count = -(-many // np.maximum(most, 1))
    record = np.repeat(np.arange(len(records)), count)
    number = np.arange(len(record)) - np.repeat(np.cumsum(count) - count, count)
    first, stop = (records.first[record] + (number + i) * many[record] // np.maximum(count[record], 1) for i in (0, 1))
    return Pieces(record, first, stop)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What scoring took: `tokens` read by the model for `candidates`, in rows of `slots` in all.

    `alone` is how many tokens it would read if every candidate were scored alone.
    """

    candidates: int = 0
    tokens: int = 0
    slots: int = 0
    alone: int = 0

    def __add__(self, other: Cost) -> Cost:
        mine, theirs = vars(self), vars(other)
        return Cost(**{name: mine[name] + theirs[name] for name in mine})

    def report(self) -> dict[str, float]:
        """Tokens for each candidate, the share of tokens that need not be read again, and that of padding."""
        return {
            "tokens_per_candidate": self.tokens / max(self.candidates, 1),
            "prefix_reuse": 1 - self.tokens / max(self.alone, 1),
            "padding": 1 - self.tokens / max(self.slots, 1),
        }
