"""Folders at URLs are read as folders here are: whole, once, as they are now; what is wrong is said."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from recjax.core import remote
from recjax.core.artifact import read_artifact, write_artifact
from recjax.core.errors import ArtifactError, BundleError, DataError
from recjax.core.folder import check_files, new_folder, read_manifest, write_manifest
from recjax.data.identity import source_hash
from recjax.data.sources import DataDir
from recjax.serve.bundle import Bundle
from recjax.serve.shelf import newest

RELEASE = Path(__file__).parents[1] / "serve" / "releases" / "0.1.0.dev0" / "items"
LOG = "user_id,item_id,position\na,x,0\na,y,1\nb,x,0\n"


@pytest.fixture
def memory() -> Iterator[str]:
    """A store in this process; returns the URL of an empty folder of it."""
    store = fsspec.filesystem("memory")
    yield "memory://shop"
    store.store.clear()


@pytest.fixture(params=["memory", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RECJAX_CACHE", str(tmp_path / "cache"))
    return request.getfixturevalue(request.param)


def put(url: str, text: str) -> None:
    with fsspec.open(url, "w") as file:
        file.write(text)  # type: ignore[union-attr]


def test_a_data_directory_is_read_as_here_once_and_again_when_it_changes(bucket: str, tmp_path: Path) -> None:
    put(f"{bucket}/log/interactions.csv", LOG)
    local = tmp_path / "log"
    local.mkdir()
    (local / "interactions.csv").write_text(LOG)
    at_url, at_home = DataDir(path=f"{bucket}/log"), DataDir(path=str(local))
    assert at_url.load().interactions.equals(at_home.load().interactions)
    assert source_hash(at_url) == source_hash(at_home)
    kept = [path for path in (tmp_path / "cache" / "remote").iterdir()]
    assert len(kept) == 1
    put(f"{bucket}/log/interactions.csv", LOG.replace("b,x", "b,y"))  # of the same size
    assert source_hash(at_url) != source_hash(at_home)
    assert at_url.load().interactions.filter(item_id="y").height == 2


def test_bundles_are_published_whole_and_the_newest_version_is_found(bucket: str, tmp_path: Path) -> None:
    for number in (2, 10):
        remote.publish(RELEASE, f"{bucket}/models/{number}", error=BundleError)
    put(f"{bucket}/models/11/weights.safetensors", "half of it")  # its manifest is still to come
    path = newest(f"{bucket}/models")
    assert path.name == "10" and Bundle(path).name == "items"
    assert newest(f"{bucket}/models") == path
    assert newest(f"{bucket}/models/2").name == "2"
    with pytest.raises(BundleError, match="overwrite"):
        remote.publish(RELEASE, f"{bucket}/models/2", error=BundleError)
    with pytest.raises(BundleError, match="no bundle here"):
        newest(f"{bucket}/models/11")


def test_artifacts_are_written_to_a_url_and_read_from_it(bucket: str) -> None:
    url = f"{bucket}/artifacts/vectors"
    write_artifact(url, {"x": np.arange(6).reshape(3, 2)}, kind="test")
    np.testing.assert_array_equal(read_artifact(Path(url), kind="test")["x"], [[0, 1], [2, 3], [4, 5]])
    put(f"{url}/x.npy", "damaged")
    with pytest.raises(ArtifactError, match="bytes"):
        read_artifact(url)


def test_what_fails_halfway_leaves_nothing_that_looks_whole(memory: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(f"{memory}/half", error=BundleError) as folder:
        (folder / "part").write_text("x")
        raise RuntimeError
    assert not remote.exists(f"{memory}/half/part", error=BundleError)
    with new_folder(f"{memory}/whole", error=BundleError) as folder:
        (folder / "part").write_text("x")
        write_manifest(folder, {"format": 1})
    found = remote.here(f"{memory}/whole", error=BundleError, cache=tmp_path)
    check_files(
        found, read_manifest(found, format_version=1, what="x", error=BundleError), verify=True, error=BundleError
    )


class Flaky:
    """A store whose calls fail a few times before they work."""

    def __init__(self, store: Any, failures: list[Exception]) -> None:
        self._store, self._failures = store, failures

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)
        if name not in ("find", "get_file"):
            return call

        def flaky(*args: Any, **kwargs: Any) -> Any:
            if self._failures:
                raise self._failures.pop()
            return call(*args, **kwargs)

        return flaky


class NoCredentialsError(Exception):
    """Called as that of botocore is."""


@pytest.mark.parametrize(
    ("failures", "match"),
    [
        ([ConnectionError("lost"), TimeoutError("slow"), OSError("busy")], ""),
        ([ConnectionError("lost")] * 4, "cannot be reached"),
        ([FileNotFoundError("shop")], "no such bucket"),
        ([PermissionError("Access Denied")], "refuses"),
        ([NoCredentialsError("Unable to locate credentials")], "no credentials"),
    ],
)
def test_what_may_pass_is_tried_again_and_the_rest_is_said(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: list[Exception], match: str
) -> None:
    put(f"{memory}/log/a.csv", "x")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    real, left = remote._open, list(failures)
    monkeypatch.setattr(remote, "_open", lambda url, error: (Flaky(real(url, error)[0], left), real(url, error)[1]))
    if match:
        with pytest.raises(DataError, match=match) as raised:
            remote.here(f"{memory}/log", error=DataError, cache=tmp_path)
        assert f"{memory}/log" in str(raised.value) and raised.value.mend
        assert not list(tmp_path.rglob("a.csv"))
    else:
        assert (remote.here(f"{memory}/log", error=DataError, cache=tmp_path) / "a.csv").read_text() == "x"
        assert not left


def test_files_that_come_short_or_change_are_not_taken(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"{memory}/log/a.csv", "abc")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    store = type(fsspec.filesystem("memory"))
    with monkeypatch.context() as patch:
        patch.setattr(store, "get_file", lambda self, name, target, **_: Path(target).write_text("a"))
        with pytest.raises(DataError, match="1 of 3 bytes"):
            remote.here(f"{memory}/log", error=DataError, cache=tmp_path)
    real, count = store.get_file, iter(range(99))

    def changing(self: Any, name: str, target: str, **more: Any) -> None:
        real(self, name, target, **more)
        put(f"{memory}/log/b{next(count)}.csv", "new")

    monkeypatch.setattr(store, "get_file", changing)
    with pytest.raises(DataError, match="keeps changing"):
        remote.here(f"{memory}/log", error=DataError, cache=tmp_path)


@pytest.mark.parametrize(
    ("url", "match"),
    [("memory://nothing", "nothing at this URL"), ("nonsense://x/y", "nonsense://"), ("s3://", "")],
)
def test_urls_that_lead_nowhere(memory: str, tmp_path: Path, url: str, match: str) -> None:
    if not match:
        assert not remote.is_url(url)
        return
    with pytest.raises(DataError, match=match):
        remote.here(url, error=DataError, cache=tmp_path)


def test_buckets_that_are_not_there_and_missing_credentials(s3: str, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(DataError, match="bucket|nothing"):
        DataDir(path="s3://no-such-bucket-here/log").load()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in {"AWS_CONFIG_FILE": "none", "AWS_SHARED_CREDENTIALS_FILE": "none"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.filesystem("s3").clear_instance_cache()
    try:
        with pytest.raises(DataError, match="no credentials") as raised:
            DataDir(path=f"{s3}/log").load()
        assert "AWS_ACCESS_KEY_ID" in raised.value.mend
    finally:
        fsspec.filesystem("s3").clear_instance_cache()


def test_a_path_that_went_through_pathlib_is_still_a_url() -> None:
    assert remote.url_of(Path("s3://shop/models/1")) == "s3://shop/models/1" == remote.url_of("s3://shop/models/1/")
    assert not remote.is_url("/data/shop") and not remote.is_url("shop") and not remote.is_url("C:/shop")
    assert json.dumps(str(remote.here("/data", error=DataError))) == '"/data"'
    assert remote.is_url(Path("gs://shop/runs")) and remote.url_of(Path("gs://shop/runs")) == "gs://shop/runs"


def test_a_store_is_that_of_its_scheme() -> None:
    """What is not S3 cannot be tried here; that it is asked of the right library can."""
    kinds = {"s3://shop/run": "s3fs", "gs://shop/run": "gcsfs", "memory://shop/run": "fsspec"}
    for url, library in kinds.items():
        if importlib.util.find_spec(library) is not None:
            files, root = remote._open(url, DataError)
            assert type(files).__module__.partition(".")[0] == library and root.endswith("shop/run")
        else:
            with pytest.raises(DataError, match=f"needs {library}") as raised:
                remote.Store(url, DataError)
            assert "recjax[gcs]" in raised.value.mend
