"""Recall and average precision where a user has several relevant items.

For the best k rows of a user and a set R of relevant items:
    recall@k = |R among the best k| / |R|
    AP@k = sum over ranks r <= k that hold a relevant item of (relevant items up to r) / r, over min(|R|, k)
and mAP is the mean of AP over users.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def recall_and_map(
    rows: Int[np.ndarray, "n k"], relevant: Sequence[np.ndarray]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """recall@k and AP@k of every user; `rows` best first, 0 for none, no row twice; no set is empty."""
    k = rows.shape[1]
    sizes = np.array([len(items) for items in relevant])
    top = int(max(rows.max(initial=0), max((int(items.max()) for items in relevant), default=0))) + 1
    wanted = np.concatenate([np.zeros(0, np.int64), *(u * top + np.sort(r) for u, r in enumerate(relevant))])
    keys = np.arange(len(rows))[:, None] * top + rows
    at = np.minimum(np.searchsorted(wanted, keys), max(len(wanted) - 1, 0))
    hit = (wanted[at] == keys) & (rows > 0) if len(wanted) else np.zeros(rows.shape, bool)
    precision = np.cumsum(hit, axis=1) / np.arange(1, k + 1)[None, :]
    return hit.sum(axis=1) / sizes, (precision * hit).sum(axis=1) / np.minimum(sizes, k)
