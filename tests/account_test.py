"""What a run says it cost, and which losses are spikes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from recjax.account import account, steadiness


def records(losses: np.ndarray) -> list[dict[str, float]]:
    return [{"step": i, "train/loss": float(x), "train/grad_norm": 1.0 + i} for i, x in enumerate(losses)]


def test_a_spike_stands_out_of_what_came_before_and_a_slope_does_not() -> None:
    falling = 2 * np.exp(-np.arange(60) / 20) + 0.02 * np.random.default_rng(0).normal(size=60)
    assert steadiness(records(falling))["loss_spikes"] == "0 of 60"
    falling[[30, 45]] += 1.0
    assert steadiness(records(falling))["loss_spikes"] == "2 of 60"
    assert steadiness(records(falling))["gradient_norm"] == "30.5 (most 60)"
    assert steadiness([{"step": 3, "valid/auc": 0.5}]) == {}


def test_a_run_is_accounted_for(tmp_path: Path) -> None:
    assert account(tmp_path, targets=10) == {}
    flops = {"weights": 100.0, "attention": 20.0, "softmax": 3.0}
    manifest = {"parameters": {"embedding": 5000, "backbone": 1200, "norm_bias": 34}, "flops_per_token": flops}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(np.ones(3))))
    found = account(tmp_path, targets=1000)
    assert found["parameters"] == "1,234" and found["training_flops"] == "1.23e+05"
    assert found["loss_spikes"] == "0 of 3" and not any(name.startswith("known") for name in found)
    manifest["tables"] = {"start": {"user_id": 0.8125, "item_id": 1.0}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert account(tmp_path, targets=1000)["known_start"] == "user_id 81.2%, item_id 100.0%"
