"""The report that ends a run: what was run, measured beside published, model beside baselines, and where it fails.

`write_report` makes `report.md` and its plots from what the run left behind (metrics.json, metrics.jsonl, the recipe
header); it measures nothing itself. A published value is shown only as the recipe's header states it, with its
condition, and simulated data are called simulated wherever a number could be mistaken for a result.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recjax.arms import arms_hard_table, arms_table
from recjax.domain_gain import gain_table
from recjax.plots import plot_buckets, plot_systems, plot_time, plot_training
from recjax.tables import (
    Table,
    buckets_table,
    differences_table,
    hard_section,
    main_cutoff,
    number,
    plain,
    protocol_table,
    shown_groups,
    signed,
    systems_table,
)
from recjax.timing import timing_section
from recjax.trends import amounts_table, context_table, plot_amounts, plot_context

REPORT = "report.md"
_TRENDS = {"context": context_table, "amounts": amounts_table}
_PUBLISHED = re.compile(r"\b([A-Za-z]+@\d+)\s*[=:]?\s*(\d*\.\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a report is made of.

    `header` is that of the recipe (title, paper, data, cost, expected), `facts` whatever else should stand under
    "What was run" (seed, steps, duration, machine, versions), `metrics` the content of metrics.json, `curve` the
    records of metrics.jsonl, `stages` one row per stage when there are several, `curves` how their validation went.
    """

    name: str
    command: str
    metrics: Mapping[str, Any]
    header: Mapping[str, str] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    curve: Sequence[Mapping[str, float]] = ()
    stages: Sequence[Mapping[str, Any]] = ()
    curves: Sequence[Table] = ()


