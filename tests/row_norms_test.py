"""Norms and AUC of the values of a field by how often they occur."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "row_norms.py"
BOUNDS = [2, 5]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("row_norms", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parts_norms_and_auc_are_those_of_a_loop(script: ModuleType) -> None:
    draw = np.random.default_rng(0)
    count, vectors = draw.integers(0, 9, 60), draw.normal(size=(60, 4)).astype(np.float32)
    part = script.parts_of(count, BOUNDS)
    for value, found in zip(count.tolist(), part.tolist(), strict=True):
        assert found == (0 if value <= 2 else 1 if value <= 5 else 2)
    norms = script.norms_by_part(vectors, part, 4)
    for k in range(3):
        assert np.isclose(norms[k], np.mean([np.sqrt((v.astype(float) ** 2).sum()) for v in vectors[part == k]]))
    assert np.isnan(norms[3])  # nothing is in it
    logits, positive = draw.normal(size=60), draw.random(60) < 0.5
    aucs = script.auc_by_part(logits, positive, part, 4)
    for k in range(3):
        mine, theirs = logits[(part == k) & positive], logits[(part == k) & ~positive]
        assert np.isclose(aucs[k], np.mean([[x > y for y in theirs] for x in mine]))
    assert np.isnan(aucs[3])
