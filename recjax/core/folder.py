"""Folders that appear whole or not at all, with a manifest that tells damage from health.

Artifacts (`recjax.core.artifact`) and export bundles (`recjax.serve.bundle`) are such folders: files of any kind,
side by side, and a `manifest.json` with the size and SHA-256 of each, which carries its own hash as well. It does
not know what is in the files.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import recjax
from recjax.core.errors import RecjaxError
from recjax.core.remote import is_url, publish

MANIFEST = "manifest.json"

Manifest = dict[str, Any]


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, error: type[RecjaxError]) -> Iterator[Path]:
    """A temporary sibling of `path` that takes its place when the block ends well and is removed when it does not.

    A folder at a URL is made here and copied there at the end, its manifest last (`recjax.core.remote`). Raises `error`
    when `path` exists or the folder cannot be written.
    """
    if is_url(path):
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
            publish(Path(made), path, error=error)
        return
    target = Path(path).absolute()
    if target.exists():
        raise error("will not overwrite what exists", where=str(target), mend="give another folder, or remove this one")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        temporary.rename(target)
        _sync(target.parent)
    except OSError as problem:
        raise error(f"cannot write this folder: {problem}", where=str(target)) from problem
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Add size and checksum of every file, version, date and the manifest's own hash, and write `manifest.json`."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST
    }
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    manifest = {**manifest, "files": files, "recjax_version": recjax.__version__, "created": created}
    manifest["manifest_hash"] = hash_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path, *, format_version: int, what: str, error: type[RecjaxError]) -> Manifest:
    """The manifest of `folder`; raises `error` when missing, unreadable, altered or of another format."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"there is no {what} here", where=str(folder), expected=f"a folder with {MANIFEST}") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"cannot read the manifest of this {what}: {problem}", where=str(file)) from problem
    if not isinstance(manifest, dict) or manifest.get("format") != format_version:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise error(
            f"this {what} has format {found!r}",
            where=str(file),
            expected=f"format {format_version}",
            mend="make it again with this version of recjax",
        )
    claimed = {k: v for k, v in manifest.items() if k != "manifest_hash"}
    if manifest.get("manifest_hash") != hash_of(claimed):
        raise error(f"the manifest of this {what} was altered", where=str(file), mend="make it again, or copy it again")
    return manifest


def check_files(folder: Path, manifest: Manifest, *, verify: bool, error: type[RecjaxError]) -> None:
    """Compare every file with its recorded size and, with `verify`, its checksum; raises `error` where they differ."""
    for name, record in manifest["files"].items():
        file, mend = folder / name, "copy or make the folder again"
        if not file.is_file():
            raise error(f"{name} is missing", where=str(folder), mend=mend)
        size = file.stat().st_size
        if size != record["bytes"]:
            raise error(f"{name} has {size} bytes", where=str(file), expected=f"{record['bytes']} bytes", mend=mend)
        if verify and _sha256(file) != record["sha256"]:
            raise error(f"{name} was altered", where=str(file), expected=f"sha256 {record['sha256']}", mend=mend)


def hash_of(value: Any) -> str:
    """16 hex digits of a JSON value, the same for equal values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
