"""What label logits are judged by: metrics of the answers, each as one value for every user.

The label 1 of two is the one that is ranked by, with the difference of the logits; of several labels each is told from
all others, and the metrics averaged over those that occur. What the values of users are is in `recjax.metrics.auc`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from recjax.metrics.auc import auc_by_user, grouped_auc_by_user, log_losses, ratio_by_user
from recjax.metrics.calibration import calibration_error, probabilities
from recjax.results import System
from recjax.slices import Group

METRICS = ("auc", "grouped_auc", "log_loss", "accuracy", "calibration_error")


def judged(
    logits: np.ndarray,
    label: np.ndarray,
    user: np.ndarray,
    *,
    settings: Mapping[str, float] | None = None,
    seconds: float = 0.0,
) -> System:
    """A system that gave label logits [n, c] to candidates with these labels [n], asked about users `user` [n].

    Users come in order of their number. A metric that the answers do not allow (they are all alike) is NaN.
    """
    users, which = np.unique(user, return_inverse=True)
    by_user = answers_by_user(logits, label, which, len(users))
    values = {name: float(column.mean()) for name, column in by_user.items()}
    values["calibration_error"] = error_of(logits, label)
    return System(
        rank=np.zeros(len(users), np.int32),
        by_user=by_user,
        values=values,
        settings=settings or {},
        seconds=seconds,
    )


def answers_by_user(logits: np.ndarray, label: np.ndarray, user: np.ndarray, users: int) -> dict[str, np.ndarray]:
    """Metrics linearised in the users 0 to `users` - 1, each [users]."""
    many = np.bincount(user, minlength=users).astype(np.float64)
    right = logits.argmax(axis=1) == label
    ranked = {"auc": auc_by_user, "grouped_auc": grouped_auc_by_user}
    out = {}
    for name, metric in ranked.items():
        each = [metric(score, label == c, user, users) for c, score in _told_apart(logits).items()]
        there = [values for values in each if np.isfinite(values).all()]
        out[name] = np.mean(there, axis=0) if there else np.full(users, np.nan)
    out["log_loss"] = ratio_by_user(np.bincount(user, log_losses(logits, label), minlength=users), many)
    out["accuracy"] = ratio_by_user(np.bincount(user, right, minlength=users), many)
    return out


def error_of(logits: np.ndarray, label: np.ndarray) -> float:
    """The calibration error of label 1 of two; of several, the mean over the labels."""
    p = probabilities(logits)
    return float(np.mean([calibration_error(p[:, c], label == c) for c in _told_apart(logits)]))


def history_groups(
    systems: Mapping[str, np.ndarray],
    label: np.ndarray,
    user: np.ndarray,
    events: np.ndarray,
    bounds: Sequence[int],
) -> dict[str, Group]:
    """The answers by how many events the user had when asked [n]: a group for each range up to one of `bounds`.

    `systems` are label logits by name. A group's metrics are those of its answers alone.
    """
    bucket = np.searchsorted(np.asarray(bounds), events, side="left")
    groups = {}
    for number, name in enumerate(bucket_names(bounds)):
        mine = bucket == number
        if mine.any():
            users, which = np.unique(user[mine], return_inverse=True)
            values = {
                system: answers_by_user(logits[mine], label[mine], which, len(users))
                for system, logits in systems.items()
            }
            whole = {s: {"calibration_error": error_of(logits[mine], label[mine])} for s, logits in systems.items()}
            groups[name] = Group(user_index=users, values=values, whole=whole)
    return groups


def bucket_names(bounds: Sequence[int]) -> list[str]:
    """Such as "0 to 5 events", "6 to 20 events", "above 20 events"."""
    lows = [0, *(bound + 1 for bound in bounds)]
    return [f"{low} to {high} events" for low, high in zip(lows, bounds, strict=False)] + [f"above {bounds[-1]} events"]


def _told_apart(logits: np.ndarray) -> dict[int, np.ndarray]:
    """The labels to tell from the others, and a score for each."""
    if logits.shape[1] == 2:
        return {1: logits[:, 1].astype(np.float64) - logits[:, 0]}
    return dict(enumerate(probabilities(logits).T))
