"""Vectors of items: of titles, of files, of artifacts; each for the right row, and none for rows without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.artifact import write_artifact
from recjax.core.errors import ArtifactError, DataError
from recjax.data.examples import Examples
from recjax.data.features import ItemVectors, TitleVectors, standardised, tf_idf, title_vectors
from recjax.data.vocab import FIRST_ITEM
from recjax.tasks.cache import place_of

TITLES = ["red nail polish", "blue nail polish", "red shoes", "wooden chair", "wooden table", "blue shoes"]


@pytest.fixture(scope="module")
def examples(tiny_recipe: Any) -> Examples:
    return Examples.open(place_of(tiny_recipe.mixture.tasks[0]).path)


def test_tf_idf_equals_its_formula() -> None:
    got = tf_idf(["aa", "ab"], (1, 1), 1).toarray()
    # n-grams " ", "a", "b": counts [2, 2, 0] and [2, 1, 1]
    idf = 1 + np.log(3 / (1 + np.asarray([2, 2, 1])))
    want = np.asarray([[1 + np.log(2), 1 + np.log(2), 0], [1 + np.log(2), 1, 1]]) * idf
    np.testing.assert_allclose(got, want / np.linalg.norm(want, axis=1, keepdims=True), rtol=1e-12)


def test_title_vectors_keep_inner_products_and_put_like_beside_like() -> None:
    full = tf_idf(TITLES, (3, 5), 1).toarray()
    got = title_vectors(TITLES, 5, (3, 5), 1)
    u, s, v = np.linalg.svd(full)
    np.testing.assert_allclose(got @ got.T, (u[:, :5] * s[:5] ** 2) @ u[:, :5].T, atol=1e-5)
    near = got @ got.T
    assert near[0, 1] > near[0, 3] and near[3, 4] > near[3, 0]
    np.testing.assert_array_equal(got, title_vectors(TITLES, 5, (3, 5), 1))
    assert not title_vectors(TITLES, 9, (3, 5), 1)[:, 6:].any()


def test_standardised_columns() -> None:
    got = standardised(np.random.default_rng(0).normal(3, 5, (50, 4)) * np.asarray([1, 2, 3, 0]))
    np.testing.assert_allclose(got.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(got.std(0), [1, 1, 1, 0], atol=1e-5)


def test_titles_of_a_catalogue(examples: Examples) -> None:
    got = TitleVectors(width=6)([examples])["item/vectors"]
    assert got.shape == (examples.vocab.num_rows, 6) and got.dtype == np.float32
    titles = examples.titles()
    have = np.asarray([bool(title) and row >= FIRST_ITEM for row, title in enumerate(titles)])
    assert have.any() and not got[~have].any() and got[have].any(1).all()
    plain = TitleVectors(width=6, standardise=False)([examples])["item/vectors"]
    np.testing.assert_allclose(standardised(plain[have]), got[have], atol=1e-5)
    assert (np.diff((plain**2).sum(0)) <= 0).all()  # largest singular value first


def test_vectors_of_a_file_and_of_an_artifact_reach_their_rows(examples: Examples, tmp_path: Path) -> None:
    rows = np.arange(FIRST_ITEM, FIRST_ITEM + 9, dtype=np.int32)[::-1]
    vectors = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    np.save(tmp_path / "text.npy", np.concatenate([vectors, vectors[:1]]))
    ids = [str(i) for i in examples.vocab.decode(rows)]
    pl.DataFrame({"item_id": [*ids, "nobody"]}).write_parquet(tmp_path / "text_ids.parquet")
    write_artifact(
        tmp_path / "made", {"rows": rows, "vectors": vectors}, kind="item_vectors", vocabulary_hash=examples.vocab.hash
    )
    for path in ("text.npy", "made"):
        got = ItemVectors(path=str(tmp_path / path), standardise=False)([examples])["item/vectors"]
        np.testing.assert_array_equal(got[rows], vectors)
        assert np.count_nonzero(got.any(1)) == 9
    write_artifact(tmp_path / "other", {"rows": rows, "vectors": vectors}, kind="item_vectors", vocabulary_hash="x")
    with pytest.raises(ArtifactError, match="vocabulary_hash"):
        ItemVectors(path=str(tmp_path / "other"))([examples])
    with pytest.raises(DataError, match="cannot read content vectors"):
        ItemVectors(path=str(tmp_path / "missing.npy"))([examples])
