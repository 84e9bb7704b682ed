"""What teachers said of the rows of a training split, kept so that many students can read it.

A store is a folder of parts and a manifest that names them. A part is what one version of a teacher said of some rows,
written once: a column of row numbers (uint64, ascending) and one of logits for each head (float16, NaN where it said
nothing). One writer publishes parts, many readers join: publishing writes the part, then replaces the manifest, so
that a reader has all of the one or all of the other. A store of other rows, or of the same in another order, is
refused; which fields a row is told of does not matter, so that a teacher may know more than its students.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recjax.core.artifact import open_artifact, read_artifact
from recjax.core.errors import ArtifactError, ConfigError
from recjax.core.folder import MANIFEST, hash_of, new_folder, read_manifest
from recjax.data.examples import Examples

KIND = "row_labels"
VERSION = "version"
_FORMAT = 2
_IDS, _PREFIX = "ids", "label_"


@dataclass(frozen=True, kw_only=True)
class LabelStore:
    """The store at `path`, or with `stage` what a stage of the system whose stages lie at `path` left as `kind`.

    `names` are the heads to read (none named: all); a batch has what was said as `teacher/<name>`, and as
    `teacher/version` who said it. A row that several versions speak of has the newest, or with `before` the newest
    that is not newer than that, or with `version` that one alone ("first": the oldest). Rows nobody speaks of are NaN;
    below a coverage of `least_coverage`, or where answers are more than `oldest` versions behind on average, there is
    a warning.
    """

    path: str
    stage: str = ""
    kind: str = KIND
    names: tuple[str, ...] = ()
    version: int | Literal["first"] | None = None
    before: int | None = None
    least_coverage: float = 0.5
    oldest: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if not self.path:
            raise ConfigError("a label store without a place", where="LabelStore.path", expected="an artifact")
        if self.version is not None and self.before is not None:
            raise ConfigError("a label store of one version and of earlier ones", mend="LabelStore.version or before")

    def read(self, examples: Examples) -> Joined:
        """What was said of the rows of the training split. Raises `ArtifactError` for a store of other examples."""
        path = Path(self.path, self.stage, "artifacts", self.kind) if self.stage else Path(self.path)
        manifest = _manifest_of(path)
        made_of, wanted = manifest["rows"], examples.manifest["rows_hash"]["train"]
        if made_of != wanted:
            raise ArtifactError(
                f"the labels are of the rows {made_of}",
                where=str(path),
                expected=f"{wanted}, the rows that the student is trained on",
                mend="let the teacher label the student's rows",
            )
        return self.join(path, manifest, np.arange(examples.count("train"), dtype=np.uint64))

    def join(self, path: Path, manifest: Mapping[str, Any], ids: np.ndarray) -> Joined:
        """What was said of the rows of these numbers, by the parts of a manifest that was read once."""
        names = self.names or tuple(manifest["names"])
        for name in names:
            if name not in manifest["names"]:
                expected = ", ".join(manifest["names"])
                raise ArtifactError(f"there are no labels {name!r}", where=str(path), expected=expected)
        versions = sorted({part[VERSION] for part in manifest["parts"]})
        known = [part for part in manifest["parts"] if self._allows(part[VERSION], versions[0])]
        if not known:
            wanted = self.version if self.version is not None else f"{self.before} or earlier"
            raise ArtifactError(f"there is no version {wanted}", where=str(path), expected=f"one of {versions}")
        values = {name: np.full(len(ids), np.nan, np.float32) for name in names}
        version = np.full(len(ids), -1, np.int64)
        for part in sorted(known, key=lambda part: (part[VERSION], part["period"])):  # the newest comes last, and stays
            found = read_artifact(path / part["folder"], kind=f"{KIND}_part")
            held = np.asarray(found[_IDS])
            at = np.minimum(np.searchsorted(held, ids), max(len(held) - 1, 0))
            mine = np.flatnonzero(held[at] == ids) if len(held) else np.empty(0, np.int64)
            version[mine] = part[VERSION]
            for name in names:
                values[name][mine] = found[_PREFIX + name][at[mine]]
        joined = Joined(values, version, versions[-1], hash_of([part["hash"] for part in known]))
        self._warn(joined, path)
        return joined

    def _allows(self, version: int, first: int) -> bool:
        if self.version is not None:
            return version == (first if self.version == "first" else self.version)
        return self.before is None or version <= self.before

    def _warn(self, joined: Joined, path: Path) -> None:
        if joined.coverage < self.least_coverage:
            warnings.warn(f"{path}: labels for {joined.coverage:.1%} of the rows", RuntimeWarning, stacklevel=4)
        if self.oldest is not None and joined.staleness > self.oldest:
            told = f"{path}: labels are {joined.staleness:.0f} versions behind the newest"
            warnings.warn(told, RuntimeWarning, stacklevel=4)


@dataclass(frozen=True)
class Joined:
    """`values[name]` float32 [n], NaN where nothing was said; `version` int64 [n] of who said it, -1 nobody.

    `newest` is the newest version of the store; `hash` tells the parts that were read.
    """

    values: Mapping[str, np.ndarray]
    version: np.ndarray
    newest: int
    hash: str

    @property
    def coverage(self) -> float:
        """The share of rows that somebody speaks of."""
        return float((self.version >= 0).mean()) if len(self.version) else 0.0

    @property
    def staleness(self) -> float:
        """By how much versions are behind the newest, on average; 0 where nobody speaks."""
        spoken = self.version[self.version >= 0]
        return float(self.newest - spoken.mean()) if len(spoken) else 0.0

    def of_rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of a batch."""
        who = self.version[rows].astype(np.float32)
        said = {f"teacher/{name}": values[rows] for name, values in self.values.items()}
        return {**said, f"teacher/{VERSION}": np.where(who < 0, np.float32(np.nan), who)}


