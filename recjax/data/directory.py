"""Writes a data directory: Parquet tables and vectors, whole or not at all.

The directory is made beside its final place and renamed, so that a reader never sees half of it and nothing that
existed is overwritten. `simulated.json` marks a simulated one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from recjax.core.errors import DataError

SIMULATED = "simulated.json"


def check_free(path: str | Path) -> Path:
    """`path` expanded; `DataError` when something other than an empty folder is there already."""
    path = Path(path).expanduser()
    if path.is_dir() and not any(path.iterdir()):
        return path
    if path.exists():
        raise DataError(
            "there is already something here, which will not be overwritten",
            where=str(path),
            expected="a new path or an empty folder",
            mend="give another path, or remove this one first",
        )
    return path


def write_directory(
    path: str | Path,
    frames: Mapping[str, pl.DataFrame | None],
    *,
    vectors: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    simulated: Mapping | None = None,
) -> Path:
    """Write `<name>.parquet` for each frame, `vectors/<name>.npy` and ids, and the mark of a simulated world.

    Returns the path. Raises `DataError` when something is there already or the disk refuses.
    """
    path = check_free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as e:
        raise DataError(f"cannot write here: {e.strerror}", where=str(path), mend="check the path and rights") from None
    try:
        for name, frame in frames.items():
            if frame is not None:
                frame.write_parquet(beside / f"{name}.parquet", compression="zstd", statistics=True)
        for name, (array, ids) in (vectors or {}).items():
            (beside / "vectors").mkdir(exist_ok=True)
            np.save(beside / "vectors" / f"{name}.npy", array)
            pl.DataFrame({"item_id": ids}).write_parquet(beside / "vectors" / f"{name}_ids.parquet")
        if simulated is not None:
            (beside / SIMULATED).write_text(json.dumps(dict(simulated), indent=1) + "\n", encoding="utf-8")
        beside.chmod(0o755)
        os.replace(beside, path)
    except OSError as e:
        raise DataError(
            f"cannot write: {e.strerror}", where=str(path), mend="check the disk space and rights"
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return path
