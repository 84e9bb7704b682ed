"""What counters and histories say of each key at the end of the log: what a server starts from.

Training computes these columns for the moment of each row. A request that does not bring them gets those of the moment
the log ended, from the same counts; one that brings fresher ones is believed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recjax.data.raw import Raw

_BETWEEN = "\x1f"


@dataclass(frozen=True)
class Snapshot:
    """Columns by the values of the columns `on` together; row k of each belongs to `keys[k]`, and the last to whatever
    has no event."""

    on: tuple[str, ...]
    keys: tuple[str, ...]
    columns: Mapping[str, Raw]

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {text: k for k, text in enumerate(self.keys)}

    def __call__(self, columns: Mapping[str, Raw]) -> dict[str, Raw]:
        """The columns for rows with these other columns; missing where a part of the key is."""
        texts = key_texts([columns[name] for name in self.on])
        rows = [-1 if text is None else self._row_of.get(text, len(self.keys)) for text in texts]
        return {name: column.take(np.array(rows, np.int64)) for name, column in self.columns.items()}

    def told(self) -> dict[str, Any]:
        """As JSON."""
        columns = {name: column.told() for name, column in self.columns.items()}
        return {"on": list(self.on), "keys": list(self.keys), "columns": columns}

    @classmethod
    def from_told(cls, told: Mapping[str, Any]) -> Snapshot:
        columns = {name: Raw.from_told(column) for name, column in told["columns"].items()}
        return cls(tuple(told["on"]), tuple(told["keys"]), columns)


def key_texts(parts: Sequence[Raw]) -> list[str | None]:
    """The key of each row: its values as text, one after the other; None where one is missing."""
    texts = []
    for part in parts:
        codes, known = part.keys
        texts.append([known[code] for code in codes.tolist()])
    gone = np.logical_or.reduce([part.missing for part in parts]).tolist()
    return [None if m else _BETWEEN.join(values) for m, *values in zip(gone, *texts, strict=True)]


def filled(columns: Mapping[str, Raw], complete: Mapping[str, Raw], snapshots: Sequence[Snapshot]) -> dict[str, Raw]:
    """`columns` with those of snapshots where they are missing; keys are read from `complete`."""
    found, complete = dict(columns), dict(complete)
    for snapshot in snapshots:
        for name, column in snapshot(complete).items():
            found[name] = complete[name] = found[name].otherwise(column) if name in found else column
    return found
