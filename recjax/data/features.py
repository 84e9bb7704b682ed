"""What is known of items besides who had them: vectors of a file, of a teacher or of their titles, or the titles.

Every provider here is a fact of a recipe (`recipe.Recipe.facts`): it gives `item/vectors` float32 [v, c] or
`item/text` int32 [v, t] for the rows of a vocabulary, zero for rows that are no items or have none. Vectors are
standardised, unless asked not to be, so that each of the c columns has mean 0 and variance 1 over the items that have
one. Nothing here is trained.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from recjax.core.artifact import read_artifact
from recjax.core.errors import DataError, ExamplesError
from recjax.data.examples import Examples
from recjax.data.vocab import FIRST_ITEM

_OVERSAMPLING = 32
_POWERS = 3


@dataclass(frozen=True, kw_only=True)
class ItemVectors:
    """Vectors of an artifact of kind `item_vectors`, as `recjax infer` writes it, or of a file.

    `path` is the artifact, or a file `<name>.npy` [n, c] beside `<name>_ids.parquet` with the column item_id (as in
    the `vectors` folder of a data directory). With `stage`, `path` is the folder of all stages of a system and the
    artifact is that of this stage. `standardise` False takes them as they are.
    """

    path: str
    stage: str = ""
    standardise: bool = True

    def __call__(self, examples: Sequence[Examples]) -> dict[str, np.ndarray]:
        """Raises `ArtifactError` or `DataError` for what cannot be read or is of another catalogue."""
        vocab = examples[0].vocab
        path = Path(self.path, self.stage, "artifacts", "item_vectors") if self.stage else Path(self.path)
        if path.suffix == ".npy":
            rows, vectors = _of_file(path, examples[0])
        else:
            artifact = read_artifact(path, kind="item_vectors", vocabulary_hash=vocab.hash)
            rows, vectors = np.asarray(artifact["rows"]), np.asarray(artifact["vectors"], np.float32)
        out = np.zeros((vocab.num_rows, vectors.shape[1]), np.float32)
        out[rows] = standardised(vectors) if self.standardise else vectors
        return {"item/vectors": out}


@dataclass(frozen=True, kw_only=True)
class TitleVectors:
    """Titles as TF-IDF of character n-grams, brought down to `width` dimensions by a singular value decomposition.

    `ngrams` is the shortest and the longest n-gram of the lower-cased title with a space on either side; those of
    fewer than `min_items` titles are left out. Term frequencies are 1 + log(count), each title has length 1.
    `standardise` False leaves the columns as large as their singular values make them.
    """

    width: int = 256
    ngrams: tuple[int, int] = (3, 5)
    min_items: int = 2
    standardise: bool = True

    def __call__(self, examples: Sequence[Examples]) -> dict[str, np.ndarray]:
        """Raises `ExamplesError` when there are no titles."""
        one = examples[0]
        return {"item/vectors": _of_titles(_Same(one), self).copy()}


@dataclass(frozen=True, kw_only=True)
class TitleTokens:
    """The first `length` tokens of every title, as rows of the table of a model that reads items and words.

    They are the words of the task with a text vocabulary, whose rows follow those of the items (`tokens.AtomicIds`).
    """

    length: int = 16

    def __call__(self, examples: Sequence[Examples]) -> dict[str, np.ndarray]:
        """Raises `ExamplesError` when there is no text vocabulary, or no item has a title."""
        one = next((e for e in examples if e.text_vocab is not None), None)
        if one is None or one.text_vocab is None:
            raise ExamplesError(
                "no task of the mixture has a text vocabulary",
                where=", ".join(str(e.path) for e in examples),
                expected="a task with texts, such as search",
            )
        rows = one.vocab.num_rows
        out = np.zeros((rows, self.length), np.int32)
        for row, title in enumerate(one.titles()):
            ids = one.text_vocab.encode(title)[: self.length] if title and row >= FIRST_ITEM else []
            out[row, : len(ids)] = np.asarray(ids, np.int32) + rows
        if not out.any():
            raise ExamplesError("the items have no titles", where=str(one.path), expected="a text column such as title")
        return {"item/text": out}


def title_vectors(titles: Sequence[str], width: int, ngrams: tuple[int, int], min_items: int) -> np.ndarray:
    """float32 [titles, width]: left singular vectors times singular values, largest first, zero past the rank.

    By random projection with power iterations (Halko et al. 2011), seeded. The sign of each column makes its largest
    entry positive.
    """
    matrix = tf_idf(titles, ngrams, min_items)
    out = np.zeros((len(titles), width), np.float32)
    shape: Any = matrix.shape
    size = min(width + _OVERSAMPLING, *shape)
    if size < 1:
        return out
    basis = np.linalg.qr(matrix @ np.random.default_rng(0).normal(size=(shape[1], size)))[0]
    for _ in range(_POWERS):
        basis = np.linalg.qr(matrix @ (matrix.T @ basis))[0]
    within = matrix.T @ basis
    squares, u = np.linalg.eigh(within.T @ within)
    k = min(width, size)
    u = (basis @ u[:, ::-1][:, :k]) * np.sqrt(np.maximum(squares[::-1][:k], 0))
    out[:, :k] = u * np.sign(u[np.abs(u).argmax(0), np.arange(k)])
    return out


@dataclass(frozen=True)
class _Same:
    """Examples that are equal when their content is."""

    one: Examples

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.one.hash == self.one.hash

    def __hash__(self) -> int:
        return hash(self.one.hash)


@functools.lru_cache(maxsize=2)
def _of_titles(examples: _Same, config: TitleVectors) -> np.ndarray:
    """What `TitleVectors` gives, once for a process: every stage of a run asks for it several times."""
    titles = examples.one.titles()
    rows = np.asarray([row for row, title in enumerate(titles) if title and row >= FIRST_ITEM], np.int64)
    if not len(rows):
        raise ExamplesError(
            "the items have no titles",
            where=str(examples.one.path),
            expected="a text column such as title in the table of items",
            mend="take content vectors instead: features.ItemVectors",
        )
    vectors = title_vectors([titles[row] or "" for row in rows], config.width, config.ngrams, config.min_items)
    out = np.zeros((len(titles), config.width), np.float32)
    out[rows] = standardised(vectors) if config.standardise else vectors
    return out


def tf_idf(titles: Sequence[str], ngrams: tuple[int, int], min_items: int) -> sparse.csr_matrix:
    """[titles, n-grams], rows of length 1; n-grams in alphabetical order."""
    counts = [_ngrams(title, ngrams) for title in titles]
    items = Counter(gram for count in counts for gram in count)
    column = {gram: i for i, gram in enumerate(sorted(g for g, n in items.items() if n >= min_items))}
    row, col, value = [], [], []
    for i, count in enumerate(counts):
        for gram, n in count.items():
            if gram in column:
                row.append(i)
                col.append(column[gram])
                value.append((1 + np.log(n)) * (1 + np.log((1 + len(titles)) / (1 + items[gram]))))
    matrix = sparse.csr_matrix((np.asarray(value, np.float64), (row, col)), shape=(len(titles), len(column)))
    norm = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    return sparse.csr_matrix(sparse.diags(1 / np.maximum(norm, 1e-12)) @ matrix)


def standardised(vectors: np.ndarray) -> np.ndarray:
    """Each column with mean 0 and variance 1; a constant column becomes 0."""
    centred = vectors - vectors.mean(axis=0)
    deviation = centred.std(axis=0)
    return np.where(deviation > 1e-6, centred / np.maximum(deviation, 1e-6), 0).astype(np.float32)


def _ngrams(title: str, ngrams: tuple[int, int]) -> Counter[str]:
    text = " " + " ".join(title.lower().split()) + " "
    return Counter(text[i : i + n] for n in range(ngrams[0], ngrams[1] + 1) for i in range(len(text) - n + 1))


def _of_file(path: str | os.PathLike[str], examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    import polars as pl

    path = Path(path)
    ids_path = path.with_name(f"{path.stem}_ids.parquet")
    try:
        vectors = np.load(path, allow_pickle=False)
        ids = pl.read_parquet(ids_path).get_column("item_id").to_list()
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"cannot read content vectors: {error}", where=str(path), expected=f"numbers [n, c] beside {ids_path.name}"
        ) from error
    if vectors.ndim != 2 or len(vectors) != len(ids):
        raise DataError(f"vectors of shape {list(vectors.shape)} for {len(ids):,} ids", where=str(path))
    rows = examples.vocab.encode(ids)
    known = rows >= FIRST_ITEM
    return rows[known], vectors[known].astype(np.float32)
