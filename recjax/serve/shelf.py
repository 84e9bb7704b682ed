"""What a server serves at the moment, and how a newer version of a bundle takes the place of an older one.

A bundle is named by a folder, or a URL of a store: the bundle itself, a link to one, or a folder of versions whose
names are numbers (`model/1`, `model/2`), of which the highest counts. `Shelf.refresh` looks whether there is another
one now than the one served. If so, it is read, checked and compiled while the old one goes on answering; requests that
come after are answered by the new one; those that the old one has taken are finished by it. A version that cannot be
served, or that answers another name, is refused with a line in the log, and the old one stays.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from recjax.core.errors import BundleError, RecjaxError
from recjax.core.folder import MANIFEST, Manifest
from recjax.core.remote import children, exists, here, is_url, url_of
from recjax.serve.desk import Desk
from recjax.serve.stored import Stored

_log = logging.getLogger("recjax.serve")


D = TypeVar("D", bound=Desk)


def newest(root: str | os.PathLike[str]) -> Path:
    """The bundle that `root` stands for, with links resolved; of a URL, a copy on this machine.

    Raises `BundleError` when there is none.
    """
    if is_url(root):
        return _newest_at(url_of(root))
    path = Path(root)
    if (path / MANIFEST).exists():
        return path.resolve()
    try:
        versions = [child for child in path.iterdir() if child.name.isdecimal() and (child / MANIFEST).exists()]
    except OSError:
        versions = []
    if not versions:
        raise _nothing(str(path))
    return max(versions, key=lambda child: int(child.name)).resolve()


def _newest_at(url: str) -> Path:
    """The same of a URL; a version counts from when its manifest is there, which comes last."""
    if exists(f"{url}/{MANIFEST}", error=BundleError):
        return here(url, error=BundleError)
    for number in sorted((int(name) for name in children(url, error=BundleError) if name.isdecimal()), reverse=True):
        if exists(f"{url}/{number}/{MANIFEST}", error=BundleError):
            return here(f"{url}/{number}", error=BundleError)
    raise _nothing(url)


def _nothing(where: str) -> BundleError:
    expected = f"a folder with {MANIFEST}, or with such folders named 1, 2, ..."
    return BundleError("there is no bundle here", where=where, expected=expected)


class Shelf:
    """The desks of a server by name, in order. All methods but `refresh` are for its event loop alone."""

    def __init__(
        self,
        desks: Sequence[Desk],
        *,
        load: Callable[[Path], Desk],
        roots: Mapping[str, str | os.PathLike[str]] | None = None,
        on_served: Callable[[str, Manifest, Manifest | None], None] = lambda name, now, before: None,
        on_refused: Callable[[str], None] = lambda name: None,
    ) -> None:
        """`roots` are the folders that are looked at for newer versions, where they are not the bundles themselves.

        `load` makes a desk of a folder and is called in another thread; `on_served(name, manifest, manifest before)`
        is told of every bundle that answers from now on, `on_refused(name)` of every version that was left alone.
        """
        self._desks = {desk.bundle.name: desk for desk in desks}
        if not desks or len(self._desks) != len(desks):
            raise BundleError(
                "bundles need different names",
                where=", ".join(f"{s.bundle.path}: {s.bundle.name}" for s in desks) or "no bundle",
                mend="export with another --name",
            )
        self._roots = {name: (roots or {}).get(name) or desk.bundle.path for name, desk in self._desks.items()}
        self._load, self._on_served, self._on_refused = load, on_served, on_refused
        self._left_alone: dict[str, str] = {}  # name -> hash of the version that was refused last
        self._lock = asyncio.Lock()

    def of(self, kind: type[D]) -> dict[str, D]:
        """The desks of a kind by name."""
        return {name: desk for name, desk in self._desks.items() if isinstance(desk, kind)}

    def facts(self) -> list[dict[str, Any]]:
        """What is served."""
        return [{**desk.bundle.facts(), "version": version_of(desk.bundle)} for desk in self._desks.values()]

    async def open(self) -> None:
        """Compile and start everything."""
        for desk in self._desks.values():
            await run_in_threadpool(_warm_up, desk)
            await desk.start()
            self._on_served(desk.bundle.name, desk.bundle.manifest, None)

    async def close(self) -> None:
        """Answer what waits, then stop everything."""
        async with self._lock:
            for desk in self._desks.values():
                await desk.stop()

    async def refresh(self) -> list[str]:
        """Serve newer versions where there are any; returns the names of what changed."""
        async with self._lock:
            return [name for name, root in self._roots.items() if await self._refresh(name, root)]

    async def watch(self, seconds: float) -> None:
        """`refresh` again and again."""
        while True:
            await asyncio.sleep(seconds)
            await self.refresh()

    async def _refresh(self, name: str, root: str | os.PathLike[str]) -> bool:
        old, found = self._desks[name], ""
        try:
            path = await run_in_threadpool(newest, root)
            found = await run_in_threadpool(_fingerprint, path)
            if found in (old.bundle.manifest["manifest_hash"], self._left_alone.get(name)):
                return False
            new = await run_in_threadpool(self._load_warm, path, old)
        except Exception as error:  # whatever is wrong with the new one, the old one answers
            if found != self._left_alone.get(name):
                reason = error.message if isinstance(error, RecjaxError) else repr(error)
                _log.error("%s stays as it is: %s", name, reason)
                self._on_refused(name)
            self._left_alone[name] = found
            return False
        await new.start()
        self._desks[name] = new
        self._left_alone.pop(name, None)
        self._on_served(name, new.bundle.manifest, old.bundle.manifest)
        _log.info("%s: version %s instead of %s", name, version_of(new.bundle), version_of(old.bundle))
        await old.stop()
        return True

    def _load_warm(self, path: Path, old: Desk) -> Desk:
        new = self._load(path)
        if new.bundle.name != old.bundle.name or type(new) is not type(old):
            raise BundleError(
                f"the new version is called {new.bundle.name!r} and is a {type(new.bundle).__name__}",
                where=str(path),
                expected=f"{old.bundle.name!r}, a {type(old.bundle).__name__}: what callers ask for",
                mend="export it with --name, or start another server for it",
            )
        _warm_up(new)
        return new


def version_of(bundle: Stored) -> str:
    """The number of a version, or else the hash of the manifest."""
    return bundle.path.name if bundle.path.name.isdecimal() else bundle.manifest["manifest_hash"]


def _fingerprint(path: Path) -> str:
    """The hash that a manifest claims, or its own text where it claims none."""
    text = (path / MANIFEST).read_text(encoding="utf-8", errors="replace")
    try:
        return str(json.loads(text)["manifest_hash"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return text


def _warm_up(desk: Desk) -> None:
    start = time.perf_counter()
    shapes = desk.warm_up()
    _log.info("%s: %d shapes compiled in %.1f s", desk.bundle.name, shapes, time.perf_counter() - start)
