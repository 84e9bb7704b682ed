"""Workdirs in object stores: worked on in a folder of this machine, which the folder at the URL follows.

A store has no renames, which is what checkpoints and all that appears whole here rest on, and orbax writes to none but
`gs://`. So `local("s3://bucket/run")` brings what lies there into a folder of this machine, copies what is new there
while the block runs, and the rest at its end; nobody inside the block knows. Killed at any moment, what is at the URL
is a workdir as good as one of this machine: a checkpoint counts when its list of files has come, the last of it, and an
older one goes only after that; the lines of `metrics.jsonl` come before the checkpoints that they belong to. What the
killed process had not copied is lost: at the next start, here or on another machine, the store is right and the
folder of this machine follows.

Process 0 copies. Other processes of a run read and write the same folder, so several machines need a disk in common
(RECJAX_CACHE), or a mounted bucket instead of a URL.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import jax
from jax.experimental import multihost_utils

from recjax.core import saved
from recjax.core.errors import RecjaxError
from recjax.core.lock import held
from recjax.core.remote import LAST, Store, is_url, local_cache, url_of

EVERY = 5.0  # seconds between two looks at what is new
_INDEX, _LOCK, _SENDING = "index.json", "lock", "sending"
_LOGGER = logging.getLogger(__name__)
_ELSEWHERE: list[tempfile.TemporaryDirectory] = []  # for as long as this process lives

Stamp = tuple[int, int]  # bytes and nanoseconds of the last change


@contextlib.contextmanager
def local(
    workdir: str | os.PathLike[str], *, error: type[RecjaxError], cache: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """The folder to work in: `workdir` itself, or where it is a URL one of this machine, in `cache`, that it follows.

    Raises `error` when the store cannot be reached at the beginning or at the end; meanwhile that is only logged, and
    tried again.
    """
    if not is_url(workdir):
        yield Path(workdir)
        return
    with contextlib.ExitStack() as closing:
        root = closing.enter_context(_place(url_of(workdir), error, local_cache(cache) / "workdirs"))
        folder = root / PurePosixPath(url_of(workdir)).name
        if jax.process_index() == 0:
            mirror = Mirror(url_of(workdir), root, folder, error)
            mirror.pull()
            closing.enter_context(_following(mirror))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("workdir")
            if not (root / _INDEX).is_file():
                raise error(
                    "this process does not see the folder in which process 0 works",
                    where=f"{folder}, for {url_of(workdir)}",
                    expected="a cache on a disk that all machines of the run share",
                    mend="set RECJAX_CACHE to one, or mount the bucket and give its folder",
                )
        yield folder


class Mirror:
    """A folder of this machine and the one at a URL, each copied to the other on demand.

    The index beside the folder says, of every file that was copied, what it was there and what it is here.
    """

    def __init__(self, url: str, root: Path, folder: Path, error: type[RecjaxError]) -> None:
        self.store, self.root, self.folder = Store(url, error), root, folder
        try:
            told = json.loads((root / _INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            told = {}
        self._index = {name: ((there[0], there[1]), (here[0], here[1])) for name, (there, here) in told.items()}

    def pull(self) -> None:
        """Make the folder what lies at the URL; what was left unfinished there is removed."""
        there = self.store.listing()
        for name in saved.unfinished(there):
            self.store.remove(name)
            del there[name]
        here = self._walk(hidden=True)
        for name in here.keys() - there.keys():
            (self.folder / name).unlink()
        for name, told in there.items():
            if name not in here or self._index.get(name) != (told, here[name]):
                self.store.get(name, told[0], self.folder)
        for directory, _, _ in os.walk(self.folder, topdown=False):
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(directory)
        self.folder.mkdir(parents=True, exist_ok=True)
        here = self._walk()
        self._keep({name: (told, here[name]) for name, told in there.items()})

    def push(self) -> None:
        """Copy what is new or has changed, then remove at the URL what was removed here."""
        here = self._walk()
        new = sorted((n for n in here if n not in self._index or self._index[n][1] != here[n]), key=_order)
        for name in new:
            if not saved.belongs(name) and (self.folder / name).exists():
                self.store.put(self.folder / name, name)
        for checkpoint in dict.fromkeys(saved.belongs(name) for name in new):
            if checkpoint:
                self._send(checkpoint, [name for name in new if saved.belongs(name) == checkpoint])
        gone = sorted(self._index.keys() - here.keys(), key=_order, reverse=True)
        for name in gone:
            self.store.remove(name)
        if new or gone:
            there = self.store.listing()
            unchanged = {name: told for name, told in self._index.items() if name not in new}
            copied = {name: (there[name], here[name]) for name in new if name in there}
            self._keep({name: told for name, told in (unchanged | copied).items() if name in here})

    def _send(self, checkpoint: str, names: list[str]) -> None:
        """Copy a checkpoint, its list of files last, though it may be deleted meanwhile to make room for newer ones."""
        sending = self.root / _SENDING
        shutil.rmtree(sending, ignore_errors=True)
        try:
            for name in names:
                (sending / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(self.folder / name, sending / name)
        except FileNotFoundError:
            return  # gone by now
        for name in names:
            self.store.put(sending / name, name)
        shutil.rmtree(sending)

    def _walk(self, *, hidden: bool = False) -> dict[str, Stamp]:
        """The files of the folder by name; those under a hidden name, which are not finished, only if asked for."""
        found = {}
        for directory, folders, files in os.walk(self.folder):
            if not hidden:
                folders[:] = [name for name in folders if not name.startswith(".")]
            for file in files:
                path = Path(directory, file)
                with contextlib.suppress(FileNotFoundError):
                    if hidden or not file.startswith("."):
                        told = path.stat()
                        found[path.relative_to(self.folder).as_posix()] = told.st_size, told.st_mtime_ns
        return found

    def _keep(self, index: dict[str, tuple[tuple[int, str], Stamp]]) -> None:
        self._index = index
        beside = self.root / f".{_INDEX}.tmp"
        beside.write_text(json.dumps(index), encoding="utf-8")
        beside.replace(self.root / _INDEX)


@contextlib.contextmanager
def _following(mirror: Mirror) -> Iterator[None]:
    """Copy what is new every few seconds, and at the end."""
    done = threading.Event()

    def follow() -> None:
        while not done.wait(EVERY):
            try:
                mirror.push()
            except (RecjaxError, OSError) as problem:
                _LOGGER.warning("%s; the run goes on, and this is tried again", problem)

    thread = threading.Thread(target=follow, name="workdir", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        _stop(thread, done)
        try:
            mirror.push()
        except (RecjaxError, OSError) as problem:
            _LOGGER.warning("%s; what was not copied is in %s until the next start", problem, mirror.folder)
        raise
    _stop(thread, done)
    mirror.push()


def _stop(thread: threading.Thread, done: threading.Event) -> None:
    done.set()
    thread.join()


@contextlib.contextmanager
def _place(url: str, error: type[RecjaxError], workdirs: Path) -> Iterator[Path]:
    """The place of a URL in the cache, for this run alone; one of its own where another process works in that."""
    root = workdirs / hashlib.sha256(url.encode()).hexdigest()[:16]
    if jax.process_index() > 0:
        root.mkdir(parents=True, exist_ok=True)
        yield root
        return
    with held(root / _LOCK) as mine:
        if not mine:
            if jax.process_count() > 1:
                raise error("another process works in this workdir", where=url, mend="wait for it, or end it")
            _ELSEWHERE.append(tempfile.TemporaryDirectory(prefix="recjax-workdir-"))
            root = Path(_ELSEWHERE[-1].name)
        yield root


def _order(name: str) -> tuple[bool, str]:
    """Lists of files come after what they list."""
    return PurePosixPath(name).name in (LAST, saved.FILES), name
