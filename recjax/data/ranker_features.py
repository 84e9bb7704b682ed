"""All that lies between a request and the fields of a ranker, as one object for preparing, training and serving.

    raw columns of a row --join--> and those of its item and user --impute--> --encode--> fields

What items and users are known by is kept here too, and what counters and histories said when the log ended
(`snapshots.py`), so that a server needs the id of a candidate and nothing else of it.
Saved as `features.json` and, where fields have vectors, `features.npz`; numpy and JSON only.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recjax.core.errors import ConfigError, ExamplesError
from recjax.core.folder import hash_of
from recjax.data.field_encoder import FieldEncoder
from recjax.data.fields import PRESENT
from recjax.data.fitted_fields import ManyRows, Number, OneRow, Ranges
from recjax.data.imputation import Impute, imputed
from recjax.data.raw import Raw
from recjax.data.snapshots import Snapshot, filled

FILE, ARRAYS = "features.json", "features.npz"
# A context and its candidates: the columns that all rows share, and those of each.
Request = tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]
TABLES = {"items": "item_id", "users": "user_id", "queries": "query_id"}


@dataclass(frozen=True, kw_only=True)
class Join:
    """Give a row the columns that a table has for the id in its column `key`, each with `prefix` in front.

    Columns of a name that the log itself has are not joined.
    """

    table: str = "items"
    key: str = "item_id"
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.table not in TABLES:
            raise ConfigError(f"Join.table = {self.table!r}", expected=" or ".join(map(repr, TABLES)))


@dataclass(frozen=True)
class SideTable:
    """Columns by id; row k of each belongs to `ids[k]`, and `key` is the column of a request that holds the id."""

    key: str
    ids: tuple[str, ...]
    columns: Mapping[str, Raw]

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {text: k for k, text in enumerate(self.ids)}

    def __call__(self, key: Raw) -> dict[str, Raw]:
        """The columns for ids, missing where an id is missing or unknown."""
        codes, texts = key.keys
        rows = np.array([self._row_of.get(text, -1) for text in texts], np.int64)[codes]
        rows = np.where(key.missing, -1, rows)
        return {name: column.take(rows) for name, column in self.columns.items()}

    def told(self) -> dict[str, Any]:
        """As JSON."""
        columns = {name: column.told() for name, column in self.columns.items()}
        return {"key": self.key, "ids": list(self.ids), "columns": columns}

    @classmethod
    def from_told(cls, told: Mapping[str, Any]) -> SideTable:
        columns = {name: Raw.from_told(column) for name, column in told["columns"].items()}
        return cls(told["key"], tuple(told["ids"]), columns)


def owners(requests: Sequence[Request]) -> np.ndarray:
    """int64 [n]: the request of each row."""
    return np.repeat(np.arange(len(requests)), [len(candidates) for _, candidates in requests])


def completed(columns: Mapping[str, Raw], sides: Sequence[SideTable], rules: Sequence[Impute]) -> dict[str, Raw]:
    """Raw columns with those of the side tables, imputed."""
    found = dict(columns)
    for side in sides:
        if side.key in found:
            found = {**side(found[side.key]), **found}
    return imputed(found, rules)


@dataclass(frozen=True)
class RankerFeatures:
    """Side tables, rules of imputation, the encoder, and what counters said when the log ended."""

    sides: tuple[SideTable, ...]
    rules: tuple[Impute, ...]
    encoder: FieldEncoder
    snapshots: tuple[Snapshot, ...] = ()

    def complete(self, columns: Mapping[str, Raw]) -> dict[str, Raw]:
        """Rows with all that is known of them: joined, imputed, counters that they lack as when the log ended."""
        complete = completed(columns, self.sides, self.rules)
        if not self.snapshots:
            return complete
        lists = {name: columns[name].lists(mark) for name, mark in self._listed.items() if name in columns}
        columns = filled({**columns, **lists}, complete, self.snapshots)
        if any({rule.column, *rule.sources} & self.remembered.keys() for rule in self.rules):
            return completed(columns, self.sides, self.rules)
        return complete | {name: columns[name] for name in self.remembered}

    def store(self, columns: Mapping[str, Raw]) -> dict[str, np.ndarray]:
        """Rows as records (see `FieldEncoder.store`)."""
        return self.encoder.store(self.complete(columns))

    def encode(self, columns: Mapping[str, Raw]) -> dict[str, np.ndarray]:
        """Rows as the fields of a batch."""
        return self.encoder.batch(self.store(columns))

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The fields of rows as JSON has them; what a row does not say is missing."""
        return self.encode({name: Raw.of([row.get(name) for row in rows]) for name in self.asked})

    def request(
        self, context: Mapping[str, Any], candidates: Sequence[Any], *, item: str = "item_id"
    ) -> dict[str, np.ndarray]:
        """The fields of the rows that a context makes with each candidate: its id, or the columns it brings."""
        own = [c if isinstance(c, Mapping) else {item: c} for c in candidates]
        return self.fields_of([(context, own)])

    def fields_of(self, requests: Sequence[Request]) -> dict[str, np.ndarray]:
        """The fields of the rows of several requests, those that no candidate changes made once for each request."""
        contexts, rows = self.parts_of(requests)
        owner = owners(requests)
        found = rows | {name: values[owner] for name, values in contexts.items()}
        return {f"field/{shape.name}": found[f"field/{shape.name}"] for shape in self.encoder.shapes}

    def parts_of(self, requests: Sequence[Request]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The fields that are alike for all candidates of a request, of each of r requests, and the others, of all
        rows."""
        once, each = self._parts(frozenset(name for _, candidates in requests for row in candidates for name in row))
        contexts = self.complete(self.rows_of([(context, [{}]) for context, _ in requests])) if once.fields else {}
        rows = self.complete(self.rows_of(requests)) if each.fields else {}
        return once.encode(contexts) if once.fields else {}, each.encode(rows) if each.fields else {}

    def alike(self, said: Iterable[str]) -> tuple[str, ...]:
        """The fields that are alike for all candidates of a request, when these say such columns."""
        return tuple(f"field/{shape.name}" for shape in self._parts(frozenset(said))[0].shapes)

    def _parts(self, said: frozenset[str]) -> tuple[FieldEncoder, FieldEncoder]:
        """The fields that are alike for all candidates when these say such columns, and the others."""
        if said not in self._parts_of:
            varied, before = set(said), 0
            while before < len(varied):  # what is joined, filled in or remembered by what varies varies as well
                before = len(varied)
                for side in self.sides:
                    varied |= set(side.columns) if side.key in varied else set()
                for rule in self.rules:
                    if varied & {rule.column, *rule.sources}:
                        varied |= {rule.column, rule.column + PRESENT}
                for snapshot in self.snapshots:
                    varied |= set(snapshot.columns) if varied & set(snapshot.on) else set()
            fields = self.encoder.fields
            moves = [bool(varied & set(f.columns if isinstance(f, OneRow) else (f.column,))) for f in fields]
            once, each = (tuple(f for f, m in zip(fields, moves, strict=True) if m is v) for v in (False, True))
            self._parts_of[said] = FieldEncoder(once), FieldEncoder(each)
        return self._parts_of[said]

    @functools.cached_property
    def _parts_of(self) -> dict[frozenset[str], tuple[FieldEncoder, FieldEncoder]]:
        return {}

    def rows_of(self, requests: Sequence[Request], more: Sequence[str] = ()) -> dict[str, Raw]:
        """The raw columns of all rows of several requests, one after the other, and those `more` besides what is asked.

        A row is a candidate's columns, and the context's where the candidate says nothing of one.
        """
        owner = owners(requests)
        said = {name for _, candidates in requests for row in candidates for name in row}
        found = {}
        for name in dict.fromkeys((*self.asked, *more)):
            if name in said:
                values = [row[name] if name in row else c.get(name) for c, rows in requests for row in rows]
                found[name] = Raw.of(values)
            else:
                found[name] = Raw.of([context.get(name) for context, _ in requests]).take(owner)
        return found

    @functools.cached_property
    def asked(self) -> tuple[str, ...]:
        """The columns that a row may say: all that are read, whether here or from a side table."""
        read = [*self.encoder.columns, *(side.key for side in self.sides)]
        read += [name for rule in self.rules for name in (rule.column, *rule.sources)]
        read += [name for snapshot in self.snapshots for name in snapshot.on]
        known = {name for side in self.sides for name in side.columns}
        made = {rule.column + PRESENT for rule in self.rules}
        return tuple(name for name in dict.fromkeys(read) if name not in known | made)

    @functools.cached_property
    def kinds(self) -> dict[str, str]:
        """What a row may say of each column that is asked: "number", "list" (or a single value) or "value"."""
        found = dict.fromkeys(self.asked, "value")
        for field in self.encoder.fields:
            names = field.columns if isinstance(field, OneRow) else (field.column,)
            if isinstance(field, ManyRows) and not field.words:
                found |= {name: "list" for name in names if name in found}
            if isinstance(field, Number) or (isinstance(field, OneRow) and isinstance(field.coding, Ranges)):
                found |= {name: "number" for name in names if name in found}
        keys = [side.key for side in self.sides] + [name for snapshot in self.snapshots for name in snapshot.on]
        return found | {name: "value" for name in keys if found.get(name) == "list"}

    @functools.cached_property
    def remembered(self) -> dict[str, tuple[str, ...]]:
        """The columns that a row may leave to what the log said when it ended, and the columns these go by."""
        return {name: snapshot.on for snapshot in self.snapshots for name in snapshot.columns}

    @functools.cached_property
    def _listed(self) -> dict[str, str]:
        """The remembered columns that hold lists, and what cuts a text into one."""
        several = {field.column: field.separator for field in self.encoder.fields if isinstance(field, ManyRows)}
        return {name: mark for name, mark in several.items() if name in self.remembered}

    @functools.cached_property
    def hash(self) -> str:
        """16 hexadecimal digits of everything."""
        return hash_of({**self.told(), "encoder": self.encoder.hash})

    def told(self) -> dict[str, Any]:
        """All but the arrays, as JSON."""
        return {
            "sides": [side.told() for side in self.sides],
            "rules": [rule.told() for rule in self.rules],
            "encoder": self.encoder.told(),
            "snapshots": [snapshot.told() for snapshot in self.snapshots],
        }

    def files(self) -> dict[str, bytes]:
        """Name -> content of the files that `load` reads."""
        found = {FILE: json.dumps(self.told(), ensure_ascii=False).encode()}
        if arrays := self.encoder.arrays():
            packed = io.BytesIO()
            np.savez(packed, **arrays)  # type: ignore[arg-type]
            found[ARRAYS] = packed.getvalue()
        return found

    @classmethod
    def load(cls, folder: Path) -> RankerFeatures:
        """Raises `ExamplesError` where the files are missing or of another format."""
        try:
            told = json.loads((folder / FILE).read_text(encoding="utf-8"))
            arrays: dict[str, np.ndarray] = {}
            if (folder / ARRAYS).exists():
                with np.load(folder / ARRAYS, allow_pickle=False) as found:
                    arrays = dict(found)
            sides = tuple(map(SideTable.from_told, told["sides"]))
            rules = tuple(Impute(**rule) for rule in told["rules"])
            snapshots = tuple(map(Snapshot.from_told, told["snapshots"]))
            return cls(sides, rules, FieldEncoder.from_told(told["encoder"], arrays), snapshots)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExamplesError(
                f"the fields of a ranker cannot be read: {error}",
                where=str(folder / FILE),
                expected="examples of a task of impressions",
            ) from error
