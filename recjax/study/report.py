"""The report of a scaling study: what was run, the laws as tables and plots, and whether the prediction held.

It is made from finished cells alone, at any time. An asymptote that the data do not tell apart from zero is given as
an interval; every exponent has one. What failed is said as plainly as what did not.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recjax.core.writer import environment
from recjax.result_files import write_json
from recjax.study import plots
from recjax.study.findings import Findings
from recjax.study.fit import Bootstrap, stated
from recjax.study.grid import Study
from recjax.study.parts import LAW_HEADER, law_rows, part_tables
from recjax.study.runner import Runner
from recjax.study.verdict import verdict
from recjax.tables import Table, number

REPORT, NUMBERS = "report.md", "study.json"
_SIMULATED = (
    "> **Simulated data.** The numbers below show that the study works on a built-in world; they are no results on "
    "real data and do not compare with published ones."
)


def write_report(runner: Runner, found: Findings, words: Sequence[str] = ()) -> Path:
    """Write report.md, its plots and study.json into the folder of the study; the path of the report."""
    study, folder = runner.study, runner.workdir
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(folder, study, found)
    said = verdict(study, found)
    sections = [
        f"# Scaling study: {study.recipe.name}",
        _SIMULATED if is_simulated(study) else "",
        _what_was_run(study, found, words),
        "## Verdict\n\n" + "\n".join(f"- {line}" for line in said),
    ]
    for table in tables(study, found):
        sections.append(f"## {table.title}\n\n{table.markdown()}")
    sections += [f"![{path.stem}]({path.name})" for path in drawn]
    write_json(folder / NUMBERS, numbers(found))
    path = folder / REPORT
    beside = folder / f".{REPORT}.{os.getpid()}.tmp"
    beside.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def tables(study: Study, found: Findings) -> list[Table]:
    """All tables that there are cells for."""
    made = [_sweep(found), _sizes(study, found), laws_table(found), _prediction(found), *part_tables(study, found)]
    return [table for table in made if table.rows]


def numbers(found: Findings) -> dict[str, Any]:
    """What the report says, for programs."""
    curve = found.allocation
    return {
        "laws": {name: law_numbers(draw) for name, draw in found.of_n.items()},
        "law": found.law and found.law.name,
        "errors_on_the_largest_fitted": dict(found.law_errors),
        "verified": list(found.verified),
        "of_data": {size: law_numbers(draw) for size, draw in found.of_d.items()},
        "surface": {name: law_numbers(draw) for name, draw in found.surface.items()},
        "repetition": {size: law_numbers(draw) for size, draw in found.repetition.items()},
        "allocation": curve and {"p": curve.p, "p_90": curve.p_interval, "q": curve.q, "q_90": curve.q_interval},
    }


def law_numbers(draw: Bootstrap) -> dict[str, Any]:
    """Formula and parameters of a fit."""
    return {"formula": draw.fit.law.formula, "points": len(draw.fit.loss), "parameters": stated(draw)}


def laws_table(found: Findings) -> Table:
    """The laws in N."""
    rows = [row for name, draw in found.of_n.items() for row in law_rows(name, draw)]
    return Table(title="Loss and size: the fitted laws", header=LAW_HEADER, rows=rows)


def is_simulated(study: Study) -> bool:
    """Whether the data are those of the built-in world."""
    return any(not task.data.path for task in study.recipe.mixture.tasks)


def _what_was_run(study: Study, found: Findings, words: Sequence[str]) -> str:
    cells = {one.key: one for one in [*found.scale, *found.held_out, *found.data, *found.repeated, *found.shapes]}
    seconds = sum(one.seconds for one in cells.values())
    rows = [
        ["command", f"`{shlex.join(words)}`" if words else "-"],
        ["data", ", ".join(task.data.path or "the simulated world" for task in study.recipe.mixture.tasks)],
        ["passes over the data", f"{study.passes:g} (sweep: {study.sweep_passes:g})"],
        ["seeds", ", ".join(map(str, study.seeds))],
        ["learning rates tried", ", ".join(f"{lr:g}" for lr in study.learning_rates)],
        ["loss", f"cross-entropy of the next item in nats, whole catalogue, nothing removed, split {study.split}"],
        ["training and evaluation", f"{seconds / 60:.0f} min for the cells in this report, sweep apart"],
        ["machine", environment()["system"]],
        ["prediction written", found.prediction["written"] if found.prediction else "not yet"],
    ]
    return "## What was run\n\n" + Table(title="", header=["", ""], rows=rows, words=True).markdown()


def _sweep(found: Findings) -> Table:
    rates = sorted({rate for losses in found.rates.tried.values() for rate in losses})
    rows = []
    for size, losses in found.rates.tried.items():
        cells = [_loss(losses.get(rate)) for rate in rates]
        edge = " (edge)" if found.rates.is_at_the_edge(size) else ""
        rows.append([size, *cells, f"{found.rates.best[size]:g}{edge}"])
    header = ["size", *(f"{rate:g}" for rate in rates), "chosen"]
    return Table(title="Learning rate by size: validation loss after the sweep", header=header, rows=rows)


def _sizes(study: Study, found: Findings) -> Table:
    rows = []
    kept = {one.key for one in found.fitted}
    for one in [*found.scale, *found.held_out]:
        state = found.converged.get(one.size)
        grown = "-" if state is None or state.twice_fall is None else f"{state.twice_fall:+.2%}"
        rows.append(
            [
                one.size,
                f"{one.num_layers}x{one.width}",
                f"{one.parameters:,}",
                f"{one.learning_rate:g}",
                str(one.seed),
                f"{one.passes:.1f}",
                f"{one.targets:,}",
                f"{one.flops['backbone'] * one.targets:.2e}",
                f"{one.compute:.2e}",
                _loss(one.valid["nll"]),
                _loss(one.test["nll"]),
                *(number(one.test.get(name)) for name in ("recall@10", "ndcg@10")),
                f"{one.best_step}/{one.steps}",
                "-" if state is None else f"{state.last_fall:.2%}",
                grown,
                "yes" if one.key in kept else "held out" if one in found.held_out else "no",
            ]
        )
    header = ["size", "layers x width", "N", "rate", "seed", "passes", "D", "C_backbone", "C_total", "valid", "test"]
    header += ["recall@10", "NDCG@10", "best step", "last fall", "fall when twice as long", "in the fit"]
    return Table(title="Sizes", header=header, rows=rows)


def _prediction(found: Findings) -> Table:
    rows = []
    verified = {one["size"]: one for one in found.verified}
    for one in (found.prediction or {}).get("predictions", ()):
        done: Mapping[str, Any] = verified.get(one["size"], {})
        rows.append(
            [
                one["size"],
                f"{one['parameters']:,}",
                _loss(one["loss"]),
                f"[{_loss(one['low'])}, {_loss(one['high'])}]",
                _loss(done.get("measured")),
                f"{done['relative_error']:+.2%}" if done else "-",
                ("yes" if done["is_covered"] else "no") if done else "-",
                _loss(one["naive"]),
                f"{done['naive_error']:+.2%}" if done else "-",
            ]
        )
    header = ["size", "N", "predicted", "90% interval", "measured", "error", "covered", "last fitted loss", "its error"]
    return Table(title="Predicted before it was trained, then measured", header=header, rows=rows)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
