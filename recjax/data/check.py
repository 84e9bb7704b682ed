"""What `recjax prepare --check DIR` says: what was understood of a data directory, and everything that is wrong.

It reads with the very code that training uses, so that a directory without errors here loads there. It changes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from recjax.core.errors import DataError
from recjax.data.impression_log import describe_rows, holds_rows, read_log
from recjax.data.problems import Findings, Problem
from recjax.data.sources import DataDir, read_tables
from recjax.data.tables import Tables
from recjax.data.titles import title_column

_SHOWN_LABELS = 5


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """`understood` lines in reading order, and all problems, errors first. `ok` when nothing prevents training."""

    path: str
    understood: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not any(p.severity == "error" for p in self.problems)

    def render(self) -> str:
        """The report as plain text."""
        lines = [f"Data directory {self.path or '(none: the simulated world)'}", "", "Understood"]
        lines += [f"  - {line}" for line in self.understood] or ["  nothing"]
        errors = sum(p.severity == "error" for p in self.problems)
        counts = f"{_count(errors, 'error')}, {_count(len(self.problems) - errors, 'warning')}"
        lines += ["", f"Problems: {counts if self.problems else 'none'}"]
        for problem in self.problems:
            lines.append(f"  {problem.severity}: {problem.what}")
            details = {"where": problem.where, "expected": problem.expected, "mend": problem.mend}
            lines += [f"      {name + ':':<9} {text}" for name, text in details.items() if text]
        lines += ["", "This directory can be used." if self.ok else "This directory cannot be used yet."]
        return "\n".join(lines) + "\n"


def check(data: DataDir) -> CheckReport:
    """Read a data directory to the end, whatever is wrong with it, and report. Never raises `DataError`."""
    found = Findings()
    if data.path and (len(data.folders) > 1 or holds_rows(data.path)):
        return _check_rows(data, found)
    if data.path:
        tables = read_tables(data.path, data.columns, found, despite_errors=True)
    else:
        tables = data.load()
        found.notes += tables.notes
    if tables is not None:
        found.notes += describe(tables)
    return _report(data, found)


def _check_rows(data: DataDir, found: Findings) -> CheckReport:
    """The report on a log of rows with labels, of which the first error alone is known."""
    try:
        log = read_log(data)
    except DataError as error:
        found.error(error.where, error.what, expected=error.expected, mend=error.mend)
    else:
        found.notes += [*log.notes, *describe_rows(log)]
        found.problems += [Problem(severity="warning", file="", what=text) for text in log.warnings]
    return _report(data, found)


def _report(data: DataDir, found: Findings) -> CheckReport:
    problems = sorted(found.problems, key=lambda p: p.severity != "error")
    return CheckReport(path=data.path, understood=tuple(found.notes), problems=tuple(problems))


def describe(tables: Tables) -> list[str]:
    """Lines about the log as a whole: sizes, time range, events per user, coverage of the catalogue."""
    log = tables.interactions
    lines = ["this is simulated data"] if tables.simulated else []
    items, users = log["item_id"].n_unique(), log.group_by("user_id").len()["len"]
    lines.append(f"log: {log.height:,} events of {len(users):,} users with {items:,} items")
    if tables.has_times:
        first, last = (_date(s) for s in (log["timestamp"].min(), log["timestamp"].max()))
        lines.append(f"time: from {first} to {last} (UTC)")
    quantiles = [f"{users.quantile(q, 'nearest'):,.0f}" for q in (0.0, 0.25, 0.5, 0.75, 1.0)]
    short = int((users < 3).sum())
    lines.append(
        f"events per user: least {quantiles[0]}, quartiles {', '.join(quantiles[1:4])}, most {quantiles[4]}; "
        f"{short:,} users have fewer than 3"
    )
    per_item = log.group_by("item_id").len()["len"].sort(descending=True)
    top = per_item.head(max(1, items // 10)).sum() / log.height
    lines.append(f"popularity: the most frequent tenth of the items takes {top:.0%} of the events")
    if tables.items is not None and "item_id" in tables.items.columns:
        listed = tables.items["item_id"].unique()
        met = int(listed.is_in(log["item_id"].unique().implode()).sum()) if listed.dtype == log["item_id"].dtype else 0
        lines.append(f"catalogue: {len(listed):,} items, of which {met:,} ({met / len(listed):.0%}) occur in the log")
        title = title_column(tables.items)
        empty = 0 if title is None else int(tables.items.select(_is_empty(title)).sum().item())
        lines.append(f"title: column {title}, empty for {empty:,} items" if title else "title: no column of titles")
    if tables.queries is not None and tables.relevance is not None:
        lines += _describe_search(tables.queries, tables.relevance, log)
    return lines


def _describe_search(queries: pl.DataFrame, relevance: pl.DataFrame, log: pl.DataFrame) -> list[str]:
    """Sizes, labels, how many queries and items of the judgments can be used, and whose judgments they are."""
    if not {"query_id", "item_id", "label"} <= set(relevance.columns):
        return []
    lines = [f"search: {queries.height:,} queries, {relevance.height:,} judged pairs of query and item"]
    labels = relevance.group_by("label").len().sort("len", "label", descending=[True, False]).head(_SHOWN_LABELS)
    told = ", ".join(f"{label} in {n / relevance.height:.0%}" for label, n in labels.iter_rows())
    lines.append(f"labels: {told}" + (", ..." if relevance["label"].n_unique() > _SHOWN_LABELS else ""))
    judged, asked = relevance["item_id"].unique(), relevance["query_id"].unique()
    if judged.dtype == log["item_id"].dtype:
        met = int(judged.is_in(log["item_id"].unique().implode()).sum())
        lines.append(f"judged items: {len(judged):,}, of which {met:,} ({met / len(judged):.0%}) occur in the log")
    if "query_id" in queries.columns and asked.dtype == queries["query_id"].dtype:
        without = int((~queries["query_id"].is_in(asked.implode())).sum())
        lines += [f"queries without a judgment: {without:,}"] if without else []
    whose = relevance["user_id"].is_not_null().sum() if "user_id" in relevance.columns else 0
    by = f"{whose:,} judgments name their user" if whose else "no judgment names its user (column user_id)"
    lines.append(f"leakage of held-out events into search: {by}")
    return lines


def _is_empty(column: str) -> pl.Expr:
    return pl.col(column).is_null() | (pl.col(column).cast(pl.String).str.strip_chars() == "")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _date(seconds: object) -> str:
    try:
        return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S")  # type: ignore[call-overload]
    except (ValueError, OverflowError, OSError):
        return f"{seconds} seconds since 1970"
