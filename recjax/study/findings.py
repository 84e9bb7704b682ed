"""Everything a study has found so far, worked out from its finished cells; nothing is trained and nothing written.

A part of the study with too few finished cells is None or empty, so that a report can be made at any time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recjax.core.errors import ConfigError
from recjax.study import prediction
from recjax.study.curves import Allocation, IsoFlop, allocation, isoflop
from recjax.study.fit import Bootstrap, bootstrap, fit
from recjax.study.grid import HELD_OUT, Cell
from recjax.study.laws import DATA, JOINT, KAPLAN, REPETITION, Law
from recjax.study.ledger import Finished
from recjax.study.rates import Convergence, Rates, convergence
from recjax.study.runner import Runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """`scale`, `held_out`, ...: finished cells of each part. Laws are bootstraps: `of_n` by name, `of_d` and
    `repetition` by size. `fitted` are the cells of `scale` that count."""

    rates: Rates
    scale: Sequence[Finished]
    converged: Mapping[str, Convergence]
    fitted: Sequence[Finished]
    of_n: Mapping[str, Bootstrap]
    law: Law | None
    law_errors: Mapping[str, float]
    prediction: Mapping[str, Any] | None
    held_out: Sequence[Finished]
    verified: Sequence[Mapping[str, Any]]
    data: Sequence[Finished]
    of_d: Mapping[str, Bootstrap]
    surface: Mapping[str, Bootstrap]
    repeated: Sequence[Finished]
    repetition: Mapping[str, Bootstrap]
    shapes: Sequence[Finished]
    isoflops: Sequence[IsoFlop]
    allocation: Allocation | None
    ablation: Mapping[tuple[str, str], Sequence[Finished]]
    split: str

    def is_monotone(self) -> bool:
        """Whether every larger size has a smaller mean loss, held-out sizes included."""
        losses = mean_loss([*self.fitted, *self.held_out], self.split)
        values = [losses[n] for n in sorted(losses)]
        return all(a > b for a, b in zip(values, values[1:], strict=False))


def find(runner: Runner) -> Findings:
    """Work everything out."""
    study, split, samples = runner.study, runner.study.split, runner.study.bootstrap_samples
    parts = {
        kind: runner.finished(runner.cells(kind))
        for kind in ("scale", "data", "repeat", "shape", "isoflop", "ablation")
    }
    only = {kind: [one for _, one in found] for kind, found in parts.items()}
    converged, fitted = fitted_cells(runner)
    law, errors = None, {}
    if len({one.parameters for one in fitted}) > 2:
        law, errors = prediction.choose_law(fitted, split, study.law)
    written = prediction.existing(runner.workdir)
    content = None if written is None else prediction.read(written, runner.ledger)
    held_out = [one for _, one in runner.finished(held_out_cells(runner, content))] if content else []
    data = only["data"] + [one for one in only["scale"] if one.size in study.data_sizes] if study.data_sizes else []
    repeated = only["repeat"]
    isoflops = [
        isoflop(budget, [o.parameters for o in found], [o.targets for o in found], [o.loss(split) for o in found])
        for budget in study.budgets
        if len(found := [one for cell, one in parts["isoflop"] if cell.budget == budget]) >= 3
    ]
    ablation: dict[tuple[str, str], list[Finished]] = {}
    for cell, one in parts["ablation"]:
        ablation.setdefault((cell.size.name, cell.arm.name), []).append(one)
    everything = unique([*fitted, *data])
    return Findings(
        rates=runner.rates(),
        scale=only["scale"],
        converged=converged,
        fitted=fitted,
        of_n=prediction.bootstraps(fitted, split, samples) if law else {},
        law=law,
        law_errors=errors,
        prediction=content,
        held_out=held_out,
        verified=prediction.verify(content, held_out) if content else [],
        data=data,
        of_d=_by_size(DATA, data, ("unique",), split, samples),
        surface={} if not data else _all((JOINT, KAPLAN), everything, ("parameters", "unique"), split, samples),
        repeated=repeated,
        repetition=_by_size(REPETITION, unique([*repeated, *data]), ("unique", "repeats"), split, samples, repeated),
        shapes=only["shape"],
        isoflops=isoflops,
        allocation=allocation(isoflops, samples=samples),
        ablation=ablation,
        split=split,
    )


def fitted_cells(runner: Runner) -> tuple[dict[str, Convergence], list[Finished]]:
    """Whether each size has converged, and the cells of `scale` that enter the fit."""
    study = runner.study
    twice = {cell.size.name: one for cell, one in runner.finished(runner.cells("twice"))}
    found = runner.finished(runner.cells("scale"))
    converged = {
        cell.size.name: convergence(one, twice.get(cell.size.name), study.tolerance)
        for cell, one in found
        if cell.seed == study.seeds[0]
    }
    kept = [
        one
        for cell, one in found
        if not study.only_converged or (cell.size.name in converged and converged[cell.size.name].is_converged)
    ]
    return converged, kept


def held_out_cells(runner: Runner, content: Mapping[str, Any] | None = None) -> list[Cell]:
    """The held-out cells, with the learning rates of the prediction where there is one."""
    stated = {one["size"]: float(one["learning_rate"]) for one in (content or {}).get("predictions", ())}
    rates = runner.rates()
    return runner.cells(HELD_OUT, lambda size: stated.get(size.name, 0.0) or rates(size))


def values(found: Sequence[Finished], names: Sequence[str]) -> np.ndarray:
    """Inputs of laws [n, i]: "parameters" N, "unique" U, "targets" D, "repeats" R = passes - 1."""
    columns = [[max(one.passes - 1, 0.0) if n == "repeats" else getattr(one, n) for one in found] for n in names]
    return np.array(columns, float).T


def mean_loss(found: Sequence[Finished], split: str) -> dict[int, float]:
    """Mean over seeds, by N."""
    by_n: dict[int, list[float]] = {}
    for one in found:
        by_n.setdefault(one.parameters, []).append(one.loss(split))
    return {n: float(np.mean(losses)) for n, losses in by_n.items()}


def unique(found: Sequence[Finished]) -> list[Finished]:
    """Each cell once."""
    return list({one.key: one for one in found}.values())


def _by_size(
    law: Law,
    found: Sequence[Finished],
    names: Sequence[str],
    split: str,
    samples: int,
    needed: Sequence[Finished] | None = None,
) -> dict[str, Bootstrap]:
    """One law for every size that has cells enough (and that `needed` has cells of)."""
    sizes = dict.fromkeys(one.size for one in (found if needed is None else needed))
    out = {}
    for size in sizes:
        some = _all((law,), [one for one in found if one.size == size], names, split, samples)
        if law.name in some:
            out[size] = some[law.name]
    return out


def _all(
    laws: Sequence[Law], found: Sequence[Finished], names: Sequence[str], split: str, samples: int
) -> dict[str, Bootstrap]:
    """Every law that the cells suffice for."""
    out, losses = {}, np.array([one.loss(split) for one in found])
    for law in laws:
        try:
            out[law.name] = bootstrap(fit(law, values(found, names), losses), samples=samples)
        except ConfigError:  # too few points so far
            continue
    return out
