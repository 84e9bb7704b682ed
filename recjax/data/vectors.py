"""Content vectors of a data directory: `vectors/<name>.npy` with the item ids of its rows in `<name>_ids.parquet`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from recjax.data.columns import read_ids
from recjax.data.formats import read_table
from recjax.data.problems import Findings
from recjax.data.reader import Reader


def read_vectors(reader: Reader, found: Findings) -> tuple[dict[str, np.ndarray], dict[str, pl.DataFrame | None]]:
    """Arrays by name, and a frame with the item_id of each row by the name of its file ("vectors/content_ids")."""
    arrays: dict[str, np.ndarray] = {}
    frames: dict[str, pl.DataFrame | None] = {}
    for path in sorted((reader.folder / "vectors").glob("*.npy")):
        ids_path = path.with_name(f"{path.stem}_ids.parquet")
        if not ids_path.exists():
            mend = "one row of item_id for each row of the array, in the same order"
            found.error(str(path), "vectors without their ids", expected=ids_path.name, mend=mend)
            continue
        array, ids = _read_array(path, found), _read_ids(ids_path, found)
        table = f"vectors/{ids_path.stem}"
        reader.paths |= {f"vectors/{path.stem}": path, table: ids_path}
        frames[table] = ids
        if array is None or ids is None:
            continue
        if len(array) != len(ids):
            mend = "write one vector for each id, in the same order"
            found.error(str(path), f"{len(array):,} vectors for {len(ids):,} ids", expected="as many", mend=mend)
        arrays[path.stem] = array
        found.note(f"vectors/{path.name}: {len(array):,} vectors of width {array.shape[1]}")
    return arrays, frames


def _read_array(path: Path, found: Findings) -> np.ndarray | None:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        found.error(str(path), "is not a file of one numpy array", mend="write it with numpy.save, as numbers")
        return None
    if array.ndim != 2 or array.dtype.kind != "f" or not array.shape[1]:
        expected = "floating-point numbers of shape [items, width]"
        found.error(
            str(path), f"holds {array.dtype} of shape {list(array.shape)}", expected=expected, mend="write it so"
        )
        return None
    finite = np.isfinite(array).all(1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0]) + 1
        mend = "leave out the items that have no vector"
        found.error(str(path), "a vector holds NaN or infinity", row=row, expected="finite numbers", mend=mend)
        return None
    return array


def _read_ids(path: Path, found: Findings) -> pl.DataFrame | None:
    frame = read_table(path, found)
    if frame is None:
        return None
    if "item_id" not in frame.columns:
        present = f"among the columns {', '.join(frame.columns[:12])}"
        mend = "name the column of ids item_id"
        found.error(str(path), "there is no column item_id", column="item_id", expected=present, mend=mend)
        return None
    ids = read_ids(frame["item_id"], found, str(path), from_text=False)
    return None if ids is None else pl.DataFrame({"item_id": ids[0]})
