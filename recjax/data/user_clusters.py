"""Groups of users by what they had: a coarse person, for rankers that may know no more of one.

Users as rows of the matrix of users and items, each of length one and items weighed down by how common they are, are
reduced to a few directions (truncated SVD) and grouped by k-means. Who had nothing is in no group.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 25


def user_clusters(
    user: np.ndarray, item: np.ndarray, *, users: int, items: int, clusters: int, width: int = 16, seed: int = 0
) -> np.ndarray:
    """int64 [users]: the group of each user, from 0 to at most `clusters` - 1, -1 without an event.

    `user` and `item` number the user and the item of each event.
    """
    from scipy import sparse

    found = np.full(users, -1)
    active = np.unique(user)
    if not len(active):
        return found
    matrix = sparse.csr_matrix((np.ones(len(user)), (user, item)), shape=(users, items))
    matrix.data[:] = 1.0
    common = np.asarray(matrix.sum(axis=0)).ravel()
    matrix = sparse.csr_matrix(matrix[active] @ sparse.diags(np.log1p(len(active) / np.maximum(common, 1))))
    vectors = _reduced(matrix, min(width, len(active) - 1, items - 1), seed)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found[active] = _means(vectors, min(clusters, len(active)), np.random.default_rng(seed))
    return found


def _reduced(matrix, width: int, seed: int) -> np.ndarray:
    """float64 [rows, width]: the rows in the directions of the largest singular values."""
    from scipy.sparse.linalg import svds

    if width < 1:
        return np.asarray(matrix.todense())
    start = np.random.default_rng(seed).standard_normal(min(matrix.shape))
    left, values, _ = svds(matrix, k=width, v0=start)
    return left * values


def _means(vectors: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [n]: the nearest of so many means (Lloyd), which start as rows far from each other (k-means++)."""
    means = vectors[[int(rng.integers(len(vectors)))]]
    nearest = ((vectors - means[0]) ** 2).sum(1)
    for _ in range(1, clusters):
        reach = np.cumsum(nearest)
        place = min(int(np.searchsorted(reach, rng.random() * reach[-1], side="right")), len(vectors) - 1)
        means = np.concatenate([means, vectors[[place]]])
        nearest = np.minimum(nearest, ((vectors - means[-1]) ** 2).sum(1))
    group = np.zeros(len(vectors), np.int64)
    for _ in range(_ROUNDS):
        now = (vectors @ means.T - (means**2).sum(1) / 2).argmax(1)
        if (now == group).all():
            break
        group = now
        sums = np.zeros_like(means)
        np.add.at(sums, group, vectors)
        count = np.bincount(group, minlength=clusters)
        means = np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], means)
    return group
