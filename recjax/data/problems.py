"""What reading a data directory found: problems with an address, and notes on what was understood.

Readers never stop at the first problem: they add it here and go on, so that `check` can show all of them at once
while `DataDir.load` raises the first error. This file knows nothing about formats or columns.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

from recjax.core.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong in a data directory. `row` is the 1-based data row (a header line does not count)."""

    severity: str  # "error": cannot be used; "warning": can be used, but look at it
    file: str
    what: str
    row: int | None = None
    column: str | None = None
    expected: str = ""
    mend: str = ""

    @property
    def where(self) -> str:
        parts = [self.file]
        parts += [f"row {self.row}"] if self.row is not None else []
        parts += [f"column {self.column}"] if self.column is not None else []
        return ", ".join(parts)

    def as_error(self) -> DataError:
        """The same message as an exception."""
        return DataError(self.what, where=self.where, expected=self.expected, mend=self.mend)


@dataclass
class Findings:
    """Problems and notes in the order in which they were found."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def error(self, file: str, what: str, **address) -> None:
        self.problems.append(Problem(severity="error", file=file, what=what, **address))

    def warn(self, file: str, what: str, **address) -> None:
        self.problems.append(Problem(severity="warning", file=file, what=what, **address))

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def errors(self) -> list[Problem]:
        return [p for p in self.problems if p.severity == "error"]

    def raise_first(self) -> None:
        """Raise the first error as `DataError`, saying how many more there are."""
        errors = self.errors
        if not errors:
            return
        first = errors[0].as_error()
        if len(errors) > 1:
            more = f"{len(errors) - 1} more: `recjax prepare --check DIR` lists them all"
            first = DataError(
                first.what, where=first.where, expected=first.expected, mend=f"{first.mend} ({more})".strip()
            )
        raise first


def rows(count: int) -> str:
    """ "1 row" or "1,234 rows"."""
    return "1 row" if count == 1 else f"{count:,} rows"


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate spelt most like `name` (case, spaces, dots and underscores do not count), or None."""
    plain = {_plain(c): c for c in candidates}
    close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.6)
    return plain[close[0]] if close else None


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
