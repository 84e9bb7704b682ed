"""How validation went while stages trained, stage beside stage: what one epoch gives and what the next ones take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from recjax.tables import Table, number

_COLUMNS = 10
_WANTED = ("auc", "grouped_auc", "gauc", "weighted_auc", "ndcg@10", "log_loss", "nll")

# Of each seed of a stage the records of its metrics.jsonl.
Records = Sequence[Sequence[Mapping[str, float]]]


def curve(records: Records, metric: str) -> dict[int, float]:
    """Step -> the mean over seeds of a validation metric, at the steps at which all seeds were evaluated."""
    seeds = [{int(r["step"]): r[f"valid/{metric}"] for r in one if f"valid/{metric}" in r} for one in records]
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    return {step: float(np.mean([values[step] for values in seeds])) for step in steps}


def curves_tables(stages: Mapping[str, Records]) -> list[Table]:
    """A table for each metric that any stage was evaluated by several times: stages down, steps across.

    Of many steps some are shown, the last among them.
    """
    tables = []
    for metric in _WANTED:
        curves = {name: found for name, records in stages.items() if len(found := curve(records, metric)) > 1}
        steps = sorted({step for found in curves.values() for step in found})
        if not curves:
            continue
        chosen = [steps[at] for at in np.unique(np.linspace(0, len(steps) - 1, _COLUMNS).round().astype(int))]
        rows = [[name, *(number(found.get(step)) for step in chosen)] for name, found in curves.items()]
        tables.append(Table(title=f"Validation: {metric} by step", header=["", *map(str, chosen)], rows=rows))
    return tables
