"""Folders in object stores: a data directory or a bundle at a URL is brought here whole, once, and kept.

`here("s3://bucket/shop")` is a folder of this machine with the files that lie below the URL. It is named by what lies
there (names, sizes, entity tags), so that nothing is fetched twice and a change is noticed; it appears by rename, so
that half of it is never read. `publish` goes the other way, the manifest last, so that others see a whole folder or
none. Stores are those of fsspec: `s3://` with the extra `s3`, `gs://` with the extra `gcs`, `memory://` for tests.
What may pass (a lost connection, a store that is busy) is tried again; what will not (no such bucket, no permission,
no credentials) is said at once.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from recjax.core.errors import RecjaxError

ATTEMPTS = 4
LAST = "manifest.json"  # whose presence says that the rest is there
_LIBRARIES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
_TAGS = ("ETag", "etag", "md5Hash", "crc32c", "LastModified", "mtime", "created", "updated")
_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "TokenRetrievalError")

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+([^/].*)")

T = TypeVar("T")
Listing = dict[str, tuple[int, str]]  # relative name -> bytes and what changes with the content


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is of a store rather than of this machine; also after `Path` has made one slash of two."""
    return _URL.fullmatch(str(path)) is not None


def url_of(path: str | os.PathLike[str]) -> str:
    """The URL that a path is, with both slashes and none at its end."""
    found = _URL.fullmatch(str(path))
    assert found is not None, path
    return f"{found[1]}://{found[2].rstrip('/')}"


def refuse_url(path: str | os.PathLike[str], what: str, *, error: type[RecjaxError]) -> None:
    """Raise `error` for what has to be a folder of this machine, before `Path` makes a strange one of it."""
    if is_url(path):
        raise error(
            f"the {what} cannot be at a URL",
            where=url_of(path),
            expected="a folder of this machine, or one that is mounted",
            mend="mount the bucket (gcsfuse, mountpoint-s3); data directories, artifacts and bundles may be at URLs",
        )


def here(
    path: str | os.PathLike[str], *, error: type[RecjaxError], cache: str | os.PathLike[str] | None = None
) -> Path:
    """The folder at `path`: itself where it is of this machine, else a copy in `cache` of what lies at the URL now.

    Raises `error` when there is nothing, when it cannot be reached, or when it changes while it is read.
    """
    if not is_url(path):
        return Path(path)
    url = url_of(path)
    store, root = _open(url, error)
    for _ in range(ATTEMPTS):
        found = _listing(store, root, url, error)
        if not found:
            raise error("there is nothing at this URL", where=url, expected="a folder with files")
        folder = _root(cache) / _digest({**found, "": (0, url)}) / Path(root).name
        if not folder.exists():
            _fetch(store, root, url, found, folder, error)
        if _listing(store, root, url, error) == found:
            return folder
    raise error("what is at this URL keeps changing", where=url, mend="wait until it has been written")


def publish(folder: Path, to: str | os.PathLike[str], *, error: type[RecjaxError]) -> None:
    """Copy the files of a folder to a URL where nothing is, its manifest last; raises `error`."""
    url = url_of(to)
    store, root = _open(url, error)
    if _listing(store, root, url, error):
        raise error("will not overwrite what exists", where=url, mend="give another URL, or remove this one")
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.name == LAST)
    for file in files:
        target = f"{root}/{file.relative_to(folder).as_posix()}"
        _again(lambda file=file, target=target: store.put_file(str(file), target), url, error)


def children(url: str, *, error: type[RecjaxError]) -> list[str]:
    """The names right below a URL; raises `error` when it cannot be reached, none where there is nothing."""
    store, root = _open(url, error)
    names = {name.partition("/")[0] for name in _listing(store, root, url, error)}
    return sorted(names)


def exists(url: str, *, error: type[RecjaxError]) -> bool:
    """Whether a file lies at a URL; raises `error` when the store cannot be reached."""
    store, path = _open(url, error)
    store.invalidate_cache()
    return bool(_again(lambda: store.exists(path), url, error))


def _root(cache: str | os.PathLike[str] | None) -> Path:
    return Path(cache or os.environ.get("RECJAX_CACHE") or Path.home() / ".cache" / "recjax") / "remote"


def _open(url: str, error: type[RecjaxError]) -> tuple[Any, str]:
    """The store of a URL and the path in it."""
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    try:
        store, root = url_to_fs(url)
    except ImportError:
        library, extra = _LIBRARIES.get(scheme, (f"a library of fsspec for {scheme}://", ""))
        mend = f"pip install 'recjax[{extra}]'" if extra else "pip install it"
        raise error(f"{scheme}:// needs {library}", where=url, mend=mend) from None
    except ValueError as problem:
        raise error(f"cannot read this URL: {problem}", where=url, expected="such as s3://bucket/folder") from problem
    return store, root


def _listing(store: Any, root: str, url: str, error: type[RecjaxError]) -> Listing:
    def find() -> Listing:
        store.invalidate_cache()
        found: Mapping[str, Any] = store.find(root, detail=True)
        names = {name[len(root) :].lstrip("/"): told for name, told in found.items()}
        return {
            name: (int(told["size"]), next((str(told[tag]) for tag in _TAGS if told.get(tag)), ""))
            for name, told in names.items()
            if name and told["type"] == "file"
        }

    return _again(find, url, error)


def _fetch(store: Any, root: str, url: str, files: Listing, folder: Path, error: type[RecjaxError]) -> None:
    """Copy files into a folder that appears when all of them are there in full."""
    beside = folder.parent.with_name(f".{folder.parent.name}.{secrets.token_hex(6)}.tmp")
    try:
        for name, (size, _) in files.items():
            target = beside / folder.name / name
            if not target.resolve().is_relative_to(beside.resolve()):
                raise error(f"{name!r} cannot be the name of a file here", where=url)
            target.parent.mkdir(parents=True, exist_ok=True)

            def get(name: str = name, target: Path = target, size: int = size) -> None:
                store.get_file(f"{root}/{name}", str(target))
                if target.stat().st_size != size:
                    raise OSError(f"{name} came with {target.stat().st_size} of {size} bytes")

            _again(get, url, error)
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.rename(folder.parent)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _again(call: Callable[[], T], url: str, error: type[RecjaxError]) -> T:
    """`call`, several times where what goes wrong may pass; raises `error` with the reason."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except FileNotFoundError as problem:
            raise error(f"there is no such bucket or file: {problem}", where=url, mend="check its name") from problem
        except PermissionError as problem:
            raise error(
                f"the store refuses: {problem}", where=url, mend="check the rights of its credentials"
            ) from problem
        except RecjaxError:
            raise
        except Exception as problem:  # every store has errors of its own
            if type(problem).__name__ in _CREDENTIALS:
                mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or GOOGLE_APPLICATION_CREDENTIALS"
                raise error(f"there are no credentials for this store: {problem}", where=url, mend=mend) from problem
            if attempt == ATTEMPTS - 1:
                raise error(f"the store cannot be reached: {problem!r}", where=url, mend="try again later") from problem
            time.sleep(0.2 * 3**attempt)
    raise AssertionError("unreachable")


def _digest(files: Listing) -> str:
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
