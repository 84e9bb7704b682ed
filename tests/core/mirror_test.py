"""A folder at a URL follows the one that is worked in, in an order that a killed process leaves usable."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from recjax.core import mirror, remote, saved
from recjax.core.errors import CheckpointError
from recjax.core.remote import Store


@pytest.fixture
def url() -> Iterator[str]:
    """The URL of an empty folder of a store in this process."""
    store = fsspec.filesystem("memory")
    yield "memory://shop/run"
    store.store.clear()


def there(url: str) -> dict[str, str]:
    store = fsspec.filesystem("memory")
    return {name: store.cat_file(f"/shop/run/{name}").decode() for name in Store(url, CheckpointError).listing()}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def checkpoint(step: int, text: str = "x") -> dict[str, str]:
    at = f"checkpoints/{saved.name_of(step)}"
    return {f"{at}/{saved.FILES}": "{}", f"{at}/{saved.RECORD}": text, f"{at}/state/d/a": text, f"{at}/state/b": text}


def read(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def local(url: str, cache: Path):
    return mirror.local(url, error=CheckpointError, cache=cache)


def test_a_folder_here_is_itself(tmp_path: Path) -> None:
    with local(str(tmp_path / "run"), tmp_path / "cache") as folder:
        assert folder == tmp_path / "run"
    assert not list(tmp_path.iterdir())


def test_what_is_written_here_is_there_and_on_the_next_machine(url: str, tmp_path: Path) -> None:
    files = {"metrics.jsonl": "1\n", **checkpoint(2), **checkpoint(4), "test/metrics.json": "{}"}
    with local(url, tmp_path / "one") as folder:
        assert folder.name == "run" and not list(folder.iterdir())
        write(folder, files)
        write(folder, {".saving-000000006/state/a": "half", "checkpoints/.saving-000000006/a": "half"})
    assert there(url) == files
    with local(Path(url), tmp_path / "two") as folder:
        assert read(folder) == files
        shutil.rmtree(folder / "checkpoints" / saved.name_of(2))
        write(folder, {"metrics.jsonl": "1\n2\n", **checkpoint(6)})
    kept = {**files, "metrics.jsonl": "1\n2\n", **checkpoint(6)}
    kept = {name: text for name, text in kept.items() if saved.name_of(2) not in name}
    assert there(url) == kept
    with local(url, tmp_path / "one") as folder:  # which still has what it had, and follows the store
        assert read(folder) == kept
        assert saved.steps(folder / "checkpoints") == [4, 6]


def test_nothing_is_copied_twice(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local(url, tmp_path) as folder:
        write(folder, {"a": "1", "b": "1", **checkpoint(2)})
    calls: list[str] = []
    for name in ("get", "put", "remove"):
        real = getattr(Store, name)
        monkeypatch.setattr(Store, name, lambda self, *a, _n=name, _r=real: (calls.append(_n), _r(self, *a))[1])
    with local(url, tmp_path) as folder:
        assert (folder / "a").read_text() == "1"
    assert not calls
    with local(url, tmp_path) as folder:
        write(folder, {"a": "22"})
    assert calls == ["put"]
    with fsspec.open(f"{url}/b", "w") as file:
        file.write("3")  # type: ignore[union-attr]
    with local(url, tmp_path) as folder:
        assert (folder / "b").read_text() == "3"
    assert calls == ["put", "get"]


class Killed(BaseException):
    """As if the process ended here."""


def test_killed_at_any_file_what_is_there_is_whole(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before each copy and each removal in turn: there is always a whole checkpoint, the older one until the
    newer one is whole, and the metrics are those of the newest or later."""
    first = {"metrics.jsonl": "2", **checkpoint(2, "two")}
    second = {"metrics.jsonl": "4", **checkpoint(4, "four"), "bundle/a": "x", "bundle/manifest.json": "{}"}
    calls, last = 0, 0
    for name in ("put", "remove"):
        real = getattr(Store, name)

        def limited(self: Store, *args, _real=real) -> None:
            nonlocal calls
            calls += 1
            if calls > last:
                raise Killed
            _real(self, *args)

        monkeypatch.setattr(Store, name, limited)
    steps_seen = []
    for stop in range(99):
        fsspec.filesystem("memory").store.clear()
        calls, last = 0, 99
        with local(url, tmp_path / f"{stop}") as folder:
            write(folder, first)
        calls, last = 0, stop
        try:
            with local(url, tmp_path / f"{stop}") as folder:
                shutil.rmtree(folder / "checkpoints")
                write(folder, second)
            done = True
        except Killed:
            done = False
        calls, last = 0, 99
        found = there(url)
        assert "bundle/a" in found or "bundle/manifest.json" not in found
        with local(url, tmp_path / f"{stop}-elsewhere") as folder:
            steps = saved.steps(folder / "checkpoints")
            assert steps in ([2], [2, 4], [4])
            newest = {2: checkpoint(2, "two"), 4: checkpoint(4, "four")}[steps[-1]]
            assert newest.items() <= read(folder).items()
            assert int((folder / "metrics.jsonl").read_text()) >= steps[-1]
            steps_seen.append(steps[-1])
        assert not saved.unfinished(there(url))
        if done:
            assert there(url) == second
            break
    assert steps_seen == sorted(steps_seen) and set(steps_seen) == {2, 4}