def write_report(folder: Path, report: Report) -> Path:
    """Write report.md and its plots into `folder` and return its path; the text comes last, and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    published = {} if _is_simulated(report) else published_values(report.header.get("expected", ""))
    drawn = {
        "training": plot_training(folder / "training.png", report.curve),
        "time": plot_time(folder / "time.png", report.curve),
        "systems": plot_systems(folder / "systems.png", report.metrics, published),
        "context": plot_context(folder / "context.png", report.metrics),
        "amounts": plot_amounts(folder / "amounts.png", report.metrics),
        "buckets": shown_groups(report.metrics) and plot_buckets(folder / "buckets.png", report.metrics),
    }
    images = {name: f"![{name}]({path.name})" for name, path in drawn.items() if path}
    sections = [
        _title(report),
        _what_was_run(report),
        _published(report),
        _arms(report),
        _beside_baselines(report, images),
        _groups(report, images),
        hard_section(report.metrics),
        *(_trend(table(report.metrics), images.get(name, "")) for name, table in _TRENDS.items()),
        *map(_task, report.metrics.get("tasks", [])),
        f"## Training\n\n{images['training']}" if "training" in images else "",
        *(f"{table.title}:\n\n{table.markdown()}" for table in report.curves),
        timing_section(report.curve, images.get("time", "")),
        _samples(report),
        f"## Protocol\n\n{protocol_table(report.metrics).markdown()}",
    ]
    path = folder / REPORT
    beside = folder / f".{REPORT}.{os.getpid()}.tmp"
    beside.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def published_values(expected: str) -> dict[str, float]:
    """The metrics that a recipe header states, such as "recall@10 .3152, NDCG@10 .1821 (condition)"."""
    return {name.lower(): float(value) for name, value in _PUBLISHED.findall(expected)}


def _is_simulated(report: Report) -> bool:
    return bool(report.metrics["protocol"].get("simulated"))


def _title(report: Report) -> str:
    title = report.header.get("title", "")
    lines = [f"# {report.name}" + (f": {title}" if title else "")]
    if _is_simulated(report):
        lines.append(
            "> **Simulated data.** The numbers below show that the system works and beats or loses to the baselines "
            "on a built-in world; they are not results on real data and do not compare with published ones."
        )
    return "\n\n".join(lines)


def _what_was_run(report: Report) -> str:
    rows = [["command", f"`{report.command}`"]]
    rows += [[name, report.header[name]] for name in ("paper", "data", "cost") if report.header.get(name)]
    rows += [[name.replace("_", " "), plain(value)] for name, value in report.facts.items()]
    seeds = report.metrics["protocol"].get("seeds", {})
    rows.append(["seeds", plain(seeds)])
    text = "## What was run\n\n" + Table(title="", header=["", ""], rows=rows, words=True).markdown()
    if report.stages:
        names = list(dict.fromkeys(name for stage in report.stages for name in stage))
        cells = [[plain(stage.get(name, "")) for name in names] for stage in report.stages]
        text += "\n\n" + Table(title="", header=[n.replace("_", " ") for n in names], rows=cells).markdown()
    return text


def _published(report: Report) -> str:
    expected = report.header.get("expected", "")
    values = published_values(expected)
    if not values:
        return ""
    lines = ["## Measured beside published", f"The recipe states: {expected}"]
    if _is_simulated(report):
        return "\n\n".join([*lines, "This run was on simulated data, so there is nothing to compare."])
    model = next(iter(report.metrics["rows"]))
    rows = []
    for name, value in values.items():
        measured = report.metrics["rows"][model].get(name)
        low, high = report.metrics["intervals"][model].get(name, (None, None))
        if measured is None:
            rows.append([name, number(value), "-", "-", "-"])
        else:
            bounds = f"[{number(low)}, {number(high)}]"
            rows.append([name, number(value), number(measured), bounds, signed(measured - value)])
    header = ["", "published", "measured", "95% interval", "measured - published"]
    lines.append(Table(title="", header=header, rows=rows).markdown())
    data = report.metrics["protocol"]
    scope = f"{data['users']:,} users and {data['catalogue_size']:,} items"
    lines.append(
        f"Measured on {scope}; {data.get('split_rule')}; seen items {data['seen']}. The two compare only as far as "
        "data and protocol are the same. The interval says how far the measured value would move with other users."
    )
    return "\n\n".join(lines)


def _arms(report: Report) -> str:
    found = report.metrics.get("arms", [])
    parts = []
    for group in found:
        table = arms_table(group, main_cutoff(report.metrics))
        titles = "; ".join(f"{name}: {row['title']}" for name, row in group["arms"].items() if row["title"])
        parts += [f"**{table.title}**" + (f" ({titles})" if titles else ""), table.markdown()]
        if (gain := gain_table(group)).rows:
            parts += [f"**{gain.title}**", gain.markdown()]
        if (hard := arms_hard_table(group)).rows:
            parts += [f"**{hard.title}**", hard.markdown()]
    if not parts:
        return ""
    parts.append(
        "Means over seeds, ± their standard deviation; differences to the first arm, or the one named, are per user, "
        "averaged over seeds, with a 95% bootstrap interval over users, or queries where there are any."
    )
    return "\n\n".join(["## The arms side by side", *parts])


def _beside_baselines(report: Report, images: Mapping[str, str]) -> str:
    parts = ["## Beside the baselines", systems_table(report.metrics).markdown()]
    parts.append(
        "coverage: share of the catalogue that is recommended to anyone; popularity: mean popularity percentile of "
        "what is recommended (the catalogue's own mean is .5); time: fitting and ranking."
    )
    differences = differences_table(report.metrics)
    if differences.rows:
        parts += [f"{differences.title}:", differences.markdown()]
    chosen = report.metrics.get("settings", {})
    if chosen:
        parts.append("Settings chosen on the validation split: " + plain(chosen) + ".")
    return "\n\n".join([*parts, images["systems"]])


def _groups(report: Report, images: Mapping[str, str]) -> str:
    if "buckets" not in images:
        return ""
    table = buckets_table(report.metrics)
    rules = plain(report.metrics["protocol"].get("buckets", {}))
    return "\n\n".join(["## For whom it works", f"{table.title} ({rules}).", table.markdown(), images["buckets"]])


def _trend(table: Table, image: str) -> str:
    return "\n\n".join([f"## {table.title}", table.markdown(), image]) if image else ""


def _task(metrics: Mapping[str, Any]) -> str:
    """Another task of the mixture beside its baselines."""
    parts = [f"## {metrics['protocol']['task']}", systems_table(metrics).markdown()]
    for table in (differences_table(metrics), buckets_table(metrics)):
        if table.rows:
            parts += [f"{table.title}:", table.markdown()]
    return "\n\n".join([*parts, f"{metrics['protocol']['users']:,} examples; {metrics['protocol']['split_rule']}."])


def _samples(report: Report) -> str:
    parts = []
    for sample in report.metrics.get("samples", []):
        lines = [f"**User {sample['user_index']}**", f"- had: {_quoted(sample['history'])}"]
        lines.append(f"- took next: {_quoted([sample['target']])}")
        for system, words in sample["recommended"].items():
            lines.append(f"- {system} (target at place {sample['rank'][system] + 1:,}): {_quoted(words)}")
        parts.append("\n".join(lines))
    return "\n\n".join(["## Recommendations to some users", *parts]) if parts else ""


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(f"*{re.sub(r'([*_`|<>])', r' ', word).strip()}*" for word in words)
