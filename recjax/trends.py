"""How good the answers are against how much of a history a prompt tells, and against how much was trained on.

Tasks of one evaluation that ask the same questions in prompts of different lengths (the same hash of what is asked, in
`LabelEvaluator`) are the points of one line, stages that differ in nothing but the length of their training those of
the other; other models, which read no prompt and have a training of their own, are there for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recjax.arms import MODEL
from recjax.plots import curves
from recjax.tables import Table, headline, number

TOLD = "mean_events_told"


def tasks_by_context(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The main task and those that ask the same, the shortest prompts first; nothing where there is only one."""
    asked = metrics["protocol"].get("examples_hash")
    same = [m for m in (metrics, *metrics.get("tasks", [])) if m["protocol"].get("examples_hash") == asked]
    found = [m for m in same if TOLD in m["protocol"]]
    return sorted(found, key=lambda m: m["protocol"][TOLD]) if len(found) > 1 else []


def context_table(metrics: Mapping[str, Any]) -> Table:
    """The first two metrics of every system, by the events that a prompt tells on average."""
    tasks, names = tasks_by_context(metrics), headline(metrics)[:2]
    systems = list(dict.fromkeys(name for task in tasks for name in task["rows"]))
    rows = []
    for task in tasks:
        told = [task["protocol"]["task"], f"{task['protocol'][TOLD]:.1f}"]
        rows.append([*told, *(_bounded(task, system, name) for name in names for system in systems)])
    header = ["", "events told", *(f"{name}, {system}" for name in names for system in systems)]
    return Table(title="By how much of the history a prompt tells", header=header, rows=rows)


def plot_context(path: Path, metrics: Mapping[str, Any]) -> Path | None:
    """The first metric of every system against the events told, with intervals; None where prompts do not differ."""
    tasks, name = tasks_by_context(metrics), headline(metrics)[0]
    if not tasks:
        return None
    told = [task["protocol"][TOLD] for task in tasks]
    lines = {}
    for system in tasks[-1]["rows"]:
        if all(name in task["rows"].get(system, {}) for task in tasks):
            values = [task["rows"][system][name] for task in tasks]
            lines[system] = values, [task["intervals"][system].get(name) for task in tasks]
    return curves(path, told, lines, title=f"{name} by context", x="events told, on average")


def amounts_table(metrics: Mapping[str, Any]) -> Table:
    """The first two metrics of the stages that differ in the length of their training, the shortest first."""
    names = headline(metrics)[:2]
    rows = [
        [one["stage"], f"{one['tokens']:,}", *(_bounded(one, MODEL, name) for name in names)]
        for one in metrics.get("amounts", [])
    ]
    return Table(title="By how much was trained on", header=["", "tokens read", *names], rows=rows)


def plot_amounts(path: Path, metrics: Mapping[str, Any]) -> Path | None:
    """The first metric of those stages against the tokens read in training; None where there is one stage."""
    points, name = metrics.get("amounts", []), headline(metrics)[0]
    if len(points) < 2:
        return None
    read = [one["tokens"] / 1e6 for one in points]
    lines = {
        MODEL: ([one["rows"][MODEL][name] for one in points], [one["intervals"][MODEL].get(name) for one in points])
    }
    return curves(path, read, lines, title=f"{name} by training", x="million tokens read")


def _bounded(task: Mapping[str, Any], system: str, name: str) -> str:
    value = task["rows"].get(system, {}).get(name)
    bounds = task["intervals"].get(system, {}).get(name)
    if value is None:
        return "-"
    return number(value) + (f" [{number(bounds[0])}, {number(bounds[1])}]" if bounds else "")
