"""What items can be filtered by: a few words about each, such as its domain, and which items a filter leaves.

A filter names facets, and for each the values that will do; an item must have one of them in every facet named. A facet
says one thing of an item, or several (its genres). An item of which it says nothing is left out by every filter on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from recjax.core.errors import RequestError

SHOWN = 100  # values of a facet that are listed, the most frequent first

Filter = Mapping[str, Sequence[str]]
Values = Sequence[str | Sequence[str] | None]


class Facets:
    """The facets of a catalogue; `by_row[name]` has a value, several, or None for every row of the vocabulary."""

    def __init__(self, by_row: Mapping[str, Values]) -> None:
        self._rows: dict[str, np.ndarray] = {}
        self._codes: dict[str, np.ndarray] = {}
        self._values: dict[str, dict[str, int]] = {}
        self._shown: dict[str, list[str]] = {}
        self._size = 0
        for name, column in by_row.items():
            lists = [[v] if isinstance(v, str) else list(v or ()) for v in column]
            values = {value: code for code, value in enumerate(sorted({v for one in lists for v in one}))}
            codes = np.array([values[v] for one in lists for v in one], np.int32)
            frequent = np.argsort(-np.bincount(codes, minlength=len(values)), kind="stable")[:SHOWN]
            words = list(values)
            self._codes[name], self._values[name] = codes, values
            self._rows[name] = np.repeat(np.arange(len(lists)), [len(one) for one in lists])
            self._shown[name] = [words[code] for code in frequent.tolist()]
            self._size = len(lists)

    def shown(self) -> dict[str, list[str]]:
        """The most frequent values of each facet."""
        return {name: list(values) for name, values in self._shown.items()}

    def allowed(self, wanted: Filter) -> np.ndarray | None:
        """bool [rows]: the items that a filter leaves; None for a filter that asks nothing.

        Raises `RequestError` for a facet or a value that there is not.
        """
        found: np.ndarray | None = None
        for name, values in wanted.items():
            if name not in self._codes:
                raise RequestError(
                    f"there is no facet {_short(name)}",
                    where="filter",
                    expected="one of: " + ", ".join(self._codes) if self._codes else "no filter: the model has none",
                )
            known = self._values[name]
            for value in values:
                if value not in known:
                    some = ", ".join(self._shown[name][:10])
                    raise RequestError(
                        f"no item has {_short(value)}",
                        where=f"filter.{_short(name)}",
                        expected=f"one of: {some}{', ...' if len(known) > 10 else ''}",
                    )
            one = np.zeros(self._size, bool)
            one[self._rows[name][np.isin(self._codes[name], [known[value] for value in values])]] = True
            found = one if found is None else found & one
        return found


def _short(text: str) -> str:
    """ASCII only and cut, so that it can always be sent back."""
    shown = text.encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= 60 else shown[:57] + "..."
