"""The records of one split as flat arrays, the form that counting baselines want them in.

A prepared example is one user: the items so far and, outside the training split, a held-out label. Here they lie
one user after the other in one array, so that counting is numpy and scipy from end to end.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from scipy import sparse

from recjax.data.examples import Examples
from recjax.data.record import spans
from recjax.data.shards import ExampleSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
    """User u had the rows `items[offsets[u]:offsets[u + 1]]`, oldest first; `label` 0 where there is none.

    `times` are those of the items, `label_time` of the labels, None where the log has none. `seen` is what the user
    really had, where that differs from the items (a changed input): flat rows and their bounds. `text` is the query of
    each record, where the task has queries.
    """

    items: np.ndarray
    offsets: np.ndarray
    user_index: np.ndarray
    label: np.ndarray
    train_events: np.ndarray
    times: np.ndarray | None = None
    label_time: np.ndarray | None = None
    seen: tuple[np.ndarray, np.ndarray] | None = None
    text: np.ndarray | None = None

    @classmethod
    def of(cls, examples: Examples, split: str) -> Records:
        """Read a whole split of prepared examples; raises `ExamplesError` when there is no such split."""
        source = examples.source(split)
        names = [field.name for field in examples.schema(split)]
        wanted = ("items", "times", "label", "label_time", "user_index", "train_events")
        found = source.read(np.arange(len(source)), [name for name in wanted if name in names])

        def column(name: str, dtype: type) -> np.ndarray:
            if name not in found:
                return np.zeros(len(source), dtype)
            values, at = found[name]
            return values[at].astype(dtype)

        def lists(name: str) -> np.ndarray:
            values, begins = found[name]
            return values[spans(begins, lengths)]

        lengths = source.lengths.astype(np.int64)
        return cls(
            items=lists("items").astype(np.int32),
            offsets=_offsets(lengths),
            user_index=column("user_index", np.int64),
            label=column("label", np.int32),
            train_events=column("train_events", np.int32),
            times=lists("times").astype(np.int64) if "times" in found else None,
            label_time=column("label_time", np.int64) if "label_time" in found else None,
            seen=_lists(source, "seen") if "seen" in names else None,
            text=_texts(examples, source) if "text" in names else None,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Events of every user."""
        return np.diff(self.offsets)

    def take(self, users: np.ndarray) -> Records:
        """The records of some users, in the order given."""
        at = spans(self.offsets[users], self.lengths[users])
        seen = None
        if self.seen is not None:
            lengths = np.diff(self.seen[1])[users]
            seen = self.seen[0][spans(self.seen[1][users], lengths)], _offsets(lengths)
        return Records(
            items=self.items[at],
            offsets=_offsets(self.lengths[users]),
            user_index=self.user_index[users],
            label=self.label[users],
            train_events=self.train_events[users],
            times=None if self.times is None else self.times[at],
            label_time=None if self.label_time is None else self.label_time[users],
            seen=seen,
            text=None if self.text is None else self.text[users],
        )

    def latest(self, limit: int) -> Records:
        """The same users with their last `limit` events only."""
        lengths = np.minimum(self.lengths, limit)
        at = spans(self.offsets[1:] - lengths, lengths)
        return dataclasses.replace(
            self,
            items=self.items[at],
            offsets=_offsets(lengths),
            times=None if self.times is None else self.times[at],
        )

    def seen_items(self) -> tuple[np.ndarray, np.ndarray]:
        """What users have had, which is not to be recommended: flat rows and their bounds."""
        return (self.items, self.offsets) if self.seen is None else self.seen

    def padded(self) -> np.ndarray:
        """int32 [n, longest]: what every user has had, 0 where padded; at least one column, a power of two of them."""
        items, offsets = self.seen_items()
        lengths = np.diff(offsets)
        longest = 1 << max(0, int(lengths.max(initial=1)) - 1).bit_length()
        out = np.zeros((len(self), longest), np.int32)
        out[np.repeat(np.arange(len(self)), lengths), spans(np.zeros(len(self), np.int64), lengths)] = items
        return out

    def weights(self, num_rows: int, *, limit: int, decay: float) -> sparse.csr_array:
        """float32 [n, num_rows]: `decay ** age` for the last `limit` events (age 0 is the last), repeats added up."""
        recent = self.latest(limit)
        users = np.repeat(np.arange(len(self)), recent.lengths)
        age = np.repeat(recent.offsets[1:], recent.lengths) - 1 - np.arange(len(recent.items))
        weight = np.power(np.float32(decay), age.astype(np.float32))
        return sparse.csr_array((weight, (users, recent.items)), shape=(len(self), num_rows))


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _lists(source: ExampleSource, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A list field of all records: flat values and their bounds."""
    lists = [example[name] for example in source.__getitems__(range(len(source)))]
    lengths = np.array([len(one) for one in lists], np.int64)
    return np.concatenate([np.zeros(0, np.int32), *lists]), _offsets(lengths)


def _texts(examples: Examples, source: ExampleSource) -> np.ndarray:
    """The query of every record, an array of objects."""
    values, bounds = _lists(source, "text")
    texts = [examples.query_text(values[start:end]) for start, end in itertools.pairwise(bounds.tolist())]
    return np.array(texts, object)
