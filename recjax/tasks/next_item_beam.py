"""The prepared folder of a next-item task made by Apache Beam, from a log that need not fit into memory.

The log is cut into parts of whole users (`data/beam.py`), each of which is divided as a whole log is
(`next_item_work.py`). The vocabulary is made of the counts of all parts, then the examples of each part, which one
process writes down in order of user, the same bytes as without Beam. What is in memory at a time: a piece or a part of
the log, the vocabulary and the items table, and the ids of users.

Refused is `k_core`, which looks at the whole log again and again.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recjax.core.errors import ConfigError, DataError
from recjax.data.beam import Log, Runner, counted, cut_by_user, over
from recjax.data.directory import SIMULATED
from recjax.data.examples import write_examples
from recjax.data.history import cutoff_number
from recjax.data.problems import Findings
from recjax.data.reader import Reader
from recjax.data.record import Column, Columns
from recjax.data.sources import folder_of
from recjax.data.vocab import ItemVocab
from recjax.tasks import next_item_work as whole
from recjax.tasks.cache import Place, described
from recjax.tasks.next_item import NextItem
from recjax.tasks.work import Task

_COARSE = 2**16  # seconds; times are counted by so many first, then one by one where a cut lies
_VOCABULARY = "vocabulary.json"

Cutoffs = tuple[int, int] | None


def make(task: Task, place: Place, runner: Runner) -> None:
    """Write the prepared folder of `task`, which must be a `NextItem` over a data directory with a Parquet log.

    Raises `ConfigError` for other tasks, `DataError` for data that cannot be used, `ExamplesError` when it exists.
    """
    if not isinstance(task, NextItem) or task.k_core > 1 or not task.data.path:
        raise ConfigError(
            f"{task.name} cannot be prepared by Beam",
            expected="a task NextItem without k_core, over a data directory (DataDir.path)",
            mend="prepare it without --runner",
        )
    folder, found = folder_of(task.data.path), Findings()
    log, reader = Log.open(folder, task.data.columns), Reader(folder, dict(task.data.columns), found)
    items = reader.table("items")
    found.raise_first()
    if items is not None and items.schema["item_id"] != log.item_type:
        mend = "write the ids of all tables in the same way"
        raise DataError("item_id is of one type in the log and of another in items", where=str(folder), mend=mend)
    place.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.path.name}.", suffix=".tmp", dir=place.path.parent) as name:
        at = Path(name)
        parts = cut_by_user(log, at, runner)
        cutoffs = _cutoffs(task, parts, at, runner) if task.split == "global_time" else None
        known = counted(parts, functools.partial(_train_counts, task, cutoffs), at, runner)
        vocab, table = whole.catalogue(task, items, known)
        vocab.save(at / _VOCABULARY)
        over(parts, functools.partial(_examples, task, cutoffs), runner)
        told = [json.loads(part.with_suffix(".json").read_text(encoding="utf-8")) for part in parts]
        counts = functools.reduce(_sum, (one["counts"] for one in told))
        counts["log"]["items"] = known.height
        whole.check_counts(task, counts)
        facts = {
            "task": task.name,
            "config": described(task),
            "source_hash": place.source_hash,
            "content_hash": place.content_hash,
            **whole.stated(task, told[0]["rule"], told[0]["times"]),
            "simulated": (folder / SIMULATED).exists(),
            "counts": counts,
            "notes": found.notes,
            "warnings": [f"{p.where}: {p.what}" for p in found.problems],
        }
        users = pl.concat([pl.read_parquet(part.with_suffix(".users")) for part in parts])
        users = pl.DataFrame({"user_index": np.arange(users.height), "user_id": users["user_id"]})
        with write_examples(place.path, vocab=vocab, items=table, users=users, facts=facts) as writer:
            for split, schema in whole.schemas(told[0]["times"]).items():
                first_user = 0
                for part, one in zip(parts, told, strict=True):
                    writer.add(split, schema, _loaded(part, split, first_user))
                    first_user += one["counts"]["log"]["users"]


def _divided(task: NextItem, cutoffs: Cutoffs, part: Path) -> whole.Divided:
    return whole.divide(task, pl.read_parquet(part), cutoffs=cutoffs, may_be_empty=True)


def _train_counts(task: NextItem, cutoffs: Cutoffs, part: Path) -> pl.DataFrame:
    return _divided(task, cutoffs, part).train_counts


def _cutoffs(task: NextItem, parts: list[Path], at: Path, runner: Runner) -> tuple[int, int]:
    """The cut-off times of the whole log, from counts of its times: coarse ones, then fine ones where a cut lies."""
    coarse = counted(parts, functools.partial(_times, task, None), at, runner)
    ends = np.cumsum(coarse["count"].to_numpy())
    found = []
    for fraction in (task.valid_fraction + task.test_fraction, task.test_fraction):
        number = cutoff_number(int(ends[-1]), fraction)
        cell = int(np.searchsorted(ends, number, side="right"))
        before = int(ends[cell - 1]) if cell else 0
        fine = counted(parts, functools.partial(_times, task, int(coarse["time"][cell])), at, runner)
        here = np.searchsorted(np.cumsum(fine["count"].to_numpy()), number - before, side="right")
        found.append(int(fine["time"][int(here)]))
    return found[0], found[1]


def _times(task: NextItem, cell: int | None, part: Path) -> pl.DataFrame:
    """How many events lie in each coarse cell of time, or at each time of one cell."""
    log = whole.divide(task, pl.read_parquet(part), cutoffs=(0, 0), may_be_empty=True).log
    assert log.times is not None
    cells = log.times // _COARSE
    times = cells if cell is None else log.times[cells == cell]
    different, counts = np.unique(times, return_counts=True)
    return pl.DataFrame({"time": different.astype(np.int64), "count": counts.astype(np.int64)})


def _examples(task: NextItem, cutoffs: Cutoffs, part: Path) -> None:
    """Write the examples of a part, its users, and its counts, beside it."""
    divided, vocab = _divided(task, cutoffs, part), _vocabulary(part.parent / _VOCABULARY)
    rows = vocab.encode(divided.log.item_ids)
    for split, raw in whole.examples_by_split(divided, rows).items():
        columns = {name: column.joined() for name, column in raw.items()}
        arrays = {f"{name}/values": column.values for name, column in columns.items()}
        arrays |= {f"{name}/offsets": c.offsets for name, c in columns.items() if c.offsets is not None}
        _replace(_file(part, split), lambda opened, arrays=arrays: np.savez(opened, **arrays))
    users = pl.DataFrame({"user_id": divided.log.user_ids})
    _replace(part.with_suffix(".users"), users.write_parquet)
    told = {"counts": whole.counts_of(divided, rows), "rule": divided.rule, "times": divided.log.times is not None}
    _replace(part.with_suffix(".json"), lambda opened: opened.write(json.dumps(told).encode()))


@functools.lru_cache(maxsize=1)
def _vocabulary(path: Path) -> ItemVocab:
    return ItemVocab.load(path)


def _loaded(part: Path, split: str, first_user: int) -> Columns:
    with np.load(_file(part, split), allow_pickle=False) as found:
        names = [name.removesuffix("/values") for name in found if name.endswith("/values")]
        lists = {n: found[f"{n}/offsets"] for n in names if f"{n}/offsets" in found}
        columns = {n: Column(found[f"{n}/values"], lists.get(n)) for n in names}
    return {**columns, "user_index": Column(columns["user_index"].values + first_user)}


def _file(part: Path, split: str) -> Path:
    return part.with_suffix(f".{split}.npz")


def _replace(path: Path, write: Any) -> None:
    """Write a file whole or not at all, also where two workers write the same."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as opened:
        write(opened)
    Path(opened.name).replace(path)


def _sum(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of two nested mappings, added."""
    return {k: _sum(v, other[k]) if isinstance(v, Mapping) else v + other[k] for k, v in one.items()}
