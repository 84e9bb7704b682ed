"""Beam makes the prepared folder that is made without it, byte for byte, however the log is cut up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.data import beam
from recjax.data.beam_runner import Runner
from recjax.data.examples import Examples
from recjax.data.sources import DataDir
from recjax.prepare import prepare
from recjax.tasks.impressions import Impressions
from recjax.tasks.mixtures import Mixture
from recjax.tasks.next_item import NextItem

pytestmark = pytest.mark.beam


def write_log(folder: Path, *, text: bool = False, unit: int = 1, events: int = 900) -> DataDir:
    """A log in no order, with ties, an item of the catalogue that nobody had and items that it lacks."""
    rng = np.random.default_rng(events)
    users = np.minimum(rng.zipf(1.2, events), 70) * 7 % 71
    items, times = np.minimum(rng.zipf(1.4, events), 60), 1_600_000_000 + rng.integers(0, 400, events) * 1000
    log = pl.DataFrame({"who": users, "item_id": items, "timestamp": times * unit + rng.integers(0, unit, events)})
    catalogue = pl.DataFrame({"item_id": np.arange(0, 60, 2), "title": [f"Item {k}" for k in range(0, 60, 2)]})
    if text:
        log = log.with_columns(pl.format("ü{}", "who").alias("who"), pl.format("i{}", "item_id").alias("item_id"))
        catalogue = catalogue.with_columns(pl.format("i{}", "item_id").alias("item_id"))
    folder.mkdir()
    log.write_parquet(folder / "interactions.parquet", row_group_size=250)
    catalogue.write_parquet(folder / "items.parquet")
    return DataDir(path=str(folder), columns={"user_id": "who"})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and parts of a few rows, so that there are many."""
    monkeypatch.setattr(beam, "PIECE_ROWS", 200)
    monkeypatch.setattr(beam, "PART_ROWS", 150)


def same(task: NextItem, folder: Path, runner: Runner) -> None:
    mixture = Mixture(tasks=(task,))
    (plain,), (made,) = prepare(mixture, folder / "plain"), prepare(mixture, folder / "beam", runner=runner)
    assert plain.name == made.name
    Examples.open(made, verify=True)
    files = sorted(path.name for path in plain.iterdir())
    assert files == sorted(path.name for path in made.iterdir()) and len(files) > 9
    assert [path.name for path in made.parent.iterdir() if path.is_dir()] == [made.name]
    for name in set(files) - {"manifest.json"}:
        assert (made / name).read_bytes() == (plain / name).read_bytes(), name
    want, got = (json.loads((path / "manifest.json").read_text()) for path in (plain, made))
    for name in ("created", "manifest_hash", "notes", "warnings"):
        del want[name], got[name]
    assert want == got


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("settings", "log"),
    [
        ({}, {"text": True}),
        ({"split": "global_time", "min_events": 5, "catalogue": "items"}, {"unit": 1000}),
        ({"split": "leave_last", "held_out": 3, "repeats": False}, {}),
    ],
)
def test_the_folder_is_that_of_one_machine(settings: dict[str, Any], log: dict[str, Any], tmp_path: Path) -> None:
    same(NextItem(data=write_log(tmp_path / "log", **log), **settings), tmp_path, Runner())


@pytest.mark.usefixtures("small")
def test_a_log_is_read_in_pieces_and_cut_into_parts_of_whole_users(tmp_path: Path) -> None:
    data = write_log(tmp_path / "log")
    log = beam.Log.open(tmp_path / "log", data.columns)
    assert log.pieces() == [(0, 200), (200, 200), (400, 200), (600, 200), (800, 100)]
    parts = [pl.read_parquet(part) for part in beam.cut_by_user(log, tmp_path, Runner())]
    assert 4 <= len(parts) <= 6 and max(part.height for part in parts) < 400
    users = [part["user_id"].unique().sort().to_list() for part in parts]
    assert sum(users, []) == sorted(set(sum(users, [])))
    whole = data.load().interactions
    assert pl.concat(parts).select(whole.columns).equals(whole)


def test_what_beam_cannot_prepare_is_said(tmp_path: Path) -> None:
    data = write_log(tmp_path / "log")
    for task in (NextItem(), NextItem(data=data, k_core=5), Impressions(data=data)):
        with pytest.raises(ConfigError, match="cannot be prepared by Beam"):
            prepare(Mixture(tasks=(task,)), tmp_path / "cache", runner=Runner())
    with pytest.raises(ConfigError, match="no runner"):
        Runner(name="sparkle")
    log = pl.read_parquet(tmp_path / "log" / "interactions.parquet")
    log.with_columns(pl.col("who").replace(7, None)).write_parquet(tmp_path / "log" / "interactions.parquet")
    with pytest.raises(DataError, match="who is missing in"):
        beam.Log.open(tmp_path / "log", data.columns)
    (tmp_path / "log" / "interactions.parquet").unlink()
    log.write_csv(tmp_path / "log" / "interactions.csv")
    with pytest.raises(DataError, match="Parquet"):
        beam.Log.open(tmp_path / "log", data.columns)
