"""Where prepared examples are kept: one folder for each task, named after what it was made from.

The name holds a hash of the task's settings, its data and the format of examples, so that a change of any of them is
another folder, and the same work is found again wherever the data lies. Where the cache is a URL, machines share it:
each brings a folder here once and checks every byte, and whoever makes one copies it there, its manifest last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recjax.core.errors import ExamplesError
from recjax.core.folder import new_folder
from recjax.core.remote import LAST, download, exists, local_cache, publish, shared_cache
from recjax.data.examples import FORMAT, Examples
from recjax.data.identity import LATER, source_hash
from recjax.data.sources import DataDir
from recjax.data.text import TextConfig
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.tasks.prompted_conversations import Jsonl
from recjax.tasks.work import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The folder of a task's examples, existing or not, and the hashes that lead to it.

    `shared` is its URL in the cache that machines share, empty where there is none.
    """

    path: Path
    content_hash: str
    source_hash: str
    shared: str = ""


def place_of(task: Task, cache: str | os.PathLike[str] | None = None) -> Place:
    """Where the examples of a task are, or will be. Raises `DataError` when there is no data."""
    source = source_hash(task.data)
    told = {"task": described(task), "source": source, "format": FORMAT}
    content = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    name, shared = f"{task.name}-{content[:12]}", shared_cache(cache)
    return Place(
        path=local_cache(cache) / name,
        content_hash=content[:16],
        source_hash=source,
        shared=f"{shared}/{name}" if shared else "",
    )


def bring(place: Place) -> bool:
    """Whether the examples are on this machine, once they have been brought from the shared cache if they are there.

    Raises `ExamplesError` when the store cannot be reached, or what is there is damaged.
    """
    if place.path.exists():
        return True
    if not place.shared or not exists(f"{place.shared}/{LAST}", error=ExamplesError):
        return False
    try:
        with new_folder(place.path, error=ExamplesError) as folder:
            download(place.shared, folder, error=ExamplesError)
            found = Examples.open(folder, verify=True)
            if found.hash != place.content_hash:
                raise ExamplesError("these are other examples", where=place.shared, mend="remove them there")
    except ExamplesError:
        if not place.path.exists():  # else another process was first
            raise
    return True


def share(place: Place) -> None:
    """Copy examples made here to the shared cache, if there is one and they are not there by now."""
    if place.shared and not exists(f"{place.shared}/{LAST}", error=ExamplesError):
        publish(place.path, place.shared, error=ExamplesError, replace_unfinished=True)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def described(value: Any) -> Any:
    """A settings object as JSON; where data or a text model lies is left out, because only what it holds matters.

    So is a field marked `LATER` that has its default: it was added without a change to what had been prepared.
    """
    if isinstance(value, DataDir):
        source = {"columns": described(value.columns)}
        return source if value.path else {**source, "simulate": described(value.simulate)}
    if isinstance(value, TextConfig | TokenizerConfig | Jsonl):
        return value.told()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        told = {f: getattr(value, f.name) for f in dataclasses.fields(value)}
        fields = {f.name: described(x) for f, x in told.items() if not (LATER in f.metadata and x == _default(f))}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(k): described(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [described(v) for v in value]
    return value
