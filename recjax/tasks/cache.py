"""Where prepared examples are kept: one folder for each task, named after what it was made from.

The name holds a hash of the task's settings, its data and the format of examples, so that a change of any of them is
another folder, and the same work is found again wherever the data lies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recjax.data.examples import FORMAT
from recjax.data.identity import source_hash
from recjax.data.sources import DataDir
from recjax.data.text import TextConfig
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.tasks.prompted_conversations import Jsonl
from recjax.tasks.work import LATER, Task


def cache_root(cache: str | os.PathLike[str] | None = None) -> Path:
    """Where prepared examples are kept: the argument, else RECJAX_CACHE, else ~/.cache/recjax."""
    return Path(cache or os.environ.get("RECJAX_CACHE") or "~/.cache/recjax").expanduser()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The folder of a task's examples, existing or not, and the hashes that lead to it."""

    path: Path
    content_hash: str
    source_hash: str


def place_of(task: Task, cache: str | os.PathLike[str] | None = None) -> Place:
    """Where the examples of a task are, or will be. Raises `DataError` when there is no data."""
    source = source_hash(task.data)
    told = {"task": described(task), "source": source, "format": FORMAT}
    content = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return Place(path=cache_root(cache) / f"{task.name}-{content[:12]}", content_hash=content[:16], source_hash=source)


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
        told = [
            f for f in dataclasses.fields(value) if not (LATER in f.metadata and getattr(value, f.name) == f.default)
        ]
        fields = {f.name: described(getattr(value, f.name)) for f in told}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(k): described(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [described(v) for v in value]
    return value
