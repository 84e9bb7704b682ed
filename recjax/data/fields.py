"""Fields: what a ranker is told about a row, declared once for preparing, training and serving.

A row (an impression, a rating, a candidate) is a set of raw columns; a declaration makes one field of each column that
it names. Fields of ids, words, buckets and crosses share one table: a field owns a range of its rows, first one for
"missing", then one for "unknown", then its values. Row 0 of the table is padding and row 1 stays unused, so that rows
are touched the same way as those of items. Fields of numbers and vectors have no rows.

Only the declarations are here, and the shapes that follow from them. `field_encoder.py` fits and applies them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from recjax.core.errors import ConfigError
from recjax.data.vocab import ROW_MULTIPLE

FIRST_ROW = 2  # of the first field: 0 is padding, 1 is touched by every step of a row-wise optimiser and left alone
MISSING, UNKNOWN, FIRST_VALUE = 0, 1, 2  # within the rows of a field
PRESENT = ".present"
SCALES = ("none", "standard", "quantile")


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """One field for each of `columns`, called as the column with `suffix` behind it."""

    columns: Sequence[str]
    suffix: str = ""
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", _names(self.columns))
        if not self.columns:
            raise ConfigError(f"{type(self).__name__} of no column", where=f"{type(self).__name__}.columns")

    @property
    def sources(self) -> Sequence[tuple[str, Sequence[str]]]:
        """(name of the field, columns that it reads) for each field."""
        return [(column + self.suffix, (column,)) for column in self.columns]

    def _check(self, name: str, is_good: bool, expected: str) -> None:
        if not is_good:
            raise ConfigError(f"{type(self).__name__}.{name} = {getattr(self, name)!r}", expected=expected)


@dataclass(frozen=True, kw_only=True)
class Categorical(Declaration):
    """One value of many. Values with fewer than `min_count` training rows count as unknown.

    With `buckets` above 0 there is no vocabulary: a value is hashed to one of so many rows, or with `hashes` above 1 to
    that many of them, which collide differently (Svenstrup et al. 2017).
    """

    min_count: int = 1
    buckets: int = 0
    hashes: int = 1
    kind: ClassVar[str] = "categorical"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("min_count", self.min_count >= 1, "at least 1")
        self._check("buckets", self.buckets >= 0, "0 for a vocabulary, or the number of rows")
        self._check("hashes", self.hashes == 1 or (self.hashes > 1 and self.buckets > 0), "1, or more with buckets")


@dataclass(frozen=True, kw_only=True)
class MultiValued(Declaration):
    """Several values without an order, the first `limit` of a list, or of a text cut at each `separator`."""

    limit: int = 8
    separator: str = "|"
    min_count: int = 1
    buckets: int = 0
    kind: ClassVar[str] = "multi_valued"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("limit", self.limit >= 1, "at least 1")
        self._check("min_count", self.min_count >= 1, "at least 1")
        self._check("buckets", self.buckets >= 0, "0 for a vocabulary, or the number of rows")


@dataclass(frozen=True, kw_only=True)
class Words(Declaration):
    """The words of a text and their character n-grams, the first `limit` of all, hashed to `buckets` rows."""

    buckets: int
    limit: int = 64
    ngrams: Sequence[int] = (3, 3)
    kind: ClassVar[str] = "multi_valued"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ngrams", tuple(self.ngrams) or (0, 0))
        self._check("buckets", self.buckets >= 1, "at least 1")
        self._check("limit", self.limit >= 1, "at least 1")
        self._check("ngrams", len(self.ngrams) == 2 and 0 <= self.ngrams[0] <= self.ngrams[1], "(shortest, longest)")


@dataclass(frozen=True, kw_only=True)
class SequenceOf(Declaration):
    """The last `limit` values of a list, oldest first, which are values of the field `of` and share its rows; without
    one they have rows of their own."""

    of: str = ""
    limit: int = 50
    separator: str = "|"
    kind: ClassVar[str] = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("limit", self.limit >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class SameAs(Declaration):
    """One value of the field `of`, whose rows it shares: the source item of a request beside its target."""

    of: str
    kind: ClassVar[str] = "categorical"


@dataclass(frozen=True, kw_only=True)
class CatalogueItem(Declaration):
    """An item by its row in the catalogue, also one that no training row has: for what is known of items besides their
    rows (facts, such as pieces of semantic ids). It has no rows of the table itself, nor have sequences of it."""

    kind: ClassVar[str] = "item"


@dataclass(frozen=True, kw_only=True)
class Bucketed(Declaration):
    """A number as one of several ranges: the given `edges` (ascending; a range holds its lower edge), or `quantiles`
    ranges of equally many training rows."""

    suffix: str = ".bucket"
    edges: Sequence[float] = ()
    quantiles: int = 10
    kind: ClassVar[str] = "categorical"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "edges", tuple(map(float, self.edges)))
        ascending = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        self._check("edges", ascending, "numbers in ascending order")
        self._check("quantiles", self.quantiles >= 2, "at least 2")


@dataclass(frozen=True, kw_only=True)
class Cross(Declaration):
    """All columns together as one value, hashed to `buckets` rows; the name joins those of the columns with "_x_"."""

    buckets: int
    kind: ClassVar[str] = "categorical"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("columns", len(self.columns) >= 2, "at least two columns")
        self._check("buckets", self.buckets >= 1, "at least 1")

    @property
    def sources(self) -> Sequence[tuple[str, Sequence[str]]]:
        return [("_x_".join(self.columns) + self.suffix, self.columns)]


@dataclass(frozen=True, kw_only=True)
class Numeric(Declaration):
    """A number. With `log` it is sign(x) log(1 + |x|) first; `scale` "standard" then subtracts the mean and divides by
    the deviation of the training rows, "quantile" gives the share of them below it, between -1 and 1. What is farther
    than `clip` from 0 is cut. A missing number is 0, and with `presence` a field `<name>.present` says 1 or 0."""

    log: bool = False
    scale: str = "standard"
    clip: float = 5.0
    presence: bool = True
    kind: ClassVar[str] = "numeric"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("scale", self.scale in SCALES, " or ".join(map(repr, SCALES)))
        self._check("clip", self.clip > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class Vector(Declaration):
    """A vector known beforehand, found by the value of the column among the ids of `vectors` of the data directory;
    zero where there is none. With `presence` a field `<name>.present` says which."""

    vectors: str = "content"
    suffix: str = ".vector"
    presence: bool = True
    kind: ClassVar[str] = "vector"


@dataclass(frozen=True, kw_only=True)
class FieldShape:
    """What a model must know of a field.

    kind            batch
    categorical     field/<name> int32 [b]          rows of the table
    multi_valued    field/<name> int32 [b, width]   rows, 0 padded on the right, without an order; hashes too
    sequence        field/<name> int32 [b, width]   rows, of the field `of` if any, oldest first, 0 padded on the right
    item            field/<name> int32 [b]          rows of the catalogue, as facts have them; a sequence `of` it too
    numeric         field/<name> float32 [b]        presence bits too
    vector          field/<name> float32 [b, width]

    Rows `offset` to `offset + rows - 1` of the table are the field's: missing, unknown, values. A field that shares
    those of another has the same offset and rows, and that one's name as `of`. Without a table `rows` is 0.
    """

    name: str
    kind: str
    width: int = 0
    rows: int = 0
    offset: int = 0
    of: str = ""

    def told(self) -> dict[str, Any]:
        """For the manifest, where `fields` lists the shapes of all fields in order."""
        return asdict(self)


def shapes_of(manifest: Mapping[str, Any]) -> tuple[FieldShape, ...]:
    """The fields of prepared examples, from their manifest; empty where examples have none."""
    return tuple(FieldShape(**told) for told in manifest.get("fields", ()))


def table_rows(shapes: Iterable[FieldShape]) -> int:
    """Rows of the shared table, padding included, rounded up to a multiple of 128 so that devices can split it."""
    end = max((s.offset + s.rows for s in shapes), default=FIRST_ROW)
    return -(-end // ROW_MULTIPLE) * ROW_MULTIPLE


def _names(columns: Sequence[str] | str) -> tuple[str, ...]:
    return (columns,) if isinstance(columns, str) else tuple(columns)
