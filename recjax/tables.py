"""The tables that are made from metrics.json, as plain text cells: shown in the terminal, written into reports.

Every cell is made here, so that a number reads the same everywhere. Metrics have four decimals without the leading
zero, as in the papers of this field.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

BUCKETS = {
    "item/head": "popular targets (head)",
    "item/torso": "middling targets (torso)",
    "item/tail": "rare targets (tail)",
    "item/unseen": "targets without training events",
    "user/cold": "cold users",
    "user/warm": "other users",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A header and rows of text; the first column is on the left, the others on the right unless they are words."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False

    @property
    def width(self) -> int:
        """Characters across when drawn with a border."""
        lines = [self.header, *self.rows]
        return 1 + sum(max(len(line[at]) for line in lines) + 3 for at in range(len(self.header)))

    def transposed(self) -> Table:
        """Rows as columns."""
        header, *rows = map(list, zip(self.header, *self.rows, strict=True))
        return dataclasses.replace(self, header=header, rows=rows)

    def markdown(self) -> str:
        """As a GitHub table, without the title."""
        align = ["---", *["---" if self.words else "---:"] * (len(self.header) - 1)]
        lines = [self.header, align, *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float | None) -> str:
    """.1234, 1.0000, or a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.4f}"


def signed(value: float) -> str:
    """`number` with its sign."""
    return ("-" if value < 0 else "+") + number(abs(value))


def main_cutoff(metrics: Mapping[str, Any]) -> int:
    """The cut-off that short tables show: 10, or the largest."""
    ks = metrics["protocol"]["k"]
    return 10 if 10 in ks else max(ks, default=0)


def headline(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics that short tables and plots show: what the protocol says, or recall and NDCG at the main cut-off."""
    k = main_cutoff(metrics)
    return metrics["protocol"].get("metrics") or [f"recall@{k}", f"ndcg@{k}"]


def systems_table(metrics: Mapping[str, Any]) -> Table:
    """Every system with recall and NDCG at every cut-off, coverage, popularity, the time it took and what else it has.

    That is the likelihood of the target, and metrics among sampled candidates, always beside the full ranking.
    """
    ks, k = metrics["protocol"]["k"], main_cutoff(metrics)
    names = [f"{name}@{cutoff}" for cutoff in ks for name in ("recall", "ndcg")]
    names += [f"mrr@{k}", f"coverage@{k}", f"popularity@{k}"] if ks else next(iter(metrics["rows"].values()))
    more = () if not ks else ("nll", f"sampled_recall@{k}", f"sampled_ndcg@{k}")
    names += [name for name in more if any(name in values for values in metrics["rows"].values())]
    rows = [
        [name, *(number(values.get(metric)) for metric in names), f"{metrics['seconds'][name]:.1f} s"]
        for name, values in metrics["rows"].items()
    ]
    return Table(title="All users", header=["", *names, "time"], rows=rows)


def differences_table(metrics: Mapping[str, Any]) -> Table:
    """The first system against every other: difference of the mean and its 95% interval."""
    first, names, rows = next(iter(metrics["rows"])), headline(metrics), []
    for other, found in metrics["differences"].items():
        cells = [f"{signed(found[n]['mean'])} [{signed(found[n]['low'])}, {signed(found[n]['high'])}]" for n in names]
        rows.append([f"{first} - {other}", *cells])
    title = "Difference with its 95% interval (paired bootstrap over users, or queries where there are any)"
    return Table(title=title, header=["", *names], rows=rows)


def shown_groups(metrics: Mapping[str, Any]) -> list[str]:
    """The buckets worth showing: those of a kind that divides the users."""
    kinds = [name.partition("/")[0] for name in metrics["buckets"]]
    return [name for name, kind in zip(metrics["buckets"], kinds, strict=True) if kinds.count(kind) > 1]


def buckets_table(metrics: Mapping[str, Any]) -> Table:
    """NDCG of every system by popularity of the target and by kind of user."""
    metric = f"ndcg@{main_cutoff(metrics)}"
    systems = list(metrics["rows"])
    rows = [
        [BUCKETS.get(name, name), f"{bucket['users']:,}", *(number(bucket["rows"][s][metric]) for s in systems)]
        for name, bucket in ((name, metrics["buckets"][name]) for name in shown_groups(metrics))
    ]
    return Table(title=f"{metric} by group", header=["", "users", *systems], rows=rows)


def hard_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """One table for each hard task: groups down, every shown metric of every system across.

    The title is the name of the task; what it measures is `metrics["hard"][task]["about"]`.
    """
    tables = []
    for task, found in metrics.get("hard", {}).items():
        groups = found["groups"]
        systems = list(dict.fromkeys(system for group in groups.values() for system in group["rows"]))
        columns = [
            (metric, system)
            for metric in found["shown"]
            for system in systems
            if any(metric in group["rows"].get(system, {}) for group in groups.values())
        ]
        rows = [
            [name, f"{group['users']:,}", *(number(group["rows"].get(s, {}).get(m)) for m, s in columns)]
            for name, group in groups.items()
        ]
        header = ["", "users", *(f"{metric} {system}" for metric, system in columns)]
        tables.append(Table(title=task.replace("_", " "), header=header, rows=rows))
    return tables


def hard_section(metrics: Mapping[str, Any]) -> str:
    """The hard tasks as a section of a report; empty where none was asked for."""
    parts = []
    for table, found in zip(hard_tables(metrics), metrics.get("hard", {}).values(), strict=True):
        text = table.markdown() if table.rows else "No user of this split is in any group."
        parts.append(f"### {table.title.capitalize()}\n\n{found['about'].strip()}.\n\n{text}")
    return "\n\n".join(["## Hard tasks", *parts]) if parts else ""


def protocol_table(metrics: Mapping[str, Any]) -> Table:
    """The protocol block, a line each."""
    rows = [[name.replace("_", " "), plain(value)] for name, value in metrics["protocol"].items()]
    return Table(title="Protocol", header=["", ""], rows=rows, words=True)


def plain(value: Any) -> str:
    """A value of a JSON block in words."""
    if isinstance(value, Mapping):
        return "; ".join(f"{k.replace('_', ' ')}: {plain(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)
