"""What stands in for parts of a request that are not there, alike in training and serving.

A ranker that serves several kinds of requests gives all of them the same columns, and each kind lacks some. UniCoRn
(Bhattacharya et al. 2024, section 3) lets a recommendation ask with the name of its source item as the query, so that
what was learned of queries holds for it as well. Whether a column was there is kept as a column of its own, so that a
model can tell what was said from what was filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recjax.core.errors import ConfigError, DataError
from recjax.data.fields import PRESENT
from recjax.data.raw import Raw


@dataclass(frozen=True, kw_only=True)
class Impute:
    """Where `column` is missing it takes the first of `sources` that is there, else `value`, else it stays missing.

    The column `<column>.present` is 1 where it was there before, else 0. Without sources and value nothing is filled:
    that is the ablation without imputation. With `plain` text is brought into lower case with single spaces, so that
    what was typed and what was filled in are one key of counters.
    """

    column: str
    sources: Sequence[str] = ()
    value: str | float | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.column:
            raise ConfigError("Impute of no column", where="Impute.column")

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


# Search asks with a query, more-like-this with a source item, and a page before any query with neither; people may be
# unknown. A missing source, query or person is a row of its own (the field's row for "missing").
UNICORN = (
    Impute(column="source_id"),
    Impute(column="query", sources=("source_title",), plain=True),
    Impute(column="user_id"),
    Impute(column="user_cluster", value="0"),
)


def imputed(columns: Mapping[str, Raw], rules: Sequence[Impute]) -> dict[str, Raw]:
    """The columns after all rules in order, with the columns `<column>.present` besides.

    Raises `DataError` when a source is not among the columns; a column that is not there is missing in every row.
    """
    found, count = dict(columns), max(map(len, columns.values()), default=0)
    for rule in rules:
        column = found.get(rule.column)
        if column is None:
            column = Raw.constant(None, count)
        found[rule.column + PRESENT] = Raw((~column.missing).astype(np.int64), np.zeros(len(column), bool))
        for source in rule.sources:
            if source not in found:
                raise DataError(
                    f"{rule.column} is to be filled from {source}, which is not there",
                    where=f"Impute of {rule.column}",
                    expected=", ".join(sorted(found)),
                )
            column = column.otherwise(found[source])
        if rule.value is not None:
            column = column.otherwise(Raw.constant(rule.value, len(column)))
        found[rule.column] = _plain(column) if rule.plain else column
    return found


def _plain(column: Raw) -> Raw:
    """Texts in lower case, with single spaces; other values as they are."""
    if column.values.dtype != object or not len(column.values):
        return column
    codes, texts = column.keys
    plain = np.array([" ".join(text.lower().split()) for text in texts], object)
    return Raw(plain[codes], column.missing, column.offsets)
