"""How well scores tell positives from negatives, overall and within each user, and the log loss of probabilities.

    auc          the chance that a positive scores above a negative, ties counted half, over all pairs
    grouped auc  the same over the pairs of one user, averaged over the users who have both kinds
    gauc         the same, every user weighted with its rows (impressions; DIN, arXiv 1706.06978, section 6.2)
    log loss     nats: minus the log of the probability of what happened

None of these is a mean over users, yet it is users that intervals are drawn over. `..._by_user` therefore give the
metric linearised in the users: one value for each, whose mean is the metric itself and whose spread says how the
metric moves when other users are drawn (the influence function; for the auc that is the variance of DeLong et al.
1988 for clusters, Obuchowski 1997). They go into means, paired differences and the bootstrap as any value of a user.
"""

import numpy as np
from jaxtyping import Bool, Float, Int


def auc(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """NaN where one kind is missing."""
    above, _ = _placements(scores, positive)
    return float(above.mean()) if len(above) and not positive.all() else float("nan")


def auc_by_user(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], user: Int[np.ndarray, " n"], users: int
) -> Float[np.ndarray, " u"]:
    """`auc`, linearised in the users 0 to `users` - 1; NaN where one kind is missing."""
    whole = auc(scores, positive)
    if np.isnan(whole):
        return np.full(users, np.nan)
    above, below = _placements(scores, positive)
    moved = np.full(users, whole)
    for values, who in ((above, user[positive]), (below, user[~positive])):
        moved += users * np.bincount(who, values - whole, minlength=users) / len(values)
    return moved


def grouped_auc(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], user: Int[np.ndarray, " n"], users: int
) -> float:
    """NaN where no user has both kinds."""
    mean = grouped_auc_by_user(scores, positive, user, users).mean()
    return float(mean)


def grouped_auc_by_user(
    scores: Float[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    user: Int[np.ndarray, " n"],
    users: int,
    *,
    by_rows: bool = False,
) -> Float[np.ndarray, " u"]:
    """`grouped_auc`, or with `by_rows` the gauc, linearised; a user with one kind alone changes nothing and stands at
    the metric itself."""
    order = np.lexsort((scores, user))
    who, score, held = user[order], scores[order], positive[order]
    same = np.concatenate([[False], (who[1:] == who[:-1]) & (score[1:] == score[:-1])])
    tie = np.cumsum(~same) - 1
    place = np.arange(1, len(order) + 1)
    rank = (np.bincount(tie, place) / np.bincount(tie))[tie] if len(order) else place.astype(float)
    rank = rank - np.searchsorted(who, who)  # from 1 on within each user
    positives = np.bincount(who, held, minlength=users)
    negatives = np.bincount(who, ~held, minlength=users)
    wins = np.bincount(who, rank * held, minlength=users) - positives * (positives + 1) / 2
    weight = ((positives > 0) & (negatives > 0)) * (positives + negatives if by_rows else 1.0)
    return ratio_by_user(weight * wins / np.maximum(positives * negatives, 1), weight)


def ratio_by_user(total: Float[np.ndarray, " u"], weight: Float[np.ndarray, " u"]) -> Float[np.ndarray, " u"]:
    """sum(total) / sum(weight), linearised: a mean over what users have different numbers of; NaN without weight."""
    if not weight.sum():
        return np.full(len(weight), np.nan)
    whole = total.sum() / weight.sum()
    return whole + (total - whole * weight) / weight.mean()


def log_losses(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """-log softmax(logits)[label] of each answer, in float64."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=1)
    partition = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return partition - np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]


def _placements(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, for each negative the share of positives above it."""
    held, others = np.sort(scores[positive]), np.sort(scores[~positive])
    above = _share_below(others, scores[positive])
    return above, 1.0 - _share_below(held, scores[~positive])


def _share_below(ordered: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The share of `ordered` that is less than each score, equals counted half."""
    less, upto = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    return (less + upto) / 2 / max(len(ordered), 1)
