"""Several folders as the domains of one log: ids kept apart or shared, what cannot be joined, negatives of a domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import DataError
from recjax.data.fields import Categorical
from recjax.data.identity import source_hash
from recjax.data.impression_log import read_log
from recjax.data.sources import DataDir
from recjax.tasks.impressions import Impressions


def write(folder: Path, users: int, items: int, rows: int, seed: int, **more: Any) -> Path:
    draw = np.random.default_rng(seed)
    folder.mkdir()
    log = {"user_id": draw.integers(1, users + 1, rows), "item_id": draw.integers(1, items + 1, rows)}
    pl.DataFrame({**log, **more}).write_parquet(folder / "interactions.parquet")
    pl.DataFrame({"item_id": range(1, items + 1), "title": [f"{folder.name} {i}" for i in range(items)]}).write_parquet(
        folder / "items.parquet"
    )
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> str:
    toys = write(tmp_path / "toys", 20, 12, 200, 0, timestamp=np.arange(200) + 10)
    games = write(tmp_path / "games", 15, 9, 120, 1)
    return f"{toys}, {games}"


def task(path: str, **more: Any) -> Impressions:
    fields = (Categorical(columns=("user_id", "item_id", "domain")),)
    told = {"labels": {"click": "1"}, "negatives": 2, "split": "random", "domain": "domain", "fields": fields, **more}
    return Impressions(data=DataDir(path=path, shared=told.pop("shared", ())), **told)


def test_rows_are_those_of_the_folders_with_their_names(folders: str) -> None:
    log = read_log(DataDir(path=folders))
    assert log.rows.height == 320 and log.rows["domain"].to_list() == ["toys"] * 200 + ["games"] * 120
    assert set(log.rows["user_id"].str.split("/").list.first()) == {"toys", "games"}
    assert log.sides["items"].height == 12 + 9 and log.sides["items"]["item_id"].n_unique() == 21
    assert "timestamp" not in log.rows.columns and any("times are left out" in note for note in log.notes)


def test_shared_ids_are_one_and_the_same(folders: str) -> None:
    apart, shared = (read_log(DataDir(path=folders, shared=s)).rows for s in ((), ("user_id",)))
    assert shared["user_id"].dtype.is_integer() and shared["user_id"].n_unique() < apart["user_id"].n_unique()
    assert shared["item_id"].to_list() == apart["item_id"].to_list()
    hashes = {
        source_hash(DataDir(path=p, shared=s)) for p in (folders, folders.split(",")[0]) for s in ((), ("user_id",))
    }
    assert len(hashes) == 3  # what is shared says nothing of a single folder


def test_a_negative_is_an_item_of_the_domain_of_its_row(folders: str) -> None:
    work = task(folders).work()
    names = work.items.sort("row")["item_id"].to_list()
    for split in ("train", "valid", "test"):
        raw = work.raw[split]
        domain = [work.facts["domains"][d] for d in raw["domain"].values]
        items = [names[row - 2] for row in raw["items"].values]
        labels = raw["labels"].values
        assert len(labels) == 3 * int(labels.sum())
        assert all(item.startswith(f"{name}/") for item, name in zip(items, domain, strict=True))


def test_what_cannot_be_joined_says_why(tmp_path: Path, folders: str) -> None:
    (tmp_path / "b").mkdir()
    twin = write(tmp_path / "b" / "toys", 5, 5, 20, 2)
    with pytest.raises(DataError, match="two folders are named toys"):
        read_log(DataDir(path=f"{tmp_path / 'toys'},{twin}"))
    told = write(tmp_path / "told", 5, 5, 20, 3, domain=["x"] * 20)
    with pytest.raises(DataError, match="a column domain already"):
        read_log(DataDir(path=f"{folders},{told}"))
    text = write(tmp_path / "text", 5, 5, 20, 4)
    pl.DataFrame({"user_id": ["a"], "item_id": [1]}).write_parquet(text / "interactions.parquet")
    with pytest.raises(DataError, match="user_id are numbers in one folder"):
        read_log(DataDir(path=f"{folders},{text}", shared=("user_id",)))
    with pytest.raises(DataError, match="several folders"):
        DataDir(path=folders).load()
