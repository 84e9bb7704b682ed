"""A teacher's lists belong to events: fed beside the right ones, and refused when they are not theirs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.artifact import read_artifact, write_artifact
from recjax.core.errors import ArtifactError
from recjax.core.module import Functional
from recjax.data.examples import Examples
from recjax.data.pipeline import Feed, train_batches
from recjax.data.teacher import KIND, Teacher, open_rankings, read_rankings
from recjax.data.vocab import FIRST_ITEM
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig
from recjax.rankings import write_rankings
from recjax.tasks.cache import place_of

K = 4


@pytest.fixture(scope="module")
def examples(tiny_recipe: Any) -> Examples:
    return Examples.open(place_of(tiny_recipe.mixture.tasks[0]).path)


def events(examples: Examples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User number, position and item of every training event that has one before it."""
    found = [
        (int(e["user_index"]), p, int(e["items"][p]))
        for e in examples.source("train")
        for p in range(1, len(e["items"]))
    ]
    users, positions, items = (np.asarray(x) for x in zip(*found, strict=True))
    return users, positions, items


def list_of(users: np.ndarray, positions: np.ndarray, items: np.ndarray) -> np.ndarray:
    """A list that tells its event: a popularity-noised oracle would look like it."""
    return np.stack([items, users % 50 + 2, positions % 50 + 2, np.full_like(items, 3)], axis=1)


@pytest.fixture(scope="module")
def artifact(examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "lists"
    users, positions, items = events(examples)
    order = np.random.default_rng(0).permutation(len(users))
    with open_rankings(path, examples) as writer:
        for some in np.array_split(order, 3):
            rows = list_of(users[some], positions[some], items[some])
            writer.add(users[some], positions[some], rows, rows / 7)
    return path


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    found = read_artifact(path, kind=KIND)
    return {name: np.array(found[name]) for name in found}


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("history", ["chunk", "subsample"])
def test_every_target_comes_with_its_list(examples: Examples, artifact: Path, pack: bool, history: str) -> None:
    more: dict[str, Any] = {"batch_size": 8, "row_length": 16, "history_length": 8, "pack": pack, "history": history}
    plain = train_batches([examples], [1.0], Feed(**more), seed=0)
    taught = train_batches([examples], [1.0], Feed(teacher=Teacher(path=str(artifact), k=3), **more), seed=0)
    for _ in range(5):
        want, got = next(plain), next(taught)
        rows, distance = got.pop("teacher/rows"), got.pop("teacher/distance")
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])
        assert rows.shape == (8, 16, 3) and distance.dtype == np.float32
        real = got["weight"] > 0
        np.testing.assert_array_equal(rows[real, 0], got["target_ids"][real])
        np.testing.assert_allclose(distance[real], rows[real] / 7, rtol=1e-6)
        assert not rows[got["segment_ids"] == 0].any()


def test_lists_may_come_in_any_order_but_not_without_their_events(
    examples: Examples, artifact: Path, tmp_path: Path
) -> None:
    want, arrays = read_rankings(artifact, examples), arrays_of(artifact)
    order = np.random.default_rng(1).permutation(len(arrays["rows"]))
    facts = {"vocabulary_hash": examples.vocab.hash, "about": {"examples": examples.hash}, "kind": KIND}
    together = {name: a[order] if name != "alignment" else a for name, a in arrays.items()}
    write_artifact(tmp_path / "together", together, **facts)
    got = read_rankings(tmp_path / "together", examples)
    np.testing.assert_array_equal(got.rows, want.rows)
    np.testing.assert_array_equal(got.distance, want.distance)
    write_artifact(tmp_path / "alone", arrays | {"rows": arrays["rows"][order]}, **facts)
    with pytest.raises(ArtifactError, match="do not belong together"):
        read_rankings(tmp_path / "alone", examples)


def test_lists_of_other_examples_or_events_are_refused(examples: Examples, artifact: Path, tmp_path: Path) -> None:
    arrays = arrays_of(artifact)
    facts = {"vocabulary_hash": examples.vocab.hash, "kind": KIND}
    write_artifact(tmp_path / "other", arrays, about={"examples": "0" * 12}, **facts)
    with pytest.raises(ArtifactError, match="made from the examples"):
        read_rankings(tmp_path / "other", examples)
    for name, user, position, message in (("none", 10**6, 1, "there is no event"), ("twice", 0, 1, "two lists")):
        with open_rankings(tmp_path / name, examples) as writer:
            one = np.asarray([user, user]), np.asarray([position, position])
            writer.add(*one, np.full((2, K), 3), np.zeros((2, K)))
        with pytest.raises(ArtifactError, match=message):
            read_rankings(tmp_path / name, examples)


def test_rankings_of_a_model_are_those_of_each_prefix(examples: Examples, tmp_path: Path) -> None:
    limit = 6
    encoder = TransformerConfig(num_layers=1, width=8, num_heads=2)
    num_rows, num_items = examples.vocab.num_rows, examples.vocab.num_items
    model = Functional(functools.partial(Sequence, num_rows=num_rows, encoder=encoder, max_length=limit))
    params = jax.tree.map(lambda x: 5 * x, model.init(jax.random.key(0)))
    path = write_rankings(model, params, examples, out=tmp_path / "lists", history_length=limit, k=K, batch_size=16)
    found, source = read_rankings(path, examples), examples.source("train")
    apply = jax.jit(lambda batch: model.apply(params, batch, train=False, key=None))
    assert (found.rows[:, 0] > 0).sum() == (source.lengths - 1).clip(0).sum()
    for number in (0, 3, 7):
        items = source[number]["items"]
        for p in range(1, min(len(items), limit + 1)):
            ids = np.zeros((1, limit), np.int32)
            ids[0, :p] = items[:p]
            real = jnp.asarray(ids != 0)
            places = jnp.where(real, jnp.arange(limit)[None], 0)
            out = apply({"history_ids": jnp.asarray(ids), "positions": places, "segment_ids": real.astype(jnp.int32)})
            scores = np.array(out["table"] @ out["hidden"][0, p - 1])
            scores[:FIRST_ITEM] = scores[FIRST_ITEM + num_items :] = scores[items[:p]] = -np.inf
            best = np.argsort(-scores)[:K]
            at = found.first[number] + p
            np.testing.assert_allclose(scores[found.rows[at]], scores[best], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.distance[at], scores[best[0]] - scores[best], rtol=1e-3, atol=1e-4)