def publish(
    store: str | os.PathLike[str],
    examples: Examples,
    labels: Mapping[str, np.ndarray],
    *,
    ids: np.ndarray,
    version: int,
    period: int = 0,
    recipe: str = "",
) -> None:
    """Add what `version` of a teacher said of the training rows `ids` [n] to a store: name -> [n].

    `period` tells parts of one version apart: an hour, or which of its turns it was. Raises `ArtifactError` for a part
    that is there already or a store of other rows or heads, `ValueError` for labels that are not those of `ids`.
    """
    store, count = Path(store), examples.count("train")
    if wrong := [name for name, values in labels.items() if values.shape != ids.shape]:
        raise ValueError(f"{', '.join(wrong)}: not {len(ids)} labels")
    if not labels or VERSION in labels:
        raise ValueError(f"labels {', '.join(labels)}: at least one, and none called {VERSION}")
    if version < 0 or len(np.unique(ids)) != len(ids) or (len(ids) and not 0 <= ids.min() <= ids.max() < count):
        raise ValueError(f"version {version} of rows that are not different ones of the {count}")
    rows = examples.manifest["rows_hash"]["train"]
    manifest: dict[str, Any] = {"format": _FORMAT, "kind": KIND, "rows": rows, "names": list(labels), "parts": []}
    if (store / MANIFEST).exists():
        manifest = {name: value for name, value in _manifest_of(store).items() if name != "manifest_hash"}
    if manifest["rows"] != rows or manifest["names"] != list(labels):
        raise ArtifactError("a store of other rows or heads", where=str(store), expected=f"{rows}, {list(labels)}")
    folder = f"v{version:09d}-{period:06d}"
    store.mkdir(parents=True, exist_ok=True)
    order = np.argsort(ids)
    about = {"rows": rows, VERSION: version, "period": period}
    facts: dict[str, Any] = {"about": about, "recipe": recipe, "step": version, "vocabulary_hash": examples.vocab.hash}
    with open_artifact(store / folder, kind=f"{KIND}_part", **facts) as writer:
        writer.append(_IDS, ids[order].astype(np.uint64))
        for name, values in labels.items():
            writer.append(_PREFIX + name, values[order].astype(np.float16))
    part = {VERSION: version, "period": period, "folder": folder, "rows": len(ids)}
    manifest["parts"] = [*manifest["parts"], part | {"hash": read_artifact(store / folder, verify=False).hash}]
    beside = store / f".{MANIFEST}.{os.getpid()}.tmp"
    text = json.dumps(manifest | {"manifest_hash": hash_of(manifest)}, indent=1, ensure_ascii=False)
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, store / MANIFEST)


def write_labels(
    path: str | os.PathLike[str],
    examples: Examples,
    labels: Mapping[str, np.ndarray],
    *,
    step: int = 0,
    recipe: str = "",
) -> None:
    """A new store at `path` of what one teacher, the checkpoint of `step`, said of all rows of the training split.

    Raises `ArtifactError` where `path` exists.
    """
    with new_folder(path, error=ArtifactError) as folder:
        ids = np.arange(examples.count("train"), dtype=np.uint64)
        publish(folder, examples, labels, ids=ids, version=step, recipe=recipe)


def describe(path: str | os.PathLike[str]) -> str:
    """In words, what a store holds."""
    manifest = _manifest_of(Path(path))
    versions = sorted({part[VERSION] for part in manifest["parts"]})
    rows = sum(part["rows"] for part in manifest["parts"])
    return f"{', '.join(manifest['names'])}: {rows:,} labels by the versions {', '.join(map(str, versions))}"


def _manifest_of(store: Path) -> dict[str, Any]:
    return read_manifest(store, format_version=_FORMAT, what="label store", error=ArtifactError)
