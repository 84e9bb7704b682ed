"""A study of seconds over the simulated world, and finished cells that were never run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GIN = """
from __gin__ import dynamic_registration
from recjax import recipe
from recjax.core import switch
from recjax.study import grid

include 'configs/recipe/scaling_law/1_train.gin'
include 'configs/run/tiny.gin'

grid.Study.recipe = @recipe.Recipe()
grid.Study.sizes = [('a', 1, 8, 1), ('b', 1, 16, 1), ('c', 1, 24, 1)]
grid.Study.held_out = [('d', 1, 32, 1)]
grid.Study.learning_rates = [1e-2]
grid.Study.sweep_passes = 0.25
grid.Study.passes = 0.5
grid.Study.evaluations = 2
grid.Study.only_converged = False
grid.Study.bootstrap_samples = 100
"""


@pytest.fixture
def study_gin(tmp_path: Path) -> Path:
    path = tmp_path / "tiny_study.gin"
    path.write_text(GIN)
    return path


@pytest.fixture
def make_runner(study_gin: Path, prepare_here: Callable[..., None]) -> Callable[..., Any]:
    """A runner of the tiny study with further bindings."""
    from recjax.core.flags import Flags
    from recjax.study.runner import Runner

    def make(workdir: Path, *bindings: str) -> Any:
        runner = Runner(Flags(gin_files=(str(study_gin),), bindings=bindings), workdir, say=lambda text: None)
        for task in runner.study.recipe.mixture.tasks:
            prepare_here(task)
        return runner

    return make


@pytest.fixture
def finished() -> Callable[..., Any]:
    """A finished cell with a given loss."""
    from recjax.study.ledger import Finished

    def make(loss: float, *, parameters: int = 3072, key: str = "", curve: Any = None, **other: Any) -> Finished:
        size = other.get("size", f"n{parameters}")
        content: dict[str, Any] = {
            "key": key or f"{size}-{loss}-{other.get('seed', 0)}-{other.get('learning_rate', 0.01)}",
            "label": "",
            "size": size,
            "num_layers": 1,
            "width": 16,
            "num_heads": 1,
            "parameters": parameters,
            "learning_rate": 0.01,
            "seed": 0,
            "user_fraction": 1.0,
            "arm": "",
            "budget": 0.0,
            "unique": 1000,
            "targets": 5000,
            "flops": {"backbone": 1.0, "total": 2.0},
            "steps": 20,
            "best_step": 20,
            "curve": curve or [[10, loss * 1.1], [20, loss]],
            "valid": {"nll": loss},
            "test": {"nll": loss, "recall@10": 0.1, "ndcg@10": 0.05},
            "examples": "x",
            "seconds": 1.0,
            "finished": "2026-01-01T00:00:00+00:00",
        }
        return Finished(**{**content, **other})

    return make
