"""The tables of the further parts of a study: data, repetition, shape, isoFLOP, ablation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from recjax.study.findings import Findings
from recjax.study.fit import Bootstrap, stated
from recjax.study.grid import Study
from recjax.tables import Table, number

LAW_HEADER = ("", "form", "parameter", "value", "90% interval", "largest residual")


def law_rows(name: str, draw: Bootstrap) -> list[list[str]]:
    """One row for every parameter of a fit; an E that is not identifiable has its interval only."""
    worst = f"{max(abs(draw.fit.residuals)):.2%}"
    rows = []
    for parameter, one in stated(draw).items():
        value = "not identifiable" if one["value"] is None else f"{one['value']:.4g}"
        bounds = f"[{one['low']:.4g}, {one['high']:.4g}]"
        rows.append([name, draw.fit.law.formula, parameter, value, bounds, worst])
    return rows


def part_tables(study: Study, found: Findings) -> list[Table]:
    """All of them; those without cells have no rows."""
    return [
        _data(found),
        _laws("Loss and data: the fitted laws", {**found.of_d, **found.surface}),
        _repeated(found),
        _laws("Repetition: what a further pass is worth", found.repetition),
        _shapes(found),
        _isoflops(found),
        _ablation(study, found),
    ]


def _laws(title: str, draws: Mapping[str, Bootstrap]) -> Table:
    rows = [row for name, draw in draws.items() for row in law_rows(name, draw)]
    return Table(title=title, header=LAW_HEADER, rows=rows)


def _data(found: Findings) -> Table:
    order = sorted(found.data, key=lambda one: (one.parameters, one.unique))
    rows = [
        [one.size, f"{one.parameters:,}", f"{one.user_fraction:g}", f"{one.unique:,}", f"{one.passes:.1f}"]
        + [f"{one.targets:,}", f"{one.loss(found.split):.4f}", number(one.test.get("recall@10"))]
        for one in order
    ]
    header = ["size", "N", "share of users", "U", "passes", "D", "loss", "recall@10"]
    return Table(title="Loss and data (the held-out users stay the same)", header=header, rows=rows)


def _repeated(found: Findings) -> Table:
    order = sorted(found.repeated, key=lambda one: (one.parameters, one.targets))
    rows = [
        [
            one.size,
            f"{one.unique:,}",
            f"{one.passes:.2f}",
            f"{one.loss(found.split):.4f}",
            f"{one.best_step}/{one.steps}",
        ]
        for one in order
    ]
    return Table(
        title="Repetition: U fixed, passes vary", header=["size", "U", "passes", "loss", "best step"], rows=rows
    )


def _shapes(found: Findings) -> Table:
    order = sorted(found.shapes, key=lambda one: one.width / one.num_layers)
    rows = [
        [one.size, f"{one.num_layers}x{one.width}", f"{one.width / one.num_layers:.1f}", f"{one.parameters:,}"]
        + [f"{one.learning_rate:g}", f"{one.loss(found.split):.4f}", number(one.test.get("recall@10"))]
        for one in order
    ]
    title = "Shape"
    if order:
        n = [one.parameters for one in order]
        aspects = [one.width / one.num_layers for one in order]
        title = f"Shape: N within {max(n) / min(n) - 1:.1%}, width over layers over {max(aspects) / min(aspects):.0f}x"
    return Table(title=title, header=["size", "layers x width", "aspect", "N", "rate", "loss", "recall@10"], rows=rows)


def _isoflops(found: Findings) -> Table:
    rows = []
    for curve in found.isoflops:
        best = f"{curve.best_parameters:,.0f}" if curve.is_inside else f"{curve.best_parameters:,.0f} (edge)"
        cells = ", ".join(f"{n:,.0f}: {loss:.4f}" for n, loss in zip(curve.parameters, curve.loss, strict=True))
        rows.append([f"{curve.compute:.2e}", best, f"{curve.best_targets:,.0f}", f"{curve.best_loss:.4f}", cells])
    header = ["C_total", "N_opt", "D_opt", "loss there", "N: loss"]
    return Table(title="IsoFLOP: the best size for a budget", header=header, rows=rows)


def _ablation(study: Study, found: Findings) -> Table:
    arms = [name for name, _ in study.arms]
    rows = []
    for size in study.of("ablation_sizes"):
        losses = {
            arm: float(np.mean([one.loss(found.split) for one in cells]))
            for (name, arm), cells in found.ablation.items()
            if name == size.name
        }
        if losses:
            rows.append(
                [size.name, str(size.num_layers), f"{size.parameters:,}", *(_or_dash(losses.get(a)) for a in arms)]
            )
    return Table(title="Ablation: loss of every arm", header=["size", "layers", "N", *arms], rows=rows)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
