"""Arrays passed between stages: a folder of .npy files and a manifest that says where they come from.

Stage n writes an artifact (user vectors, recommendations, embedding tables, teacher scores), stage n+1 reads it. An
artifact appears whole or not at all, is never overwritten, and is read loudly: a missing, shortened or altered file,
another kind, another vocabulary or another format is an `ArtifactError`. Rows are appended, so an artifact may be
larger than memory; they are read through a memory map. numpy only: no jax, no pickles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from recjax.core.errors import ArtifactError
from recjax.core.folder import Manifest, check_files, new_folder, read_manifest, write_manifest
from recjax.core.remote import here

FORMAT = 1


class ArtifactWriter:
    """Arrays that grow by rows inside a folder made by `open_artifact`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, tuple[IO[bytes], np.dtype, list[int]]] = {}

    def append(self, name: str, rows: np.ndarray) -> None:
        """Add `rows` [n, ...] to the array `name`; dtype and trailing dimensions stay those of the first call."""
        if not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"{name!r} cannot name an array: letters, digits, '-' and '_' only")
        if rows.ndim == 0 or rows.dtype.kind not in "biufUS":
            raise ValueError(f"{name}: cannot store rows of dtype {rows.dtype} and shape {rows.shape}")
        rows = np.ascontiguousarray(rows)
        if name not in self._open:
            file = open(self._folder / f"{name}.npy", "wb")
            self._open[name] = file, rows.dtype, [0, *rows.shape[1:]]
            _write_header(file, rows.dtype, self._open[name][2])
        file, dtype, shape = self._open[name]
        if rows.dtype != dtype or list(rows.shape[1:]) != shape[1:]:
            raise ValueError(f"{name}: rows of {rows.dtype} {rows.shape} added to an array of {dtype} {shape}")
        file.write(rows.tobytes())
        shape[0] += len(rows)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Close every file; name -> file, shape, dtype."""
        for file, dtype, shape in self._open.values():
            file.seek(0)
            _write_header(file, dtype, shape)
            file.close()
        return {
            name: {"file": f"{name}.npy", "shape": shape, "dtype": str(dtype)}
            for name, (_, dtype, shape) in self._open.items()
        }

    def close(self) -> None:
        """Close every file without finishing it."""
        for file, _, _ in self._open.values():
            file.close()


@contextlib.contextmanager
def open_artifact(
    path: str | os.PathLike[str],
    *,
    kind: str,
    recipe: str = "",
    step: int = 0,
    vocabulary_hash: str = "",
    about: Mapping[str, Any] | None = None,
) -> Iterator[ArtifactWriter]:
    """Write a new artifact at `path`, which appears when the block ends without an exception.

    `recipe` and `step` name the checkpoint it was computed from; `about` holds whatever else a reader should know
    (JSON). Raises `ArtifactError` when `path` exists.
    """
    with new_folder(path, error=ArtifactError) as folder:
        writer = ArtifactWriter(folder)
        try:
            yield writer
            arrays = writer.finish()
        finally:
            writer.close()
        write_manifest(
            folder,
            {
                "format": FORMAT,
                "kind": kind,
                "recipe": recipe,
                "step": step,
                "vocabulary_hash": vocabulary_hash,
                "arrays": arrays,
                "about": dict(about or {}),
            },
        )


def write_artifact(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], *, kind: str, **facts: Any) -> None:
    """Write arrays that fit in memory; `facts` as for `open_artifact`."""
    with open_artifact(path, kind=kind, **facts) as writer:
        for name, array in arrays.items():
            writer.append(name, array)


@dataclasses.dataclass(frozen=True)
class Artifact(Mapping[str, np.ndarray]):
    """A checked artifact: `artifact["name"]` is a read-only memory map, `manifest` says where it comes from."""

    path: Path
    manifest: Manifest

    def __contains__(self, name: object) -> bool:
        return name in self.manifest["arrays"]

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.manifest["arrays"].get(name)
        if entry is None:
            known = ", ".join(self.manifest["arrays"])
            raise ArtifactError(
                f"the artifact has no array {name!r}", where=str(self.path), expected=f"one of: {known}"
            )
        file = self.path / entry["file"]
        try:
            # An empty file cannot be mapped.
            array = np.load(file, mmap_mode=None if 0 in entry["shape"] else "r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"cannot read the array {name!r}: {error}", where=str(file)) from error
        if list(array.shape) != entry["shape"] or str(array.dtype) != entry["dtype"]:
            raise ArtifactError(
                f"the array {name!r} is {array.dtype} {list(array.shape)}",
                where=str(file),
                expected=f"{entry['dtype']} {entry['shape']}, as the manifest says",
            )
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest["arrays"])

    def __len__(self) -> int:
        return len(self.manifest["arrays"])

    @property
    def hash(self) -> str:
        """16 hex digits that change with any byte of the arrays or the manifest."""
        return self.manifest["manifest_hash"]


def read_artifact(
    path: str | os.PathLike[str], *, kind: str = "", vocabulary_hash: str = "", verify: bool = True
) -> Artifact:
    """Open the artifact at `path`, a folder or the URL of one.

    Raises `ArtifactError` when it is missing or damaged, or is not of the wanted `kind` or vocabulary. `verify=False`
    leaves out the checksums (one pass over every byte) and still checks sizes, shapes and dtypes.
    """
    path = here(path, error=ArtifactError)
    manifest = read_manifest(path, format_version=FORMAT, what="artifact", error=ArtifactError)
    for field, wanted in (("kind", kind), ("vocabulary_hash", vocabulary_hash)):
        if wanted and manifest.get(field) != wanted:
            raise ArtifactError(
                f"the artifact has {field} {manifest.get(field)!r}",
                where=str(path),
                expected=repr(wanted),
                mend="compute it again for this vocabulary" if field == "vocabulary_hash" else "",
            )
    check_files(path, manifest, verify=verify, error=ArtifactError)
    artifact = Artifact(path, manifest)
    for name in artifact:
        _ = artifact[name]
    return artifact


def _write_header(file: IO[bytes], dtype: np.dtype, shape: list[int]) -> None:
    # numpy leaves room for the first dimension to grow, so that the header can be written again in place.
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, fields)
