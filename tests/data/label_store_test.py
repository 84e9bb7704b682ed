"""A store of labels: what is written is read, no version that is not asked for, all of a publication or nothing."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recjax.core.errors import ArtifactError, ConfigError
from recjax.data.examples import Examples
from recjax.data.fields import Categorical
from recjax.data.label_store import Joined, LabelStore, describe, publish, write_labels
from recjax.data.rated_world import RatedWorld
from recjax.data.sources import DataDir
from recjax.tasks.cache import place_of
from recjax.tasks.impressions import Impressions

TASK = Impressions(
    data=DataDir(simulate=RatedWorld(rows=300, users=20, items=15)),
    fields=(Categorical(columns=("user_id", "item_id")),),
    labels={"click": "click", "like": "rating >= 4"},
)


@pytest.fixture(scope="module")
def examples(prepare_here: Callable[..., None]) -> Examples:
    prepare_here(TASK)
    return Examples.open(place_of(TASK).path)


def put(store: Path, examples: Examples, version: int, rows: np.ndarray, *, period: int = 0, value: float = 0) -> None:
    """A version says of a row its own number and that of the row."""
    said = {"click": (rows % 7 + value).astype(np.float32), "like": np.full(len(rows), float(version), np.float32)}
    publish(store, examples, said, ids=rows, version=version, period=period)


def read(store: Path, examples: Examples, **policy: Any) -> Joined:
    return LabelStore(path=str(store), least_coverage=0.0, **policy).read(examples)


def test_what_is_written_is_read(examples: Examples, tmp_path: Path) -> None:
    count, draw = examples.count("train"), np.random.default_rng(0)
    said = {name: draw.normal(size=count).astype(np.float32) * 5 for name in ("click", "like")}
    write_labels(tmp_path / "store", examples, said, step=3, recipe="teacher")
    found = read(tmp_path / "store", examples)
    assert found.coverage == 1.0 and found.staleness == 0.0
    for name, values in said.items():
        np.testing.assert_array_equal(found.values[name], values.astype(np.float16))
    np.testing.assert_array_equal(found.version, 3)
    with pytest.raises(ArtifactError, match="overwrite"):
        write_labels(tmp_path / "store", examples, said)
    assert describe(tmp_path / "store") == f"click, like: {count} labels by the versions 3"


def test_rows_in_any_order_and_parts_of_any_size_are_found_again(examples: Examples, tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(examples.count("train"))
    for period, rows in enumerate(np.split(order, [5, 5, 90])):
        put(tmp_path, examples, 2, rows, period=period)
    found = read(tmp_path, examples)
    assert found.coverage == 1
    np.testing.assert_array_equal(found.values["click"], np.arange(len(order)) % 7)


@pytest.mark.parametrize("policy", [{}, {"before": 5}, {"before": 4}, {"version": 2}, {"version": 9}])
def test_no_version_that_the_policy_does_not_allow(examples: Examples, tmp_path: Path, policy: dict[str, int]) -> None:
    """Against a loop over all that was published, which was not in order of version."""
    count, draw = examples.count("train"), np.random.default_rng(2)
    spoken = {v: np.sort(draw.choice(count, count // 2, replace=False)) for v in (5, 2, 9)}
    for version, rows in spoken.items():
        put(tmp_path, examples, version, rows)
    found = read(tmp_path, examples, **policy)
    for row in range(count):
        allowed = [v for v, rows in spoken.items() if row in rows and v <= policy.get("before", 99)]
        allowed = [v for v in allowed if v == policy.get("version", v)]
        want = max(allowed, default=-1)
        assert found.version[row] == want
        assert found.values["like"][row] == want or (want < 0 and np.isnan(found.values["like"][row]))
    assert found.newest == 9 and found.coverage == (found.version >= 0).mean()
    assert found.staleness == 9 - found.version[found.version >= 0].mean()


def test_an_old_version_may_speak_of_later_rows(examples: Examples, tmp_path: Path) -> None:
    """A backfill changes nothing for those who read the newest, and is all that those who pin it read."""
    first, second = np.split(np.arange(examples.count("train")), 2)
    put(tmp_path, examples, 1, first)
    put(tmp_path, examples, 2, second)
    before = read(tmp_path, examples)
    put(tmp_path, examples, 1, second, period=1, value=1)
    after, pinned = read(tmp_path, examples), read(tmp_path, examples, version=1)
    np.testing.assert_array_equal(after.values["click"], before.values["click"])
    np.testing.assert_array_equal(pinned.values["click"][second], second % 7 + 1)
    assert pinned.coverage == 1 and pinned.hash != after.hash != before.hash
    assert read(tmp_path, examples, version="first").hash == pinned.hash


def test_a_reader_sees_all_of_a_publication_or_nothing(examples: Examples, tmp_path: Path) -> None:
    """Every part speaks of all rows, so that whatever a reader finds must be of one version alone."""
    rows = np.arange(examples.count("train"))
    put(tmp_path, examples, 0, rows)
    done, seen = threading.Event(), set()

    def write() -> None:
        for version in range(1, 12):
            put(tmp_path, examples, version, rows)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set() or not seen:
        found = read(tmp_path, examples)
        assert len(set(found.version.tolist())) == 1 and found.newest == found.version[0]
        np.testing.assert_array_equal(found.values["like"], found.version)
        seen.add(found.newest)
    writer.join()
    assert read(tmp_path, examples).newest == 11


def test_a_part_without_a_manifest_does_not_count(examples: Examples, tmp_path: Path) -> None:
    """What is left behind by a writer that died between the part and the manifest."""
    rows = np.arange(examples.count("train"))
    put(tmp_path, examples, 1, rows)
    manifest = (tmp_path / "manifest.json").read_bytes()
    put(tmp_path, examples, 2, rows)
    (tmp_path / "manifest.json").write_bytes(manifest)
    assert read(tmp_path, examples).newest == 1
    with pytest.raises(ArtifactError, match="overwrite"):
        put(tmp_path, examples, 2, rows)


def test_a_store_says_what_it_lacks(examples: Examples, tmp_path: Path) -> None:
    put(tmp_path, examples, 4, np.arange(examples.count("train") // 4))
    put(tmp_path, examples, 1000, np.arange(3))
    with pytest.warns(RuntimeWarning, match="labels for 25.0% of the rows"):
        LabelStore(path=str(tmp_path), least_coverage=0.3).read(examples)
    with pytest.warns(RuntimeWarning, match="behind the newest"):
        LabelStore(path=str(tmp_path), least_coverage=0.0, oldest=10).read(examples)
    fields = read(tmp_path, examples).of_rows(np.array([0, 5, -1]))
    np.testing.assert_array_equal(fields["teacher/version"], [1000, 4, np.nan])
    with pytest.raises(ArtifactError, match="no version 3"):
        read(tmp_path, examples, version=3)
    with pytest.raises(ConfigError):
        LabelStore(path=str(tmp_path), version=1, before=2)
    other = dataclasses.replace(examples, manifest={**examples.manifest, "rows_hash": {"train": "another"}})
    with pytest.raises(ArtifactError, match="other rows"):
        put(tmp_path, other, 5, np.arange(3))
    for wrong in (np.array([0, 0]), np.array([10**6])):
        with pytest.raises(ValueError, match="different ones"):
            put(tmp_path, examples, 5, wrong)
