"""Whether probabilities mean what they say, and one temperature and bias that make them.

A model's label logits z become softmax(z / T + b). T and b are fitted by maximum likelihood on held-out answers that
nothing is reported on (Guo et al. 2017; with the biases, for two labels, Platt 1999). The order of candidates by a
binary answer does not change. With two labels the fit is a logistic regression on z_1 - z_0.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from recjax.metrics.auc import ties

BINS = 15
_STEPS, _TOLERANCE = 100, 1e-10
# Keeps the fit finite where the answers can be told apart without error; of the order of one answer in a million.
_RIDGE = 1e-6
_LEAST_SLOPE = 1e-3


class Calibration(NamedTuple):
    """softmax(logits / `temperature` + `bias`); the bias of the first label is 0."""

    temperature: float
    bias: tuple[float, ...]

    def __call__(self, logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
        """Calibrated logits, float64."""
        return logits.astype(np.float64) / self.temperature + np.array(self.bias)

    def told(self) -> dict[str, Any]:
        """For manifests and metrics.json."""
        return {"temperature": self.temperature, "bias": list(self.bias)}


def fit_calibration(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> Calibration:
    """The maximum of the likelihood, found by Newton's method; the slope 1 / T is at least 1e-3.

    Raises `ValueError` without any answer.
    """
    if not len(logits):
        raise ValueError("nothing to fit a calibration on")
    z = logits.astype(np.float64)
    z = z - z.mean(axis=1, keepdims=True)
    theta = _newton(z, labels, fixed_slope=None)
    if theta[0] < _LEAST_SLOPE:
        theta = _newton(z, labels, fixed_slope=_LEAST_SLOPE)
    return Calibration(float(1 / theta[0]), (0.0, *theta[1:].tolist()))


def probabilities(logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """Softmax in float64."""
    exps = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


def calibration_error(
    probability: Float[np.ndarray, " n"], happened: Bool[np.ndarray, " n"], *, bins: int = BINS
) -> float:
    """Mean distance between what was said and what happened, over `bins` of equally many answers.

    Answers of one probability stay together, so a bin may be larger than others. NaN without answers.
    """
    if not len(probability):
        return float("nan")
    place = deciles(probability, bins=bins)
    said, did = (np.bincount(place, x, minlength=bins) for x in (probability, happened.astype(np.float64)))
    return float(np.abs(said - did).sum() / len(probability))


def deciles(probability: Float[np.ndarray, " n"], bins: int = 10) -> Int[np.ndarray, " n"]:
    """Which of `bins` equally large parts, from the least probable on, each row is in; equals stay together."""
    order = np.argsort(probability)
    tie, start = ties(probability[order])
    place = np.empty(len(order), np.int64)
    place[order] = start[tie] * bins // max(len(order), 1)
    return place


def _newton(z: np.ndarray, labels: np.ndarray, fixed_slope: float | None) -> np.ndarray:
    """(slope, biases of all labels but the first) of the least mean log loss; the loss is convex in them."""
    count, classes = z.shape
    features = np.zeros((count, classes, classes))  # of the logit of each label: z, then one for each bias
    features[:, :, 0] = z
    features[:, np.arange(1, classes), np.arange(1, classes)] = 1
    happened = np.eye(classes)[labels]
    start = np.zeros(classes)
    start[0] = 1.0 if fixed_slope is None else fixed_slope
    free = slice(0 if fixed_slope is None else 1, classes)

    def loss(theta: np.ndarray) -> float:
        logits = features @ theta
        top = logits.max(axis=1)
        partition = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        return float((partition - (logits * happened).sum(axis=1)).mean() + _RIDGE / 2 * ((theta - start) ** 2).sum())

    theta, now = start, loss(start)
    for _ in range(_STEPS):
        p = probabilities(features @ theta)
        gradient = np.einsum("nc,ncd->d", p - happened, features) / count + _RIDGE * (theta - start)
        mean = np.einsum("nc,ncd->nd", p, features)
        curvature = np.einsum("nc,ncd,nce->de", p, features, features, optimize=True) - mean.T @ mean
        step = np.zeros(classes)
        step[free] = np.linalg.solve(
            curvature[free, free] / count + _RIDGE * np.eye(classes)[free, free], gradient[free]
        )
        size = 1.0
        while size > 1e-8 and loss(theta - size * step) > now:
            size /= 2
        theta = theta - size * step
        before, now = now, loss(theta)
        if abs(before - now) < _TOLERANCE:
            break
    return theta
