"""Metrics of predicted numbers of 0 or more, such as the value of what a user goes on to do.

    rmse        root of the mean squared error of log(1 + value)
    deviance    mean Poisson deviance, 2 (y log(y / m) - (y - m))

Both are linearised in the users, as `recjax.metrics.auc` does.
"""

import numpy as np
from jaxtyping import Float, Int

from recjax.metrics.auc import ratio_by_user

_LEAST = 1e-6  # a prediction of nothing at all would make any value infinitely unlikely


def predicted_values(output: Float[np.ndarray, " n"], form: str) -> Float[np.ndarray, " n"]:
    """The value that an output stands for: its exponential less one ("log1p"), at least 0, or a rate ("poisson")."""
    return np.exp(output) if form == "poisson" else np.maximum(np.expm1(output), 0)


def rmse_by_user(
    predicted: Float[np.ndarray, " n"], value: Float[np.ndarray, " n"], user: Int[np.ndarray, " n"], users: int
) -> Float[np.ndarray, " u"]:
    """NaN without rows."""
    error = np.square(np.log1p(predicted) - np.log1p(value))
    square = _mean_by_user(error, user, users)
    root = np.sqrt(np.maximum(square.mean(), 0))
    return root + (square - square.mean()) / (2 * root) if root > 0 else np.full(users, root)


def deviance_by_user(
    predicted: Float[np.ndarray, " n"], value: Float[np.ndarray, " n"], user: Int[np.ndarray, " n"], users: int
) -> Float[np.ndarray, " u"]:
    """NaN without rows."""
    mean = np.maximum(predicted, _LEAST)
    told = np.where(value > 0, value, 1)
    deviance = 2 * (value * (np.log(told) - np.log(mean)) - (value - mean))
    return _mean_by_user(deviance, user, users)


def _mean_by_user(x: np.ndarray, user: np.ndarray, users: int) -> np.ndarray:
    """The mean over rows; without any, `bincount` would give whole numbers."""
    total, many = (np.bincount(user, w, minlength=users).astype(np.float64) for w in (x, np.ones(len(x))))
    return ratio_by_user(total, many)
