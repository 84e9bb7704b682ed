"""Metrics of yes-or-no predictions by their logits, for click-through rates: how much is known, and is it believed.

    log loss             nats, of labels from 0 to 1
    normalised entropy   the log loss as a share of that of a constant, the rate of the rows (He et al. 2014, section 3)
    calibration          predicted over observed positives; 1 is right, above 1 says too much
    weighted auc         the auc of each domain, averaged by its rows (WAUC of MLoRA, Yang et al. 2024)

`..._by_user` give a metric linearised in the users, as `recjax.metrics.auc` does.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit

from recjax.metrics.auc import auc_by_user, ratio_by_user


def binary_log_losses(logit: Float[np.ndarray, " n"], label: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """-y log p - (1 - y) log(1 - p) of each row, in float64."""
    z = logit.astype(np.float64)
    return np.logaddexp(0.0, z) - label * z


def sigmoid(logit: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Probabilities, in float64."""
    return expit(logit.astype(np.float64))


def corrected(logit: Float[np.ndarray, " n"], keep: float) -> Float[np.ndarray, " n"]:
    """Logits of a model trained on a share `keep` of the negatives, for all of them.

    p becomes p / (p + (1 - p) / keep) (He et al. 2014, section 6.3), which adds log(keep) to the logit.
    """
    return logit.astype(np.float64) + np.log(keep)


def normalised_entropy_by_user(
    loss: Float[np.ndarray, " n"], label: Float[np.ndarray, " n"], user: Int[np.ndarray, " n"], users: int
) -> Float[np.ndarray, " u"]:
    """Log loss over the entropy of the mean label, linearised in both; NaN where all labels are alike."""
    many = np.bincount(user, minlength=users).astype(np.float64)
    rate_by_user = ratio_by_user(np.bincount(user, label, minlength=users), many)
    rate = rate_by_user.mean()
    if not 0 < rate < 1:
        return np.full(users, np.nan)
    entropy = -rate * np.log(rate) - (1 - rate) * np.log1p(-rate)
    slope = np.log1p(-rate) - np.log(rate)
    loss_by_user = ratio_by_user(np.bincount(user, loss, minlength=users), many)
    return (loss_by_user - loss_by_user.mean() * slope * (rate_by_user - rate) / entropy) / entropy


def calibration_by_user(
    probability: Float[np.ndarray, " n"], label: Float[np.ndarray, " n"], user: Int[np.ndarray, " n"], users: int
) -> Float[np.ndarray, " u"]:
    """Predicted over observed positives, linearised; NaN without a positive."""
    said, happened = (np.bincount(user, x, minlength=users).astype(np.float64) for x in (probability, label))
    return ratio_by_user(said, happened)


def domain_auc_by_user(
    scores: Float[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    user: Int[np.ndarray, " n"],
    users: int,
    domain: Int[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, " u"], Float[np.ndarray, " u"]]:
    """The auc of each domain, averaged by its rows and plainly, both linearised.

    Domains of one kind of label alone have no auc and are left out of both.
    """
    found, rows = [], []
    for number in np.unique(domain):
        mine = domain == number
        values = auc_by_user(scores[mine], positive[mine], user[mine], users)
        if np.isfinite(values).all():
            found.append(values)
            rows.append(mine.sum())
    if not found:
        return np.full(users, np.nan), np.full(users, np.nan)
    return np.average(found, axis=0, weights=rows), np.mean(found, axis=0)
