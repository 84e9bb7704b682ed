"""The encoder of a ranker's fields: fitted once on training rows, then the same code for every row ever encoded.

    raw columns --store--> records (what is written to disk) --batch--> the fields of a batch

`encode` is both at once, which is what a server calls. So a served row and a training row can only differ where their
raw columns do. The state is plain JSON plus the arrays of vectors, and its hash travels with examples and checkpoints.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recjax.core.errors import ConfigError, DataError, ExamplesError
from recjax.core.folder import hash_of
from recjax.data.fields import (
    FIRST_ROW,
    Bucketed,
    CatalogueItem,
    Categorical,
    Cross,
    Declaration,
    FieldShape,
    MultiValued,
    Numeric,
    SameAs,
    SequenceOf,
    Vector,
    Words,
    table_rows,
)
from recjax.data.fitted_fields import (
    Coding,
    Columns,
    Fitted,
    Hash,
    ManyRows,
    Number,
    OneRow,
    Ranges,
    Vectors,
    Vocabulary,
    fitted_of,
    presence_shapes,
    transformed,
)
from recjax.data.raw import Raw, text_of

FORMAT = 1
CODES, NUMBERS = "codes", "numbers"
_QUANTILES = 101

# What vectors a field may have, by name: float32 [n, width] and their n ids.
VectorTables = Mapping[str, tuple[np.ndarray, np.ndarray | Sequence[Any]]]


@dataclass(frozen=True)
class FieldEncoder:
    """Fitted fields in order of declaration."""

    fields: tuple[Fitted, ...]

    @classmethod
    def fit(
        cls,
        declared: Sequence[Declaration],
        columns: Columns,
        vectors: VectorTables | None = None,
        catalogue: Sequence[str] = (),
    ) -> FieldEncoder:
        """Learn vocabularies, scales and ranges from the columns of the training rows; `catalogue` are the ids of all
        items in order of their rows.

        Raises `ConfigError` for two fields of one name or a field that shares rows with one that is not there,
        `DataError` for a column that is missing or of the wrong kind.
        """
        found: dict[str, Fitted] = {}
        offset = FIRST_ROW
        for one in declared:
            for name, sources in one.sources:
                if name in found:
                    raise ConfigError(f"two fields are named {name}", mend="give one of them a suffix")
                if isinstance(one, CatalogueItem):
                    field = _item(FieldShape(name=name, kind=one.kind), tuple(sources), columns, catalogue)
                else:
                    field = _fit(one, name, tuple(sources), columns, found, vectors or {}, offset)
                offset += 0 if field.shape.of else field.shape.rows
                found[name] = field
        if not found:
            raise ConfigError("a ranker without fields", where="fields", expected="at least one")
        encoder = cls(tuple(found.values()))
        names = [shape.name for shape in encoder.shapes]
        if len(set(names)) != len(names):
            raise ConfigError(f"fields named alike: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
        return encoder

    @functools.cached_property
    def shapes(self) -> tuple[FieldShape, ...]:
        """The fields of a batch; a presence bit follows its field."""
        return tuple(s for field in self.fields for s in (field.shape, *presence_shapes(field)))

    @property
    def table_rows(self) -> int:
        """Rows of the shared table."""
        return table_rows(self.shapes)

    @property
    def columns(self) -> tuple[str, ...]:
        """The raw columns that it reads."""
        every = [c for f in self.fields for c in (f.columns if isinstance(f, OneRow) else (f.column,))]
        return tuple(dict.fromkeys(every))

    @property
    def widths(self) -> dict[str, int]:
        """How many values a record has: rows and places of vectors as `codes`, numbers as `numbers`."""
        numbers = sum(1 + field.presence for field in self._numbers)
        found = {CODES: sum(_width(field) for field in self._coded), NUMBERS: numbers}
        return {name: width for name, width in found.items() if width}

    def store(self, columns: Columns) -> dict[str, np.ndarray]:
        """The columns as records: `codes` int32 [n, c] and `numbers` float32 [n, d]."""
        parts = {CODES: [f(columns) for f in self._coded], NUMBERS: [f(columns) for f in self._numbers]}
        return {name: np.concatenate(part, axis=1) for name, part in parts.items() if part}

    def batch(self, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`field/<name>` of records, as `FieldShape` says."""
        found: dict[str, np.ndarray] = {}
        at = 0
        for field in self._coded:
            part = np.ascontiguousarray(stored[CODES][:, at : at + _width(field)])
            at += part.shape[1]
            found[_key(field.shape)] = part if field.shape.width and not isinstance(field, Vectors) else part[:, 0]
            if isinstance(field, Vectors):
                found[_key(field.shape)] = field.array[part[:, 0]]
                found |= {_key(bit): (part[:, 0] > 0).astype(np.float32) for bit in presence_shapes(field)}
        numeric = [s for field in self._numbers for s in (field.shape, *presence_shapes(field))]
        found |= {_key(s): np.ascontiguousarray(stored[NUMBERS][:, k]) for k, s in enumerate(numeric)}
        return {_key(shape): found[_key(shape)] for shape in self.shapes}

    def encode(self, columns: Columns) -> dict[str, np.ndarray]:
        """`field/<name>` of raw columns."""
        return self.batch(self.store(columns))

    def told(self) -> dict[str, Any]:
        """All but the arrays, as JSON."""
        return {"format": FORMAT, "fields": [{"shape": f.shape.told(), **f.told()} for f in self.fields]}

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of fields of vectors by name."""
        return {f.shape.name: f.array for f in self.fields if isinstance(f, Vectors)}

    @classmethod
    def from_told(cls, told: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> FieldEncoder:
        """Raises `ExamplesError` for another format."""
        if told.get("format") != FORMAT:
            raise ExamplesError(f"fields of format {told.get('format')!r}", expected=f"format {FORMAT}")
        return cls(tuple(fitted_of(FieldShape(**field["shape"]), field, arrays) for field in told["fields"]))

    @functools.cached_property
    def hash(self) -> str:
        """16 hexadecimal digits of all that is fitted."""
        return hash_of({**self.told(), "arrays": {name: _digest(a) for name, a in self.arrays().items()}})

    @functools.cached_property
    def _coded(self) -> list[OneRow | ManyRows | Vectors]:
        return [f for f in self.fields if not isinstance(f, Number)]

    @functools.cached_property
    def _numbers(self) -> list[Number]:
        return [f for f in self.fields if isinstance(f, Number)]


def _fit(
    one: Declaration,
    name: str,
    sources: tuple[str, ...],
    columns: Columns,
    known: Mapping[str, Fitted],
    vectors: VectorTables,
    offset: int,
) -> Fitted:
    shape = FieldShape(name=name, kind=one.kind, offset=offset)
    _check_columns(sources, columns, name)
    column = columns[sources[0]]
    if isinstance(one, Categorical):
        if one.hashes > 1:
            codings = tuple(Hash(one.buckets, number) for number in range(one.hashes))
            shape = replace(shape, kind="multi_valued", width=one.hashes, rows=codings[0].rows)
            return ManyRows(shape, sources[0], codings)
        coding = Hash(one.buckets) if one.buckets else _vocabulary(column, one.min_count)
        return OneRow(replace(shape, rows=coding.rows), sources, coding)
    if isinstance(one, MultiValued):
        lists = column.lists(one.separator)
        coding = Hash(one.buckets) if one.buckets else _vocabulary(lists, one.min_count)
        return ManyRows(replace(shape, width=one.limit, rows=coding.rows), sources[0], (coding,), one.separator)
    if isinstance(one, Words):
        coding = Hash(one.buckets)
        shape = replace(shape, width=one.limit, rows=coding.rows)
        return ManyRows(shape, sources[0], (coding,), words=tuple(one.ngrams))
    if isinstance(one, SequenceOf) and not one.of:
        coding = _vocabulary(column.lists(one.separator), 1)
        shape = replace(shape, width=one.limit, rows=coding.rows)
        return ManyRows(shape, sources[0], (coding,), one.separator, last=True)
    if isinstance(one, SameAs | SequenceOf):
        shared, coding = _shared(one, name, known)
        shape = replace(shape, of=one.of, rows=shared.rows, offset=shared.offset)
        if isinstance(one, SameAs):
            return OneRow(shape, sources, coding)
        return ManyRows(replace(shape, width=one.limit), sources[0], (coding,), one.separator, last=True)
    if isinstance(one, Bucketed):
        edges = one.edges or _edges(_known_numbers(column, name), one.quantiles)
        coding = Ranges(tuple(edges))
        return OneRow(replace(shape, rows=coding.rows), sources, coding)
    if isinstance(one, Cross):
        coding = Hash(one.buckets)
        return OneRow(replace(shape, rows=coding.rows), sources, coding)
    if isinstance(one, Numeric):
        return _number(one, replace(shape, offset=0), sources[0], column)
    if isinstance(one, Vector):
        return _vectors(one, replace(shape, offset=0), sources[0], vectors)
    raise TypeError(f"unknown declaration {type(one).__name__}")


def _check_columns(sources: Sequence[str], columns: Columns, name: str) -> None:
    for source in sources:
        if source not in columns:
            expected = ", ".join(sorted(columns))
            raise DataError(f"there is no column {source}", where=f"field {name}", expected=f"one of {expected}")


def _item(shape: FieldShape, sources: tuple[str, ...], columns: Columns, catalogue: Sequence[str]) -> OneRow:
    """Rows of the catalogue: padding for missing, the unknown item, and the items from `FIRST_VALUE` on."""
    _check_columns(sources, columns, shape.name)
    return OneRow(shape, sources, Vocabulary(tuple(catalogue)))


def _vocabulary(column: Raw, min_count: int) -> Vocabulary:
    """The texts that occur often enough, most frequent first, then in order of the text."""
    codes, texts = column.keys
    present = codes if column.offsets is not None else codes[~column.missing]
    counts = np.bincount(present, minlength=len(texts))
    kept = [k for k in range(len(texts)) if counts[k] >= min_count]
    return Vocabulary(tuple(texts[k] for k in sorted(kept, key=lambda k: (-int(counts[k]), texts[k]))))


def _shared(one: SameAs | SequenceOf, name: str, known: Mapping[str, Fitted]) -> tuple[FieldShape, Coding]:
    other = known.get(one.of)
    if not isinstance(other, OneRow) or len(other.columns) > 1:
        rows = [n for n, field in known.items() if isinstance(field, OneRow) and len(field.columns) == 1]
        raise ConfigError(
            f"the field {name} is to share the rows of {one.of!r}",
            where=f"{type(one).__name__}.of",
            expected=f"a field of single values declared before it: {', '.join(rows) or 'there is none'}",
        )
    return other.shape, other.coding


def _known_numbers(column: Raw, name: str) -> np.ndarray:
    return column.numbers(f"field {name}")[~column.missing]


def _edges(values: np.ndarray, ranges: int) -> list[float]:
    """Where `ranges` equally large parts meet; fewer where values are alike."""
    if not len(values):
        return []
    found = np.unique(np.quantile(values, np.arange(1, ranges) / ranges))
    return found[found > values.min()].tolist()


def _number(one: Numeric, shape: FieldShape, source: str, column: Raw) -> Number:
    values = transformed(_known_numbers(column, shape.name), one.log)
    mean, deviation, quantiles = 0.0, 1.0, ()
    if one.scale == "standard" and len(values):
        mean, spread = float(values.mean()), float(values.std())
        deviation = spread if spread > 1e-12 * max(1.0, abs(mean)) else 1.0
    elif one.scale == "quantile" and len(values):
        quantiles = tuple(np.quantile(values, np.linspace(0, 1, _QUANTILES)).tolist())
    return Number(shape, source, one.log, mean, deviation, quantiles, one.clip, one.presence)


def _vectors(one: Vector, shape: FieldShape, source: str, vectors: VectorTables) -> Vectors:
    if one.vectors not in vectors:
        raise DataError(
            f"there are no vectors {one.vectors!r}",
            where=f"field {shape.name}",
            expected=f"one of {', '.join(vectors)}" if vectors else f"vectors/{one.vectors}.npy in the data directory",
        )
    array, ids = vectors[one.vectors]
    padded = np.concatenate([np.zeros((1, array.shape[1]), np.float32), np.asarray(array, np.float32)])
    ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
    shape = replace(shape, width=array.shape[1])
    return Vectors(shape, source, tuple(text_of(i) for i in ids), padded, one.presence)


def _width(field: OneRow | ManyRows | Vectors) -> int:
    """Codes of a field in a record."""
    return field.shape.width if isinstance(field, ManyRows) else 1


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()


def _key(shape: FieldShape) -> str:
    return f"field/{shape.name}"
