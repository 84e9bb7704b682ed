"""What several seeds of one stage found, told as one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recjax.arms import MODEL


def mean_of_seeds(metrics: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """metrics.json of the first seed with the model's values, and the bounds of their intervals, averaged over seeds.

    Baselines have no seed. Buckets, samples and the differences to the baselines stay those of the first seed; the
    protocol says so, and `per_seed` keeps every seed's values.
    """
    out: dict[str, Any] = copy.deepcopy(dict(metrics[0]))
    out["per_seed"] = {str(seed): m["rows"][MODEL] for seed, m in zip(seeds, metrics, strict=True)}
    out["protocol"]["seeds"] = {**out["protocol"]["seeds"], "recipe": list(seeds)}
    if len(metrics) > 1:
        for name in out["rows"][MODEL]:
            out["rows"][MODEL][name] = float(np.mean([m["rows"][MODEL][name] for m in metrics]))
        for name in out["intervals"][MODEL]:
            out["intervals"][MODEL][name] = np.mean([m["intervals"][MODEL][name] for m in metrics], axis=0).tolist()
        out["protocol"]["several_seeds"] = (
            "values of the model and bounds of their intervals are means over the seeds; buckets, hard tasks, samples "
            f"and differences are of seed {seeds[0]}"
        )
    return out
