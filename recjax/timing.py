"""Where the time of a training run went, from its metrics.jsonl: the parts of a step, and how much of it was kept."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from recjax.core.clock import OTHER, STEP
from recjax.tables import Table

_SAID = {
    "data": "waiting for data",
    "host": "host: putting the batch on the devices, dispatching, logging",
    "device": "waiting for the device",
    "start": "starting: compiling, and the first step",
    "evaluate": "evaluating",
    "save": "saving checkpoints",
}


def timing_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The parts of a step (medians over what was logged) and of the run; without rows where nothing was logged."""
    steps = [record for record in records if "time/step" in record]
    timed = [record for record in records if "time/wall" in record]
    rows = []
    if steps:
        whole = statistics.median(record["time/step"] for record in steps)
        rows.append(["a step", _time(whole), ""])
        for kind in STEP:
            part = statistics.median(record[f"time/{kind}"] for record in steps)
            rows.append([f"- {_SAID[kind]}", _time(part), f"{part / whole:.0%}" if whole else ""])
    if timed:
        wall = timed[-1]["time/wall"]
        rows.append(["the run, from its first start to its last line", _time(wall), ""])
        rows.append(["- steps that were kept (goodput)", _time(timed[-1]["time/kept"]), _share(timed[-1], wall)])
        spent = {kind: sum(record[f"time/{kind}"] for record in timed) for kind in OTHER}
        rows += [[f"- {_SAID[kind]}", _time(spent[kind]), f"{spent[kind] / wall:.0%}"] for kind in OTHER if wall]
    return Table(title="Where the time went", header=["", "time", "share"], rows=rows)


def timing_section(records: Sequence[Mapping[str, Any]], image: str = "") -> str:
    """The table, and the plot where there is one, for a report; nothing where nothing was logged."""
    table = timing_table(records)
    if not table.rows:
        return ""
    rest = "What is missing from 100% is work that was repeated, and time in which nothing ran."
    return "\n\n".join(filter(None, [f"## {table.title}", table.markdown(), rest, image]))


def _share(record: Mapping[str, Any], wall: float) -> str:
    return f"{record['time/kept'] / wall:.0%}" if wall else ""


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
