"""Calibration of groups whose labels are known as totals alone: one number added to all logits of a group.

The same number says where data have shifted: what the logits of a domain, or of a later period, would have to be moved
by for the predictions to add up to what happened there.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from recjax.metrics.binary import sigmoid

_ROUNDS, _TOLERANCE = 60, 1e-12


def group_shifts(
    logits: Float[np.ndarray, " n"],
    group: Int[np.ndarray, " n"],
    totals: Float[np.ndarray, " g"],
    weight: Float[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, " g"]:
    """For each group the s with sum of weight * sigmoid(logit + s) over its rows = its total; float64.

    By Newton's method kept within bisection's bounds, all groups at once. A total of 0 or less gives -inf, one of the
    whole weight or more inf, and a group without rows 0.
    """
    logits = np.asarray(logits, np.float64)
    weight = np.ones(len(logits)) if weight is None else np.asarray(weight, np.float64)
    totals, count = np.asarray(totals, np.float64), len(totals)
    most = np.bincount(group, weight, minlength=count)
    reach = 1 + np.abs(logits).max(initial=0) + np.log(max(most.max(initial=1), 1) / _smallest(totals, most))
    low, high = np.full(count, -reach), np.full(count, reach)
    middle = np.zeros(count)
    for _ in range(_ROUNDS):
        p = sigmoid(logits + middle[group])
        said, slope = (np.bincount(group, weight * x, minlength=count) for x in (p, p * (1 - p)))
        low, high = np.where(said < totals, middle, low), np.where(said < totals, high, middle)
        with np.errstate(divide="ignore", invalid="ignore"):
            newton = middle + (totals - said) / slope
        before, middle = middle, np.where((newton > low) & (newton < high), newton, (low + high) / 2)
        if (np.abs(middle - before) <= _TOLERANCE * (1 + np.abs(middle)))[(totals > 0) & (totals < most)].all():
            break
    shift = np.where(totals <= 0, -np.inf, np.where(totals >= most, np.inf, middle))
    return np.where(most > 0, shift, 0)


def shift_by_user(
    logits: Float[np.ndarray, " n"], label: Float[np.ndarray, " n"], user: Int[np.ndarray, " n"], users: int
) -> Float[np.ndarray, " u"]:
    """The shift of all rows with the labels [0, 1] in total, linearised in the users 0 to `users` - 1 as in
    `metrics.auc`: its mean is the shift. NaN where all labels are 0, or all 1.

    A user moves the root of sum sigmoid(z + s) - y by what these leave of its rows, over the slope.
    """
    [shift] = group_shifts(logits, np.zeros(len(logits), np.int64), np.asarray([label.sum()]))
    if not np.isfinite(shift) or not len(logits):
        return np.full(users, np.nan)
    p = sigmoid(np.asarray(logits, np.float64) + shift)
    left = np.bincount(user, label - p, minlength=users)
    return shift + users * left / (p * (1 - p)).sum()


def _smallest(totals: np.ndarray, most: np.ndarray) -> float:
    """How near a total that can be reached is to nothing or to all."""
    near = np.minimum(totals, most - totals)
    return float(near[near > 0].min(initial=1.0))
