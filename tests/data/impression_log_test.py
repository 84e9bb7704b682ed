"""Rows read from whatever files they come in."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import DataError
from recjax.data.check import check
from recjax.data.fields import Categorical
from recjax.data.identity import source_hash
from recjax.data.impression_log import raw_of, read_libsvm, read_log
from recjax.data.sources import DataDir
from recjax.tasks.impressions import Impressions

ROWS = {
    "label": [1, 0, 0, 1],
    "user": [3, 1, 3, 2],
    "item": ["a", "b", "a", "c"],
    "weather": ["sunny", None, "rain", "sunny"],
}


def write(folder: Path, **frames: pl.DataFrame) -> DataDir:
    for name, frame in frames.items():
        frame.write_csv(folder / f"{name}.csv")
    return DataDir(path=str(folder), columns={"user_id": "user", "item_id": "item"})


def test_files_of_the_splits_are_one_log(tmp_path: Path) -> None:
    """The shape of Frappe and MovieLens as the CTR benchmarks keep them: no times, three files."""
    frame = pl.DataFrame(ROWS)
    log = read_log(write(tmp_path, train=frame, valid=frame.head(2), test=frame.tail(1)))
    assert log.rows.columns == ["label", "user_id", "item_id", "weather", "split"]
    assert log.rows["split"].to_list() == ["train"] * 4 + ["valid"] * 2 + ["test"]
    assert log.rows["user_id"].to_list() == [*ROWS["user"], *ROWS["user"][:2], *ROWS["user"][-1:]]
    task = Impressions(
        fields=(Categorical(columns=("user_id", "item_id", "weather")),), labels={"click": "label"}, split="given"
    )
    work = task.work_on(log)
    assert {split: len(raw["user_index"]) for split, raw in work.raw.items()} == {"train": 4, "valid": 2, "test": 1}
    assert work.facts["heads"]["click"] == {"rule": "label", "rows": 4, "rate": 0.5}


def test_libsvm_lines_are_columns_of_categories(tmp_path: Path) -> None:
    for name, text in (("train", "1 5:1 17:1\n0 6:1 17:1\n"), ("valid", "1 5:1 18:1\n"), ("test", "0 9:1 17:1\n")):
        (tmp_path / f"{name}.libsvm").write_text(text)
    log = read_log(DataDir(path=str(tmp_path)))
    assert log.rows.to_dict(as_series=False) == {
        "label": [1.0, 0.0, 1.0, 0.0],
        "field_0": [5, 6, 5, 9],
        "field_1": [17, 17, 18, 17],
        "split": ["train", "train", "valid", "test"],
    }
    task = Impressions(fields=(Categorical(columns=("field_0", "field_1")),), split="given")
    work = task.work_on(log)
    assert work.raw["test"]["codes"].values.tolist() == [3, 8]  # unknown, and the most frequent value
    before = source_hash(DataDir(path=str(tmp_path)))
    (tmp_path / "train.libsvm").write_text("1 5:1 17:1\n1 6:1 17:1\n")
    assert source_hash(DataDir(path=str(tmp_path))) != before


def test_named_fields_may_be_absent(tmp_path: Path) -> None:
    (tmp_path / "train.libffm").write_text("1 0:5:1 10:17:1\n0 2:a:1\n")
    frame = read_libsvm(tmp_path / "train.libffm")
    assert frame.columns == ["label", "field_0", "field_2", "field_10"]
    assert frame.row(1) == (0.0, None, "a", None)
    for line in ("1 5:2", "1 5", "x 5:1", "1 a:b:c:1"):
        (tmp_path / "train.libffm").write_text(line)
        with pytest.raises(DataError, match="cannot read this line"):
            read_libsvm(tmp_path / "train.libffm")


def test_tables_of_items_and_users_are_joined(tmp_path: Path) -> None:
    items = pl.DataFrame({"item_id": ["a", "b", "c"], "genre": ["x", "y", "x"], "title": ["A", "B", "C"]})
    users = pl.DataFrame({"user_id": [1, 2, 3], "age": [10, 20, 30]})
    frame = pl.DataFrame({**ROWS, "timestamp": ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04"]})
    data = write(tmp_path, interactions=frame)
    items.write_parquet(tmp_path / "items.parquet")
    users.write_parquet(tmp_path / "users.parquet")
    log = read_log(data)
    assert log.rows["timestamp"].diff().drop_nulls().to_list() == [86_400] * 3
    task = Impressions(fields=(Categorical(columns=("genre", "age")),), valid_fraction=0.25, test_fraction=0.25)
    work = task.work_on(log)
    assert work.raw["train"]["codes"].values.tolist() == [4, 9, 5, 8]
    assert work.items["title"].to_list() == ["A", "B", "C"]


def test_columns_keep_what_they_hold() -> None:
    dates = raw_of(pl.Series(["2024-01-02"]).str.to_datetime())
    assert dates.values.tolist() == [1_704_153_600]
    lists = raw_of(pl.Series([["a", " ", None], None, []], dtype=pl.List(pl.String)))
    assert (
        lists.offsets is not None
        and lists.offsets.tolist() == [0, 1, 1, 1]
        and lists.missing.tolist() == [False, True, False]
    )
    assert raw_of(pl.Series([None, None])).missing.all()
    assert np.array_equal(raw_of(pl.Series(["a"], dtype=pl.Categorical)).values, ["a"])
    with pytest.raises(DataError, match="cannot be used"):
        raw_of(pl.Series([{"a": 1}]))


def test_a_directory_of_rows_can_be_checked(tmp_path: Path) -> None:
    data = write(tmp_path, train=pl.DataFrame(ROWS), test=pl.DataFrame(ROWS).head(2))
    report = check(data)
    assert report.ok and "splits: train 4, test 2" in report.understood
    assert "column label: 2 values, mean 0.5" in report.understood
    assert "column weather: 3 values, missing in 33.3%" in report.understood
    wrong = check(dataclasses.replace(data, columns={"user_id": "usr"}))
    assert not wrong.ok and 'no table has the column "usr"' in wrong.render()
    pl.DataFrame({"label": [1]}).write_csv(tmp_path / "valid.csv")
    assert "differ in their columns" in check(data).render()


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no rows to learn from"),
        ({"valid": ROWS}, "no rows to learn from"),
        ({"train": ROWS, "valid": {"label": [1]}}, "differ in their columns: item_id, user_id, weather"),
    ],
)
def test_what_is_missing_is_told(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_log(write(tmp_path, **{name: pl.DataFrame(rows) for name, rows in files.items()}))
    with pytest.raises(DataError, match="no such data directory"):
        read_log(DataDir(path=str(tmp_path / "nowhere")))
