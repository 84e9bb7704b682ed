"""What every test runs under: a CPU split into eight simulated devices, strict ranks, and caches of its own.

The variables are set before jax is first imported and are inherited by the processes that tests start.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    """Leave out what needs TensorFlow where seqio cannot be installed (Python 3.12), or an absent compiler."""
    needed = {"tensorflow": "seqio", "libtpu": "libtpu", "beam": "apache_beam", "onnx": "jax2onnx"}
    for marker, package in needed.items():
        if importlib.util.find_spec(package) is None:
            left_out = [item for item in items if item.get_closest_marker(marker)]
            items[:] = [item for item in items if item not in left_out]
            config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`: the tests of a file run in one worker, which makes what they share once.

    The trainings of `recipes_test.py` share what the stages of one recipe leave behind, so each recipe goes by itself.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            # Such as tests/recipes_test.py::test_it_trains_sharded_in_its_tiny_mode[ctr-1_train]
            recipe, _, _ = nodeid.partition("-")
            return recipe if "::test_it_trains_sharded_in_its_tiny_mode[" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server that speaks S3, with an empty bucket; returns the URL of the bucket."""
    import boto3
    import fsspec
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="shop")
        yield "s3://shop"
    running.stop()
    fsspec.filesystem("s3").clear_instance_cache()


def prepare_plainly(task: Any, cache: Path | None = None) -> None:
    """Put the examples of a task into the cache without TensorFlow, if they are not there.

    They are those of `recjax prepare` (tests/tasks compares the two), sooner, and also where seqio is not installed.
    """
    from recjax.core.errors import ExamplesError
    from recjax.data.examples import write_examples
    from recjax.tasks.cache import place_of
    from recjax.tasks.work import columns_of, examples_of

    place = place_of(task, cache)
    if place.path.exists():
        return
    work = task.work()
    facts = {"task": task.name, "content_hash": place.content_hash, **work.facts}
    try:
        kept = {name: getattr(work, name) for name in ("vocab", "items", "users", "text", "files")}
        with write_examples(place.path, facts=facts, **kept) as writer:
            for split, schema in work.schemas.items():
                writer.add(split, schema, columns_of(list(examples_of(work, split)), schema))
    except ExamplesError:
        if not place.path.exists():  # else another worker was first
            raise


@pytest.fixture(scope="session")
def prepare_here(recjax_cache: Path) -> Callable[..., None]:
    """`prepare_plainly`, for tests of their own recipes."""
    return prepare_plainly


@pytest.fixture(scope="session")
def tiny_recipe(recjax_cache: Path) -> Any:
    """A next-item recipe of seconds over the simulated world, dropout on; `model.with_` gives other transformers."""
    import functools

    from recjax.data.pipeline import Feed
    from recjax.data.simulate import World
    from recjax.data.sources import DataDir
    from recjax.evaluation import Evaluation
    from recjax.losses.softmax import CatalogueSoftmax
    from recjax.models.sequence import Sequence
    from recjax.nn.transformer import TransformerConfig
    from recjax.recipe import Recipe
    from recjax.tasks.mixtures import Mixture
    from recjax.tasks.next_item import NextItem

    class Model(functools.partial):
        def with_(self, transformer: TransformerConfig, dropout: float) -> Model:
            return Model(Sequence, encoder=transformer, max_length=16, embedding_dropout=dropout)

    transformer = TransformerConfig(num_layers=2, width=16, num_heads=2, dropout=0.2)
    task = NextItem(data=DataDir(simulate=World(num_events=3000)))
    prepare_plainly(task)
    return Recipe(
        name="tiny",
        mixture=Mixture(tasks=[task]),
        feed=Feed(batch_size=8, row_length=16, history_length=16),
        model=Model(Sequence, encoder=transformer, max_length=16, embedding_dropout=0.2),
        objectives=[CatalogueSoftmax()],
        evaluation=Evaluation(batch_size=256, max_users=64, bootstrap_samples=50),
        train_steps=4,
        log_every=1,
    )


@pytest.fixture(scope="session")
def tiny_gin(recjax_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe `sasrec` in its tiny mode, as a gin file, its examples prepared."""
    from recjax import command
    from recjax.core.flags import Flags

    path = tmp_path_factory.mktemp("gin") / "tiny.gin"
    path.write_text("include 'configs/recipe/sasrec/1_train.gin'\ninclude 'configs/run/tiny.gin'\n")
    recipe, _ = command.load(Flags(gin_files=(str(path),)))
    for task in recipe.mixture.tasks:
        prepare_plainly(task)
    return path
