"""Folders in object stores: a data directory or a bundle at a URL is brought here whole, once, and kept.

`here("s3://bucket/shop")` is a folder of this machine with the files that lie below the URL. It is named by what lies
there (names, sizes, entity tags), so that nothing is fetched twice and a change is noticed; it appears by rename, so
that half of it is never read. `publish` goes the other way, the manifest last, so that others see a whole folder or
none. Folders that are worked on at a URL are for `core.mirror`. Stores are those of fsspec: `s3://` with the extra
`s3`, `gs://` with the extra `gcs`, `memory://` for tests.
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


def local_cache(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder of this machine for what is kept between runs: `cache`, else RECJAX_CACHE, else ~/.cache/recjax.

    The last one too where a cache at a URL is named: what is there is brought into it.
    """
    named = cache or os.environ.get("RECJAX_CACHE")
    return Path.home() / ".cache" / "recjax" if not named or is_url(named) else Path(named).expanduser()


def shared_cache(cache: str | os.PathLike[str] | None = None) -> str:
    """The URL of the cache that machines share, where `cache` or RECJAX_CACHE is one; else empty."""
    named = cache or os.environ.get("RECJAX_CACHE") or ""
    return url_of(named) if is_url(named) else ""


class Store:
    """The files below one URL, by their names relative to it; every call is tried again where that may help.

    Raises `error` when there is no library for the URL, and in every call that fails in the end.
    """

    def __init__(self, url: str | os.PathLike[str], error: type[RecjaxError]) -> None:
        self.url, self.error = url_of(url), error
        self._files, self.root = _open(self.url, error)

    def listing(self) -> Listing:
        """The size of every file, and what changes when its content does."""

        def find() -> Listing:
            self._files.invalidate_cache()
            found: Mapping[str, Any] = self._files.find(self.root, detail=True)
            names = {name[len(self.root) :].lstrip("/"): told for name, told in found.items()}
            return {
                name: (int(told["size"]), next((str(told[tag]) for tag in _TAGS if told.get(tag)), ""))
                for name, told in names.items()
                if name and told["type"] == "file"
            }

        return _again(find, self.url, self.error)

    def get(self, name: str, size: int, folder: Path) -> None:
        """Copy a file of so many bytes to the place of its name below a folder."""
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise self.error(f"{name!r} cannot be the name of a file here", where=self.url)
        target.parent.mkdir(parents=True, exist_ok=True)

        def get() -> None:
            self._files.get_file(f"{self.root}/{name}", str(target))
            if target.stat().st_size != size:
                raise OSError(f"{name} came with {target.stat().st_size} of {size} bytes")

        _again(get, self.url, self.error)

    def put(self, file: Path, name: str) -> None:
        """Copy a file of this machine there, in place of what has its name."""
        _again(lambda: self._files.put_file(str(file), f"{self.root}/{name}"), self.url, self.error)

    def remove(self, name: str) -> None:
        """Remove a file."""
        _again(lambda: self._files.rm_file(f"{self.root}/{name}"), self.url, self.error)


def here(
    path: str | os.PathLike[str], *, error: type[RecjaxError], cache: str | os.PathLike[str] | None = None
) -> Path:
    """The folder at `path`: itself where it is of this machine, else a copy in `cache` of what lies at the URL now.

    Raises `error` when there is nothing, when it cannot be reached, or when it changes while it is read.
    """
    if not is_url(path):
        return Path(path)
    store = Store(path, error)
    for _ in range(ATTEMPTS):
        found = store.listing()
        if not found:
            raise error("there is nothing at this URL", where=store.url, expected="a folder with files")
        folder = local_cache(cache) / "remote" / _digest({**found, "": (0, store.url)}) / Path(store.root).name
        if not folder.exists():
            _fetch(store, found, folder)
        if store.listing() == found:
            return folder
    raise error("what is at this URL keeps changing", where=store.url, mend="wait until it has been written")


def download(path: str | os.PathLike[str], folder: Path, *, error: type[RecjaxError]) -> None:
    """Copy what lies at a URL into a folder; raises `error`."""
    store = Store(path, error)
    for name, (size, _) in store.listing().items():
        store.get(name, size, folder)


def publish(
    folder: Path, to: str | os.PathLike[str], *, error: type[RecjaxError], replace_unfinished: bool = False
) -> None:
    """Copy the files of a folder to a URL where nothing is, its manifest last; raises `error`.

    With `replace_unfinished` there may be files without a manifest, as a process leaves them that was killed.
    """
    store = Store(to, error)
    found = store.listing()
    if LAST in found or (found and not replace_unfinished):
        raise error("will not overwrite what exists", where=store.url, mend="give another URL, or remove this one")
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.name == LAST)
    for file in files:
        store.put(file, file.relative_to(folder).as_posix())


def children(url: str, *, error: type[RecjaxError]) -> list[str]:
    """The names right below a URL; raises `error` when it cannot be reached, none where there is nothing."""
    return sorted({name.partition("/")[0] for name in Store(url, error).listing()})


def exists(url: str, *, error: type[RecjaxError]) -> bool:
    """Whether a file lies at a URL; raises `error` when the store cannot be reached."""
    store, path = _open(url, error)
    store.invalidate_cache()
    return bool(_again(lambda: store.exists(path), url, error))


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


def _fetch(store: Store, files: Listing, folder: Path) -> None:
    """Copy files into a folder that appears when all of them are there in full."""
    beside = folder.parent.with_name(f".{folder.parent.name}.{secrets.token_hex(6)}.tmp")
    try:
        for name, (size, _) in files.items():
            store.get(name, size, beside / folder.name)
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
