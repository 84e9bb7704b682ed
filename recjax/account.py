"""What a training run cost and how steadily it went, read from the manifest and the metrics it left behind."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recjax.core.writer import MANIFEST, METRICS, read_metrics

_BEFORE = 10  # logged losses that the next one is held against
_SPIKE, _LEAST = 6.0, 0.01


def account(workdir: Path, *, targets: int) -> dict[str, str]:
    """In words: parameters (tables aside), the arithmetic of training on so many targets, of tables that earlier models
    left the shares of rows whose values they know, gradient norms and spikes.

    Empty where a run left nothing behind. A teacher's arithmetic is to be shared among its students by the reader.
    """
    try:
        manifest = json.loads((workdir / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    counts, flops = manifest["parameters"], manifest["flops_per_token"]
    records = read_metrics(workdir / METRICS)
    return {
        "parameters": f"{sum(counts.values()) - counts['embedding']:,}",
        "training_flops": f"{sum(flops.values()) * targets:.2e}",
        **{f"known_{name}": _shares(fields) for name, fields in manifest.get("tables", {}).items()},
        **steadiness(records),
    }


def steadiness(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Median and largest norm of the gradient, and how many of the logged losses are spikes.

    A spike is more than six times as far above the median of the ten before it as these usually are from it, and at
    least 6% above it.
    """
    logged = [record for record in records if "train/loss" in record]
    losses, norms = ([record[f"train/{name}"] for record in logged] for name in ("loss", "grad_norm"))
    if not logged:
        return {}
    spikes = sum(_is_spike(losses[at - _BEFORE : at], losses[at]) for at in range(_BEFORE, len(losses)))
    return {
        "gradient_norm": f"{statistics.median(norms):.3g} (most {max(norms):.3g})",
        "loss_spikes": f"{spikes} of {len(losses)}",
    }


def _shares(fields: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in fields.items())


def _is_spike(before: Sequence[float], loss: float) -> bool:
    middle = statistics.median(before)
    usual = 1.4826 * statistics.median(abs(x - middle) for x in before)
    return loss - middle > _SPIKE * max(usual, _LEAST * abs(middle))
