"""Content codes that no two items share, by moving items that collide to other codes of the last level.

The alternative to a level that numbers collisions: a code less for every item, and still one that says something.
Published systems balance the last level by Sinkhorn iterations and try again while items collide (LC-Rec, arXiv
2311.09049); among items that share all codes but the last this is an assignment problem, which is solved exactly.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from recjax.core.errors import DataError


def spread(content: np.ndarray, left: np.ndarray, book: np.ndarray, *, fixed: np.ndarray | None = None) -> np.ndarray:
    """int32 [n, levels]: `content` with other last codes where items share all of theirs.

    `left` [n, d] is what the levels before the last left of each item, `book` [size, d] that of the last level. Items
    that share all codes but the last, if two of them share that too, get codes of their own such that the sum of the
    squared distances between `left` and `book` is the least; items that are `fixed` (bool [n]) keep theirs. Everybody
    else is left alone. Raises `DataError` when more items share a prefix than the last level has codes.
    """
    content = content.astype(np.int32)
    fixed = np.zeros(len(content), bool) if fixed is None else fixed
    prefix = np.unique(content[:, :-1], axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(prefix, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(prefix[order])) + 1):
        last = content[members, -1]
        if len(np.unique(last)) == len(last):
            continue
        if len(members) > len(book):
            raise DataError(
                f"{len(members):,} items share the codes {content[members[0], :-1].tolist()}",
                expected=f"at most {len(book)}, the codes of the last level",
                mend="take more levels or larger codebooks, or a level that numbers them (collisions above 0)",
            )
        free = np.setdiff1d(np.arange(len(book)), last[fixed[members]])
        moving = members[~fixed[members]]
        squares = ((left[moving, None].astype(np.float64) - book[None, free]) ** 2).sum(-1)
        rows, codes = linear_sum_assignment(squares)
        content[moving[rows], -1] = free[codes]
    return content