def test_a_checkpoint_that_is_deleted_while_it_is_copied_is_copied_whole(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Store.put

    def put(self: Store, file: Path, name: str) -> None:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        real(self, file, name)

    monkeypatch.setattr(Store, "put", put)
    with local(url, tmp_path) as folder:
        write(folder, checkpoint(2, "two"))
        found = mirror.Mirror(url, tmp_path / "root", folder, CheckpointError)
        (tmp_path / "root").mkdir()
        found.push()
        assert there(url) == checkpoint(2, "two")


def test_while_the_store_is_away_the_run_goes_on(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror, "EVERY", 0.02)
    is_away = True
    real = Store.put

    def put(self: Store, file: Path, name: str) -> None:
        if is_away:
            raise CheckpointError("the store cannot be reached")
        real(self, file, name)

    monkeypatch.setattr(Store, "put", put)

    def wait(until) -> None:
        for _ in range(500):
            if until():
                return
            __import__("time").sleep(0.01)
        raise AssertionError

    with local(url, tmp_path) as folder:
        write(folder, {"a": "1"})
        wait(lambda: "tried again" in caplog.text)
        is_away = False
        wait(lambda: there(url) == {"a": "1"})
        is_away = True
        write(folder, {"a": "2"})
        is_away = False
    assert there(url) == {"a": "2"}
    is_away = True
    with pytest.raises(CheckpointError, match="cannot be reached"), local(url, tmp_path) as folder:
        write(folder, {"a": "3"})
    with pytest.raises(KeyError), local(url, tmp_path) as folder:
        write(folder, {"a": "4"})
        raise KeyError  # which is what the user is told
    assert there(url) == {"a": "2"}


def test_two_processes_on_one_machine_have_a_folder_each(url: str, tmp_path: Path) -> None:
    with local(url, tmp_path) as one:
        write(one, {"metrics.jsonl": "1", **checkpoint(2)})
        with local(url, tmp_path) as other:
            assert other != one and other.name == "run"
            write(other, {"test/metrics.json": "{}"})
        assert set(there(url)) == {"test/metrics.json"}
        assert one.is_dir() and len(read(one)) == 5
    assert set(there(url)) == {"metrics.jsonl", *checkpoint(2), "test/metrics.json"}


def test_the_index_says_what_was_copied_and_a_damaged_one_costs_only_time(url: str, tmp_path: Path) -> None:
    with local(url, tmp_path) as folder:
        write(folder, {"a": "1"})
    (index,) = tmp_path.rglob("index.json")
    (size, _), stamp = json.loads(index.read_text())["a"]
    assert size == 1 and stamp == [1, os.stat(folder / "a").st_mtime_ns]
    index.write_text("{")
    with local(url, tmp_path) as folder:
        assert read(folder) == {"a": "1"}


def test_names_of_files_in_checkpoints() -> None:
    assert saved.belongs("cells/ab/checkpoints/000000004/state/d/1234567890") == "cells/ab/checkpoints/000000004"
    assert not saved.belongs("metrics.jsonl") and not saved.belongs("000000004") and not saved.belongs("test/1234/a")
    assert re.fullmatch(r"\d{9,}", saved.name_of(3))
    assert sorted(saved.unfinished(["000000001/a", "000000001/files.json", "000000002/a", "b"])) == ["000000002/a"]
    assert remote.LAST == "manifest.json"
