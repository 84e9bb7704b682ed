"""Content vectors of a data directory: `vectors/<name>.npy` with the item ids of its rows in `<name>_ids.parquet`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from recjax.data.columns import read_ids
from recjax.data.formats import read_table
from recjax.data.problems import Findings
from recjax.data.reader import Reader
from recjax.data.relations import check_unique


def read_vectors(folder: Path, found: Findings, reader: Reader) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    vectors = {}
    for path in sorted((folder / "vectors").glob("*.npy")):
        ids_path, name = path.with_name(f"{path.stem}_ids.parquet"), path.stem
        if not ids_path.exists():
            mend = "one row of item_id for each row of the array, in the same order"
            found.error(str(path), "vectors without their ids", expected=ids_path.name, mend=mend)
            continue
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as e:
            found.error(str(path), f"is not a numpy array file: {e}", mend="write it with numpy.save")
            continue
        reader.read_paths += [path, ids_path]
        frame = read_table(ids_path, found)
        if frame is None:
            continue
        column = "item_id" if "item_id" in frame.columns or frame.width > 1 else frame.columns[0]
        if column not in frame.columns:
            found.error(
                str(ids_path), "there is no column item_id", column="item_id", mend="name the column of ids item_id"
            )
            continue
        ids = read_ids(frame[column], found, str(ids_path), from_text=False)
        expected = f"floating-point numbers of shape [{frame.height}, width]"
        if array.ndim != 2 or len(array) != frame.height or array.dtype.kind != "f":
            mend = "write one vector for each id"
            found.error(str(path), f"holds {array.dtype} {list(array.shape)}", expected=expected, mend=mend)
        elif not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array).all(1))[0]) + 1
            found.error(str(path), "a vector holds NaN or infinity", row=row, expected="finite numbers")
        elif ids is not None:
            check_unique(pl.DataFrame({"item_id": ids[0]}), "item_id", str(ids_path), found)
            vectors[name] = (array, ids[0].to_numpy())
            found.note(f"vectors/{name}.npy: {array.shape[0]:,} vectors of width {array.shape[1]}")
    return vectors
