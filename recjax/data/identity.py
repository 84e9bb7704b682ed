"""What a data directory is, told from its bytes without parsing them: the key under which prepared examples are kept.

Reading and sorting a large log takes long, hashing its files does not; a training process asks this question at every
start.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from recjax.data.sources import DataDir, folder_of

# In the metadata of a setting: prepared folders are not named after its default, as they were not before it.
LATER = "later"
_SUFFIXES = (".parquet", ".csv", ".tsv", ".gz", ".json", ".libsvm", ".libffm")


def source_hash(data: DataDir) -> str:
    """SHA-256 of the names and bytes of all tables, marks and vectors of a data directory, and of the column mapping.

    For the simulated world, of its settings. Raises `DataError` when there is no such directory.
    """
    if not data.path:
        return data.simulate.hash
    if len(data.folders) > 1:
        each = [(Path(path).name, source_hash(replace(data, path=path))) for path in data.folders]
        return hashlib.sha256(repr((each, sorted(data.shared))).encode()).hexdigest()
    folder = folder_of(data.path)
    if not folder.is_dir():
        data.load()
    digest = hashlib.sha256(repr(sorted(data.columns.items())).encode())
    tables = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    for path in [*tables, *sorted((folder / "vectors").glob("*"))]:
        digest.update(f"\n{path.relative_to(folder)}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
