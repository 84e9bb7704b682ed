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
from jaxtyping import Bool, Float, Int, Shaped


def auc(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """NaN where one kind is missing."""
    above, _ = _placements(scores, positive)
    return float(above.mean()) if len(above) and not positive.all() else float("nan")


def auc_by_user(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], user: Int[np.ndarray, " n"], users: int
) -> Float[np.ndarray, " u"]:
    """`auc`, linearised in the users 0 to `users` - 1; NaN where one kind is missing."""
    above, below = _placements(scores, positive)
    if not len(above) or not len(below):
        return np.full(users, np.nan)
    whole = above.mean()
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
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], user: Int[np.ndarray, " n"], users: int
) -> Float[np.ndarray, " u"]:
    """`grouped_auc`, linearised; a user with one kind alone changes nothing and stands at the metric itself."""
    return grouped_aucs_by_user(scores, positive, user, users)[0]


def grouped_aucs_by_user(
    scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], user: Int[np.ndarray, " n"], users: int
) -> tuple[Float[np.ndarray, " u"], Float[np.ndarray, " u"]]:
    """`grouped_auc` and the gauc, both linearised as `grouped_auc_by_user` is."""
    order = np.lexsort((scores, user))
    who, held = user[order], positive[order]
    tie, start = ties(who, scores[order])
    rank = ((start + np.append(start[1:], len(order)) + 1) / 2)[tie]  # of the middle of equals, from 1 on
    rows, positives = np.bincount(user, minlength=users), np.bincount(who, held, minlength=users)
    rank -= (np.cumsum(rows) - rows)[who]  # within each user
    negatives = rows - positives
    wins = np.bincount(who, rank * held, minlength=users) - positives * (positives + 1) / 2
    both = (positives > 0) & (negatives > 0)
    each = wins / np.maximum(positives * negatives, 1)
    weights = both.astype(np.float64), both * rows.astype(np.float64)
    plain, by_rows = (ratio_by_user(weight * each, weight) for weight in weights)
    return plain, by_rows


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
    """For each positive the share of negatives below it, for each negative the share of positives above it; equals
    count half."""
    order = np.argsort(scores)
    tie, start = ties(scores[order])
    held = np.concatenate([[0], np.cumsum(positive[order])])[np.append(start, len(order))]
    positives = (held[:-1] + held[1:]) / 2  # below the middle of each run of equals
    negatives = (start + np.append(start[1:], len(order))) / 2 - positives
    place = np.empty(len(order), np.int64)
    place[order] = tie
    many = int(positive.sum())
    above = negatives[place[positive]] / max(len(order) - many, 1)
    return above, 1.0 - positives[place[~positive]] / max(many, 1)


def ties(*ordered: Shaped[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " r"]]:
    """Of rows in order of some columns: which run of equal rows each is in, from 0 on, and where each run starts."""
    differs = [column[1:] != column[:-1] for column in ordered]
    first = np.concatenate([[True], np.logical_or.reduce(differs)])[: len(ordered[0])]
    return np.cumsum(first) - 1, np.flatnonzero(first)
