"""The plots of a report, as PNG files.

Figures are built without a display and without pyplot's global state, so plotting never disturbs a running program.
matplotlib is imported when a plot is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recjax.tables import BUCKETS, headline, main_cutoff, number, shown_groups

# The model stands out; baselines recede.
_MODEL, _OTHERS = "#1f5fa8", ("#b8bec7", "#8a93a0", "#d9a066", "#7a9e7e")
_GRID, _TEXT, _ACCENT = "#e3e6ea", "#333a44", "#c0392b"
_DPI = 150
_SHOWN = tuple(f"valid/{name}" for name in ("ndcg@", "recall@", "auc", "nll"))

Records = Sequence[Mapping[str, float]]


def plot_training(path: Path, records: Records) -> Path | None:
    """Loss, and the validation metrics, against the step; None when nothing was logged."""
    losses = [(r["step"], r["train/loss"]) for r in records if "train/loss" in r]
    names = sorted({n for r in records for n in r if n.startswith(_SHOWN)}, key=_by_cutoff)
    names = [n for n in names if n.endswith("@10")] or names[-2:]
    panels = [bool(losses), bool(names)]
    if not any(panels):
        return None
    figure, axes = _figure(width=5.2 * sum(panels), height=3.4, columns=sum(panels))
    at = iter(axes)
    if losses:
        axis = next(at)
        steps, values = zip(*losses, strict=True)
        axis.plot(steps, values, color=_OTHERS[0], linewidth=1)
        axis.plot(steps, _smooth(values), color=_MODEL, linewidth=1.8)
        _label(axis, "Training loss", "step", "")
    if names:
        axis = next(at)
        for name, color in zip(names, (_MODEL, _OTHERS[2]), strict=False):
            points = [(r["step"], r[name]) for r in records if name in r]
            steps, values = zip(*points, strict=True)
            best = (min if name.endswith("nll") else max)(range(len(values)), key=values.__getitem__)
            axis.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3.5)
            text = f"{name.removeprefix('valid/')}  {number(values[best])}"
            axis.annotate(
                text, (steps[best], values[best]), (0, 6), textcoords="offset points", color=color, ha="center"
            )
        axis.margins(x=0.12, y=0.18)
        axis.set_ylim(bottom=0)
        _label(axis, "Validation", "step", "")
    return _save(figure, path)


def plot_time(path: Path, records: Records) -> Path | None:
    """The parts of a step, one on the other, and goodput, against the step; None when they were not logged."""
    timed = [r for r in records if "time/step" in r]
    if len(timed) < 2:
        return None
    figure, (parts, kept) = _figure(width=10.4, height=3.4, columns=2)
    steps = [r["step"] for r in timed]
    below = [0.0] * len(timed)
    for kind, color in zip(("data", "host", "device"), (_OTHERS[2], _OTHERS[0], _MODEL), strict=True):
        above = [low + 1e3 * r[f"time/{kind}"] for low, r in zip(below, timed, strict=True)]
        parts.fill_between(steps, below, above, color=color, linewidth=0, label=kind)
        below = above
    parts.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    parts.set_ylim(bottom=0)
    _label(parts, "", "step", "ms a step")
    kept.plot(steps, [r["time/goodput"] for r in timed], color=_MODEL, linewidth=1.8)
    kept.set_ylim(0, 1)
    _label(kept, "Share of the time that became kept steps", "step", "")
    return _save(figure, path)


def plot_systems(path: Path, metrics: Mapping[str, Any], published: Mapping[str, float]) -> Path:
    """The main metrics of every system with their 95% intervals, and the published value as a line."""
    names, systems = headline(metrics)[:2], list(metrics["rows"])
    figure, axes = _figure(width=4.2 * len(names), height=0.9 + 0.42 * len(systems), columns=len(names))
    for axis, name in zip(axes, names, strict=True):
        values = [metrics["rows"][s][name] for s in systems]
        bounds = [metrics["intervals"][s][name] for s in systems]
        errors = [[max(0.0, v - low) for v, (low, _) in zip(values, bounds, strict=True)]]
        errors += [[max(0.0, high - v) for v, (_, high) in zip(values, bounds, strict=True)]]
        places = range(len(systems))
        axis.barh(places, values, 0.62, xerr=errors, color=_colors(len(systems)), ecolor=_TEXT, capsize=2.5)
        for place, value, (_, high) in zip(places, values, bounds, strict=True):
            text = axis.annotate(number(value), (max(high, value), place), (5, 0), textcoords="offset points")
            text.set(fontsize=8.5, color=_TEXT, va="center", zorder=5)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
        if name in published:
            axis.axvline(published[name], color=_ACCENT, linestyle="--", linewidth=1.2)
            place = (published[name], 1.0)
            axis.annotate(
                f"published {number(published[name])}",
                place,
                (-3, 3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                color=_ACCENT,
                fontsize=8.5,
                ha="right",
            )
        largest = max([*values, published.get(name, 0.0), *(high for _, high in bounds)])
        axis.set_xlim(0, largest * 1.22 or 1)
        axis.set_yticks(list(places), systems if axis is axes[0] else [""] * len(systems))
        axis.invert_yaxis()
        _label(axis, "", name, "", grid="x")
    return _save(figure, path)


def plot_buckets(path: Path, metrics: Mapping[str, Any]) -> Path:
    """NDCG of every system, by popularity of the target and by kind of user."""
    metric, systems = f"ndcg@{main_cutoff(metrics)}", list(metrics["rows"])
    groups = shown_groups(metrics)
    figure, (axis,) = _figure(width=1.6 + 1.35 * len(groups), height=3.6, columns=1)
    width = 0.8 / len(systems)
    for at, (system, color) in enumerate(zip(systems, _colors(len(systems)), strict=True)):
        values = [metrics["buckets"][g]["rows"][system][metric] for g in groups]
        places = [g - 0.4 + width * (at + 0.5) for g in range(len(groups))]
        axis.bar(places, values, width * 0.92, color=color, label=system)
    names = [_wrapped(BUCKETS.get(g) or g) for g in groups]
    labels = [f"{name}\n{metrics['buckets'][g]['users']:,} users" for g, name in zip(groups, names, strict=True)]
    axis.set_xticks(range(len(groups)), labels, fontsize=8)
    axis.legend(frameon=False, fontsize=8, ncols=len(systems), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _label(axis, "", "", metric)
    return _save(figure, path)


def curves(
    path: Path,
    x_values: Sequence[float],
    lines: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float] | None]]],
    *,
    title: str,
    x: str,
) -> Path:
    """A line for each name: values at `x_values` and their intervals, if any."""
    figure, (axis,) = _figure(width=5.2, height=3.4, columns=1)
    for (name, (values, bounds)), color in zip(lines.items(), _colors(len(lines)), strict=True):
        axis.plot(x_values, values, color=color, linewidth=1.8, marker="o", markersize=3.5, label=name)
        if all(bounds):
            low, high = zip(*(bound for bound in bounds if bound), strict=True)
            axis.fill_between(x_values, low, high, color=color, alpha=0.15, linewidth=0)
    axis.legend(frameon=False, fontsize=8)
    axis.margins(x=0.08, y=0.12)
    _label(axis, title, x, "")
    return _save(figure, path)


def plot_points(path: Path, groups: Mapping[str, Mapping[str, Sequence[float]]], *, y: str) -> Path:
    """What is named `y` against everything else that a group's points have, a panel for each; values that are no
    number are left out."""
    names = [name for name in next(iter(groups.values())) if name != y]
    figure, axes = _figure(width=5.2 * len(names), height=3.4, columns=len(names))
    for axis, name in zip(axes, names, strict=True):
        for (group, points), color in zip(groups.items(), _colors(len(groups)), strict=True):
            known = [(a, b) for a, b in zip(points[name], points[y], strict=True) if a == a and b == b]
            axis.scatter([a for a, _ in known], [b for _, b in known], s=22, color=color, label=group, zorder=3)
        axis.axhline(0, color=_TEXT, linewidth=0.8)
        axis.margins(x=0.08, y=0.12)
        _label(axis, "", name, y if axis is axes[0] else "")
    axes[0].legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _figure(*, width: float, height: float, columns: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", wspace=0.06)
    return figure, figure.subplots(1, columns, squeeze=False)[0].tolist()


def _label(axis: Any, title: str, x: str, y: str, *, grid: str = "y") -> None:
    axis.set_title(title, fontsize=10, color=_TEXT, loc="left")
    axis.set_xlabel(x, fontsize=9, color=_TEXT)
    axis.set_ylabel(y, fontsize=9, color=_TEXT)
    axis.grid(axis=grid, color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=_TEXT, labelsize=8, length=0)
    axis.spines[["top", "right", "left" if grid == "y" else "bottom"]].set_visible(False)


def _save(figure: Any, path: Path) -> Path:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(beside, format="png", dpi=_DPI, facecolor="white")
    os.replace(beside, path)
    return path


def _colors(count: int) -> list[str]:
    return [_MODEL, *(_OTHERS[i % len(_OTHERS)] for i in range(count - 1))]


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of each point and its neighbours, a twentieth of all points wide."""
    reach = len(values) // 40
    windows = (values[max(0, at - reach) : at + reach + 1] for at in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _by_cutoff(name: str) -> tuple[int, str]:
    _, _, cutoff = name.partition("@")
    return int(cutoff) if cutoff.isdigit() else 0, name


def _wrapped(text: str) -> str:
    if len(text) < 16:
        return text
    words = text.split()
    middle = (len(words) + 1) // 2
    return " ".join(words[:middle]) + "\n" + " ".join(words[middle:])
