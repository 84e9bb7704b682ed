"""A quantiser from data to artifact, by the verbs: trained, resumed, inferred, extended."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest

from recjax.codes_evaluation import CodesEvaluation
from recjax.core.artifact import read_artifact
from recjax.core.checkpoint import Checkpoints
from recjax.core.errors import ConfigError, UnservableError
from recjax.core.sharding import MeshConfig
from recjax.core.state import by_path
from recjax.core.writer import read_metrics
from recjax.data.catalogue import CatalogueFeed
from recjax.data.codes import read_codes, report
from recjax.data.features import ItemVectors
from recjax.data.sources import DataDir
from recjax.data.vocab import FIRST_ITEM
from recjax.evaluate import evaluate_run
from recjax.infer import infer_run
from recjax.losses.codes import ResidualQuantization
from recjax.models.codes import ResidualKMeans, RqVae
from recjax.prepare import ensure_prepared
from recjax.quantise import codes_by, codes_of, content_codes
from recjax.recipe import Assembly, Recipe
from recjax.tasks.mixtures import Mixture
from recjax.tasks.next_item import NextItem
from recjax.train import train
from recjax.trained import load

WIDTH, ITEMS, MORE = 6, 90, 15
ONE = jax.devices()[:1]


def data(folder: Path, items: int) -> str:
    """A log over the first `items` items, and vectors of all of them."""
    rng = np.random.default_rng(0)
    events = [(u, int(i), t) for u in range(60) for t, i in enumerate(rng.permutation(items)[:8])]
    folder.mkdir()
    pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(
        folder / "interactions.parquet"
    )
    pl.DataFrame({"item_id": range(items), "title": [f"title {i}" for i in range(items)]}).write_parquet(
        folder / "items.parquet"
    )
    np.save(folder / "text.npy", np.random.default_rng(1).normal(size=(ITEMS + MORE, WIDTH)).astype(np.float32))
    pl.DataFrame({"item_id": range(ITEMS + MORE)}).write_parquet(folder / "text_ids.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, prepare_here: Callable[..., None]) -> Recipe:
    path = data(tmp_path_factory.mktemp("log") / "data", ITEMS)
    task = NextItem(data=DataDir(path=path), catalogue="items")
    prepare_here(task)
    settings = {"content_width": WIDTH, "hidden": (8,), "width": 4, "levels": 2, "size": 8, "revive_after": 2}
    return Recipe(
        name="codes",
        mixture=Mixture(tasks=[task]),
        feed=CatalogueFeed(batch_size=16),
        model=functools.partial(RqVae, collisions=32, iterations=5, **settings),
        objectives=[ResidualQuantization()],
        facts=[ItemVectors(path=f"{path}/text.npy", standardise=False)],
        evaluation=CodesEvaluation(batch_size=32),
        mesh=MeshConfig(shape="data=-1"),
        train_steps=6,
        log_every=1,
    )


def losses(workdir: Path) -> dict[int, float]:
    return {int(r["step"]): r["train/loss"] for r in read_metrics(workdir / "metrics.jsonl") if "train/loss" in r}


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    train(recipe, workdir, devices=ONE)
    return workdir


def test_a_resumed_run_is_the_uninterrupted_one(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    """To the bit, with what the model keeps itself; revival draws and the position in the catalogue included."""
    for last in (2, 5, 6):
        train(dataclasses.replace(recipe, train_steps=last), tmp_path, devices=ONE)
    assert losses(tmp_path) == losses(finished) and len(losses(finished)) == 6
    whole, resumed = (by_path(load(recipe, place).params) for place in (finished, tmp_path))
    for path, value in whole.items():
        np.testing.assert_array_equal(resumed[path], value, err_msg=path)
    assert whole["idle"].any()


def test_many_devices_train_alike(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    """Revival draws apart, which follow the layout of no device: the same items are drawn."""
    split = MeshConfig(shape="data=4,model=2", preset="fsdp_model")
    train(dataclasses.replace(recipe, mesh=split), tmp_path)
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(finished).values()), rtol=1e-4)


def test_the_artifact_holds_what_the_model_gives(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    run = load(recipe, finished)
    codes = read_codes(infer_run(run, kind="codes", out=tmp_path / "codes"), vocabulary_hash=run.assembly.vocab.hash)
    assert codes.sizes == (8, 8, 32) and codes.item_ids == run.assembly.vocab.ids
    ids = np.arange(FIRST_ITEM, FIRST_ITEM + ITEMS)
    out = run.assembly.model.apply(run.params, {"item_ids": jax.numpy.asarray(ids)}, train=False, key=None)
    np.testing.assert_array_equal(codes.content, out["codes"])
    np.testing.assert_array_equal(codes.codebooks, run.params["codebooks"])
    manifest = read_artifact(tmp_path / "codes").manifest
    assert (manifest["recipe"], manifest["step"]) == ("codes", 6)
    found = report(codes)
    last = [r for r in read_metrics(finished / "metrics.jsonl") if "valid/distinct" in r][-1]
    assert last["valid/distinct"] == found["distinct"] and last["valid/largest"] == found["largest"]
    content, missed = np.asarray(out["content"]), np.asarray(out["content"] - out["reconstruction"])
    assert last["valid/unexplained"] == pytest.approx((missed**2).sum() / (content**2).sum(), rel=1e-4)


def test_a_catalogue_that_grew_keeps_its_codes(
    recipe: Recipe, finished: Path, tmp_path: Path, prepare_here: Callable[..., None]
) -> None:
    old = read_codes(infer_run(load(recipe, finished), kind="codes", out=tmp_path / "old"))
    path = data(tmp_path / "data", ITEMS + MORE)
    task = NextItem(data=DataDir(path=path), catalogue="items")
    prepare_here(task)
    facts = [ItemVectors(path=f"{path}/text.npy", standardise=False)]
    run = load(dataclasses.replace(recipe, mixture=Mixture(tasks=[task]), facts=facts), finished)
    new = read_codes(infer_run(run, kind="codes", out=tmp_path / "new", extend=str(tmp_path / "old")))
    assert len(new.codes) == ITEMS + MORE and new.vocabulary_hash == run.assembly.vocab.hash != old.vocabulary_hash
    had = dict(zip(old.item_ids, old.codes.tolist(), strict=True))
    assert all(had.get(i, c) == c for i, c in zip(new.item_ids, new.codes.tolist(), strict=True))
    np.testing.assert_array_equal(new.content, content_codes(run.assembly.model, run.params, run.assembly.vocab)[0])
    other = {**run.params, "codebooks": run.params["codebooks"] + 1}
    with pytest.raises(ConfigError, match="other books"):
        infer_run(
            dataclasses.replace(run, params=other), kind="codes", out=tmp_path / "x", extend=str(tmp_path / "old")
        )


def test_residual_k_means_needs_no_step(recipe: Recipe, tmp_path: Path) -> None:
    """A run of no steps fits the books, and spells items as the plain function does with them."""
    model = functools.partial(ResidualKMeans, content_width=WIDTH, levels=2, size=8, collisions=32, normalize=True)
    plain = dataclasses.replace(recipe, model=model, train_steps=0, checkpoints=Checkpoints(metric="distinct"))
    outcome = train(plain, tmp_path / "run", devices=ONE)
    run = load(plain, tmp_path / "run")
    codes = read_codes(infer_run(run, kind="codes", out=tmp_path / "codes"))
    items = plain.facts[0](run.assembly.examples)["item/vectors"][FIRST_ITEM : FIRST_ITEM + ITEMS]
    assert outcome.step == 0 and codes.sizes == (8, 8, 32) and codes.codebooks is not None
    np.testing.assert_array_equal(codes_of(items, codes.codebooks, normalize=True)[0], codes.content)
    assert all(level["used"] == 8 for level in report(codes)["levels"])


def test_what_ranks_nobody_is_not_ranked(recipe: Recipe, finished: Path, tmp_path: Path, tiny_recipe: Any) -> None:
    assert evaluate_run(recipe, finished) == {}
    run = load(recipe, finished)
    for kind in ("recommendations", "item_vectors"):
        with pytest.raises(UnservableError, match="RqVae spells items and answers no user"):
            infer_run(run, kind=kind, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="item_vectors cannot be extended"):
        infer_run(run, kind="item_vectors", out=tmp_path / "out", extend="codes")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no metric 'ndcg@10'"):
        dataclasses.replace(recipe, checkpoints=Checkpoints(metric="ndcg@10"))
    ranker = Assembly(tiny_recipe, ensure_prepared(tiny_recipe.mixture))
    with pytest.raises(UnservableError, match="Sequence gives no codes"):
        codes_by(ranker.model, ranker.abstract_params(), ranker.vocab)
