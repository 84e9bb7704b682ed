"""The plots of a scaling study: one for each law, on logarithmic axes, and the residuals of the law in N.

Points are runs, the line is the fit, the band its central 90%, the star a held-out run that was predicted before it
was trained. matplotlib is imported when a plot is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recjax import plots
from recjax.study.findings import Findings, mean_loss
from recjax.study.fit import Bootstrap
from recjax.study.grid import Study
from recjax.study.ledger import Finished

_COLORS = ("#1f5fa8", "#c0392b", "#3a8f5c", "#d08a2e", "#7a5aa8", "#6b7480")


def draw(folder: Path, study: Study, found: Findings) -> list[Path]:
    """Every plot that there are cells for."""
    made: list[Path] = []

    def figure(name: str, title: str, x: str, fill: Callable[[Any], None], *, log_y: bool = True) -> None:
        figure, (axis,) = plots._figure(width=6.4, height=4.2, columns=1)
        axis.set_xscale("log")
        if log_y:
            axis.set_yscale("log")
            _plain_ticks(axis)
        fill(axis)
        plots._label(axis, title, x, "" if not log_y else "loss (nats)")
        made.append(plots._save(figure, folder / f"{name}.png"))

    if found.of_n:
        figure("law_n", "Loss and size", "parameters outside the tables, N", lambda a: _law_n(a, found))
        figure("residuals", "Residuals of log loss, %", "N", lambda a: _residuals(a, found.of_n), log_y=False)
    if found.of_d:
        figure("law_d", "Loss and data", "different targets, U", lambda a: _law_d(a, found))
    if found.surface:
        figure("law_nd", "Loss, size and data", "parameters, N", lambda a: _surface(a, found))
    if found.repeated:
        figure("repetition", "Repetition", "passes over the same data", lambda a: _repetition(a, found))
    if found.isoflops:
        figure("isoflop", "Same FLOPs, different sizes", "parameters, N", lambda a: _isoflop(a, found))
    everything = [*found.scale, *found.held_out, *found.data, *found.repeated, *found.shapes]
    if len(everything) > 2:
        figure("metrics", "recall@10 and loss", "loss (nats)", lambda a: _metrics(a, everything, found), log_y=False)
    return made


def _law_n(axis: Any, found: Findings) -> None:
    n = [one.parameters for one in found.scale]
    line = np.geomspace(min(n) / 1.3, max([*n, *(one.parameters for one in found.held_out)]) * 1.5, 80)
    for color, (name, draws) in zip(_COLORS, found.of_n.items(), strict=False):
        axis.fill_between(line, *draws.curve(line), color=color, alpha=0.15, linewidth=0)
        axis.plot(line, draws.fit.predict(line), color=color, linewidth=1.5, label=f"{name}: {draws.fit.law.formula}")
    kept = {one.key for one in found.fitted}
    for is_kept, face in ((True, "#333a44"), (False, "white")):
        some = [one for one in found.scale if (one.key in kept) == is_kept]
        label = "fitted" if is_kept else "not converged"
        axis.plot(*_xy(some, found.split), "o", color="#333a44", markerfacecolor=face, label=label if some else None)
    for one in (found.prediction or {}).get("predictions", ()):
        axis.errorbar(
            [one["parameters"]],
            [one["loss"]],
            [[one["loss"] - one["low"]], [one["high"] - one["loss"]]],
            fmt="_",
            color="#333a44",
            capsize=4,
            markersize=10,
            label="predicted",
        )
    if found.held_out:
        axis.plot(*_xy(found.held_out, found.split), "*", color="#c0392b", markersize=13, label="held out, measured")
    axis.legend(frameon=False, fontsize=8)


def _residuals(axis: Any, draws: Mapping[str, Bootstrap]) -> None:
    for color, (name, one) in zip(_COLORS, draws.items(), strict=False):
        axis.plot(one.fit.x[:, 0], 100 * one.fit.residuals, "o-", color=color, linewidth=0.8, label=name)
    axis.axhline(0, color="#333a44", linewidth=0.8)
    axis.legend(frameon=False, fontsize=8)


def _law_d(axis: Any, found: Findings) -> None:
    for color, (size, draws) in zip(_COLORS * 3, found.of_d.items(), strict=False):
        line = np.geomspace(draws.fit.x.min() / 1.2, draws.fit.x.max() * 1.5, 60)
        axis.fill_between(line, *draws.curve(line), color=color, alpha=0.15, linewidth=0)
        axis.plot(line, draws.fit.predict(line), color=color, linewidth=1.3)
        axis.plot(draws.fit.x[:, 0], draws.fit.loss, "o", color=color, label=size)
    axis.legend(frameon=False, fontsize=8)


def _surface(axis: Any, found: Findings) -> None:
    some = next(iter(found.surface.values()))
    n, u, loss = some.fit.x[:, 0], some.fit.x[:, 1], some.fit.loss
    line = np.geomspace(n.min() / 1.2, n.max() * 1.5, 60)
    levels = sorted({round(float(np.log(value)), 1) for value in u})
    for color, level in zip(_COLORS * 3, levels, strict=False):
        is_here = np.abs(np.log(u) - level) < 0.06
        mean = float(np.exp(np.log(u[is_here]).mean()))
        axis.plot(n[is_here], loss[is_here], "o", color=color, label=f"U = {mean:,.0f}")
        for style, draws in zip(("-", ":"), found.surface.values(), strict=False):
            axis.plot(line, draws.fit.predict(np.stack([line, np.full_like(line, mean)], axis=1)), style, color=color)
    names = ", ".join(f"{style} {name}" for style, name in zip(("line:", "dots:"), found.surface, strict=False))
    axis.legend(frameon=False, fontsize=8, title=names, title_fontsize=8)


def _repetition(axis: Any, found: Findings) -> None:
    sizes = dict.fromkeys(one.size for one in found.repeated)
    for color, size in zip(_COLORS * 3, sizes, strict=False):
        some = sorted((one for one in found.repeated if one.size == size), key=lambda one: one.passes)
        passes = np.array([one.passes for one in some])
        axis.plot(passes, [one.loss(found.split) for one in some], "o", color=color, label=size)
        draws = found.repetition.get(size)
        if draws is not None:
            line = np.geomspace(max(1.0, passes.min()), passes.max() * 1.3, 60)
            at = np.stack([np.full_like(line, some[0].unique), line - 1], axis=1)
            axis.fill_between(line, *draws.curve(at), color=color, alpha=0.15, linewidth=0)
            axis.plot(line, draws.fit.predict(at), color=color, linewidth=1.3)
    axis.legend(frameon=False, fontsize=8)


def _isoflop(axis: Any, found: Findings) -> None:
    for color, curve in zip(_COLORS * 3, found.isoflops, strict=False):
        line = np.geomspace(curve.parameters.min(), curve.parameters.max(), 60)
        axis.plot(line, curve.predict(line), color=color, linewidth=1.3)
        axis.plot(curve.parameters, curve.loss, "o", color=color, label=f"{curve.compute:.1e} FLOPs")
        if curve.is_inside:
            axis.plot([curve.best_parameters], [curve.best_loss], "*", color=color, markersize=12)
    axis.legend(frameon=False, fontsize=8)


def _metrics(axis: Any, found: Sequence[Finished], all_found: Findings) -> None:
    kept = [one for one in found if "recall@10" in one.test]
    axis.set_xscale("linear")
    axis.plot([one.test["nll"] for one in kept], [one.test["recall@10"] for one in kept], "o", color=_COLORS[0])
    held = [one for one in all_found.held_out if "recall@10" in one.test]
    axis.plot([o.test["nll"] for o in held], [o.test["recall@10"] for o in held], "*", color=_COLORS[1], markersize=13)


def _xy(found: Sequence[Finished], split: str) -> tuple[list[int], list[float]]:
    means = mean_loss(found, split)
    return list(means), list(means.values())


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}"))
    axis.yaxis.set_minor_locator(NullLocator())
