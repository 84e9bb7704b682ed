"""What every test runs under: a CPU split into eight simulated devices, strict ranks, and caches of its own.

The variables are set before jax is first imported and are inherited by the processes that tests start.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("recjax", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("recjax")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Compiled programs are kept between runs and shared by the workers, which halves the time of a second run. A file cut
# short by a killed process is compiled anew, with a warning that pyproject.toml lets pass.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/recjax-tests-compiled-{os.getuid()}")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["MPLBACKEND"] = "agg"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


@pytest.fixture(scope="session", autouse=True)
def recjax_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared-examples cache of this test run, shared by its workers: what one prepares, the others read."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "recjax-cache"
    cache.mkdir(exist_ok=True)
    os.environ["RECJAX_CACHE"] = str(cache)
    return cache


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs TensorFlow where seqio cannot be installed (Python 3.12)."""
    if importlib.util.find_spec("seqio") is None:
        left_out = [item for item in items if item.get_closest_marker("tensorflow")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
