"""The vectors that a ranker has learned for the values of its fields, passed on to other rankers by value.

An artifact of kind `field_tables` has for each field n of its `about`

    field<n>_vectors float32 [rows, d]   field<n>_count int64 [rows]   field<n>_texts [rows - 2], for a vocabulary

the rows being "missing", "unknown" and the values, and `count` how many training rows had each. `about` says between
which seconds these rows lie. A reader has other rows for the same values, and perhaps other values: `FieldTables` finds
each by its text, or by its place where both hash it alike, and never takes what was trained after its own rows begin.

    item/<name>         float32 [rows of the table, d]   zero where nothing is known
    item/<name>.known   float32 [rows of the table]      1 where the value had at least `min_count` training rows

are facts of a recipe: they get no gradient, have no state in the optimiser, and are not part of a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recjax.core.artifact import Artifact, open_artifact, read_artifact
from recjax.core.errors import ArtifactError, ConfigError
from recjax.data.examples import Examples
from recjax.data.fields import FIRST_VALUE
from recjax.data.fitted_fields import OneRow, Vocabulary
from recjax.data.ranker_features import RankerFeatures
from recjax.data.rows_feed import RowReader

KIND = "field_tables"
KNOWN = ".known"
_BLOCK = 65_536


@dataclass(frozen=True, kw_only=True)
class FieldTables:
    """Facts `item/<name>` and `item/<name>.known` from the artifact at `path`, or that of a `stage` of a system.

    Of `fields` (none named: all that both have) the values with at least `min_count` training rows are known. With
    `length` above 0 every vector is brought to this Euclidean length. `earlier` False takes tables that may have been
    trained on what the reader is trained on.
    """

    path: str
    stage: str = ""
    name: str = "start"
    fields: Sequence[str] = ()
    min_count: int = 1
    length: float = 0.0
    earlier: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        if not self.path or not self.name or self.min_count < 1 or self.length < 0:
            expected = "a place and a name, min_count at least 1, length at least 0"
            raise ConfigError("tables of fields cannot be like this", where=repr(self), expected=expected)

    def __call__(self, examples: Sequence[Examples]) -> dict[str, np.ndarray]:
        """Raises `ArtifactError` for an artifact that knows too much or does not have the fields."""
        one, path = examples[0], Path(self.path, self.stage, "artifacts", KIND) if self.stage else Path(self.path)
        artifact = read_artifact(path, kind=KIND)
        if self.earlier:
            check_earlier(artifact.manifest["about"].get("trained_times"), one, where=str(path))
        encoder = RankerFeatures.load(one.path).encoder
        here = {f.shape.name: f for f in encoder.fields if isinstance(f, OneRow) and not f.shape.of}
        there = {told["name"]: n for n, told in enumerate(artifact.manifest["about"]["fields"])}
        if missing := [name for name in self.fields if name not in here or name not in there]:
            known = ", ".join(sorted(set(here) & set(there)))
            raise ArtifactError(f"there is no table of {missing[0]}", where=str(path), expected=f"one of: {known}")
        names = self.fields or tuple(name for name in here if name in there)
        width = next((artifact[f"field{there[name]}_vectors"].shape[1] for name in names), 0)
        vectors, flags = np.zeros((encoder.table_rows, width), np.float32), np.zeros(encoder.table_rows, np.float32)
        for name in names:
            field = here[name]
            rows, places = _matched(field, artifact, there[name])
            enough = np.asarray(artifact[f"field{there[name]}_count"])[places] >= self.min_count
            rows, places = field.shape.offset + rows[enough], places[enough]
            vectors[rows], flags[rows] = np.asarray(artifact[f"field{there[name]}_vectors"])[places], 1
        if self.length:
            norm = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors * (self.length / np.maximum(norm, 1e-12)).astype(np.float32)
        return {f"item/{self.name}": vectors, f"item/{self.name}{KNOWN}": flags}


@dataclass(frozen=True, kw_only=True)
class FieldCounts:
    """The fact `item/count` float32 [rows of the table]: how many training rows have each value of a `field`, of those
    with a positive label of `head` where one is named; 0 for all other rows of the table."""

    field: str = "item_id"
    head: str = ""

    def __call__(self, examples: Sequence[Examples]) -> dict[str, np.ndarray]:
        """Raises `ConfigError` where there is no such field of single values, or no such head."""
        encoder = RankerFeatures.load(examples[0].path).encoder
        fields = [f for f in encoder.fields if isinstance(f, OneRow)]
        if self.field not in [f.shape.name for f in fields]:
            expected = ", ".join(f.shape.name for f in fields)
            raise ConfigError(f"no field {self.field} of single values", where="FieldCounts", expected=expected)
        return {"item/count": _counts(examples[0], [self.field], encoder.table_rows, self.head).astype(np.float32)}


def write_tables(path: str | os.PathLike[str], examples: Examples, table: np.ndarray, **facts: Any) -> None:
    """Write the vectors [rows of the table, d] that fields of single values have; `facts` as for `open_artifact`."""
    encoder = RankerFeatures.load(examples.path).encoder
    fields = [f for f in encoder.fields if isinstance(f, OneRow) and not f.shape.of]
    counts = _counts(examples, [f.shape.name for f in fields], encoder.table_rows)
    about = {
        "task": examples.manifest["task"],
        "examples": examples.hash,
        "encoder": encoder.hash,
        "trained_times": examples.manifest.get("trained_times", []),
        "fields": [{"name": f.shape.name, "coding": _coding(f)} for f in fields],
    }
    with open_artifact(path, kind=KIND, about=about, vocabulary_hash=examples.vocab.hash, **facts) as writer:
        for n, field in enumerate(fields):
            mine = slice(field.shape.offset, field.shape.offset + field.shape.rows)
            writer.append(f"field{n}_vectors", np.asarray(table[mine], np.float32))
            writer.append(f"field{n}_count", counts[mine])
            if isinstance(field.coding, Vocabulary):
                writer.append(f"field{n}_texts", np.asarray(field.coding.texts, "U"))


def coverage(facts: dict[str, np.ndarray], name: str, examples: Examples) -> dict[str, float]:
    """The share of the training rows whose value of each field the tables know."""
    encoder = RankerFeatures.load(examples.path).encoder
    fields = [f for f in encoder.fields if isinstance(f, OneRow) and not f.shape.of]
    counts, known = _counts(examples, [f.shape.name for f in fields], encoder.table_rows), facts[f"item/{name}{KNOWN}"]
    found = {}
    for field in fields:
        mine = slice(field.shape.offset, field.shape.offset + field.shape.rows)
        found[field.shape.name] = float((counts[mine] * known[mine]).sum() / max(counts[mine].sum(), 1))
    return found


def check_earlier(trained: Sequence[int] | None, examples: Examples, *, where: str) -> None:
    """Raise `ArtifactError` unless what was trained between these seconds ended before the training rows begin."""
    begin = (examples.manifest.get("trained_times") or [None])[0]
    if not trained or begin is None:
        raise ArtifactError("nothing says when it was trained, or when these rows are of", where=where)
    if trained[1] >= begin:
        raise ArtifactError(
            f"it was trained on rows until {trained[1]}, and these begin at {begin}",
            where=where,
            expected="an artifact whose window ends before the rows of its reader begin",
            mend="take an earlier version, or say earlier = False where it may know the answers",
        )


def _matched(field: OneRow, artifact: Artifact, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a field here, and the rows of the same values there."""
    told, where = artifact.manifest["about"]["fields"][number]["coding"], str(artifact.path)
    if isinstance(field.coding, Vocabulary):
        if told != "vocabulary":
            raise ArtifactError(f"{field.shape.name} is hashed there and has a vocabulary here", where=where)
        row_of = {text: FIRST_VALUE + k for k, text in enumerate(np.asarray(artifact[f"field{number}_texts"]).tolist())}
        rows = [FIRST_VALUE + k for k, text in enumerate(field.coding.texts) if text in row_of]
        found = [row_of[text] for text in field.coding.texts if text in row_of]
        return np.asarray(rows, np.int64), np.asarray(found, np.int64)
    if told != _coding(field):
        raise ArtifactError(f"{field.shape.name} is {told} there and {_coding(field)} here", where=where)
    rows = np.arange(FIRST_VALUE, field.shape.rows)
    return rows, rows


def _coding(field: OneRow) -> Any:
    """What two fields must share for their rows to mean the same; "vocabulary" where texts say it."""
    return "vocabulary" if isinstance(field.coding, Vocabulary) else field.coding.told() | {"of": list(field.columns)}


def _counts(examples: Examples, names: Sequence[str], table_rows: int, head: str = "") -> np.ndarray:
    """int64 [table_rows]: how many training rows, or positives of a head, have a row of the table in these fields."""
    reader, found = RowReader(examples, "train"), np.zeros(table_rows, np.int64)
    if head and head not in reader.heads:
        raise ConfigError(f"no head {head!r}", where="FieldCounts.head", expected=", ".join(reader.heads))
    for start in range(0, len(reader), _BLOCK):
        batch = reader.read(np.arange(start, min(start + _BLOCK, len(reader))))
        chosen = batch[f"label/{head}"] >= 0.5 if head else np.ones(len(batch["weight"]), bool)
        for name in names:
            found += np.bincount(batch[f"field/{name}"][chosen].reshape(-1), minlength=table_rows)
    return found
