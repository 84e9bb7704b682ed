"""What the logits of a ranker are judged by: a system for `results`, and its groups, head by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from recjax.metrics.auc import auc_by_user, grouped_aucs_by_user, ratio_by_user
from recjax.metrics.binary import (
    binary_log_losses,
    calibration_by_user,
    domain_auc_by_user,
    normalised_entropy_by_user,
    sigmoid,
)
from recjax.metrics.calibration import calibration_error, deciles
from recjax.metrics.group_shift import shift_by_user
from recjax.metrics.requests import request_metrics_by_user
from recjax.metrics.values import deviance_by_user, predicted_values, rmse_by_user
from recjax.results import System
from recjax.slices import Group, Task

_CUTOFF = 10
OF_REQUESTS = (f"request_ndcg@{_CUTOFF}", f"request_recall@{_CUTOFF}", "request_mrr")
METRICS = (
    *("auc", "grouped_auc", "gauc", "log_loss", "normalised_entropy", "calibration", "calibration_error"),
    *("weighted_auc", "domain_auc", *OF_REQUESTS),
    *("nll", "recall@10"),
    *("rmse", "deviance"),
)
# What a model says of a row besides logits; its mean over the positives of the first head is a metric.
OF_ROW = "row/"
_SHOWN = ("auc", "log_loss", "calibration", "shift")


class Judged(NamedTuple):
    """Rows to be judged: labels [n, heads], -1 where unknown; the number of each row's user, 0 to `users` - 1; and the
    numbers of its domain and of its request, where rows have any. `values` are the heads whose labels are numbers, and
    what their outputs stand for (`metrics.values`)."""

    heads: tuple[str, ...]
    label: np.ndarray
    user: np.ndarray
    users: int
    domain: np.ndarray | None = None
    request: np.ndarray | None = None
    values: Mapping[str, str] = {}

    def take(self, rows: np.ndarray) -> tuple[Judged, np.ndarray]:
        """Some rows with their users numbered anew, and which users of these those are."""
        found, which = np.unique(self.user[rows], return_inverse=True)
        domain, request = (None if x is None else x[rows] for x in (self.domain, self.request))
        return Judged(self.heads, self.label[rows], which, len(found), domain, request, self.values), found


def judged(rows: Judged, logits: Mapping[str, np.ndarray], *, seconds: float = 0.0) -> System:
    """A system with logits [n] for each head. The metrics of the first head have plain names, those of all heads,
    where there are several, also `<head>/<metric>`."""
    by_user: dict[str, np.ndarray] = {}
    values: dict[str, float] = {}
    positive = rows.label[:, 0] >= 0.5
    many = np.bincount(rows.user[positive], minlength=rows.users).astype(np.float64)
    for name in (n for n in logits if n.startswith(OF_ROW)):
        sums = np.bincount(rows.user[positive], logits[name][positive], minlength=rows.users)
        by_user[name.removeprefix(OF_ROW)] = ratio_by_user(sums, many)
    values |= {name: float(column.mean()) for name, column in by_user.items()}
    for number, head in enumerate(rows.heads):
        found, whole = head_metrics(rows, number, logits[head])
        for prefix in ([""] if not number else []) + ([f"{head}/"] if len(rows.heads) > 1 else []):
            by_user |= {prefix + name: column for name, column in found.items()}
            values |= {prefix + name: float(column.mean()) for name, column in found.items()}
            values |= {prefix + name: value for name, value in whole.items()}
    return System(rank=np.zeros(rows.users, np.int32), by_user=by_user, values=values, seconds=seconds)


def head_metrics(rows: Judged, head: int, logit: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The metrics of one head on the rows whose label is known: those linearised in users, and those that are not."""
    known = rows.label[:, head] >= 0
    label, z = rows.label[known, head].astype(np.float64), logit[known].astype(np.float64)
    user, users, positive = rows.user[known], rows.users, rows.label[known, head] >= 0.5
    if form := rows.values.get(rows.heads[head]):
        predicted = predicted_values(z, form)
        return {
            "rmse": rmse_by_user(predicted, label, user, users),
            "deviance": deviance_by_user(predicted, label, user, users),
            "calibration": calibration_by_user(predicted, label, user, users),
        }, {}
    loss, p = binary_log_losses(z, label), sigmoid(z)
    many = np.bincount(user, minlength=users).astype(np.float64)
    grouped_auc, gauc = grouped_aucs_by_user(z, positive, user, users)
    found = {
        "auc": auc_by_user(z, positive, user, users),
        "grouped_auc": grouped_auc,
        "gauc": gauc,
        "log_loss": ratio_by_user(np.bincount(user, loss, minlength=users), many),
        "normalised_entropy": normalised_entropy_by_user(loss, label, user, users),
        "calibration": calibration_by_user(p, label, user, users),
    }
    if rows.domain is not None:
        domains = domain_auc_by_user(z, positive, user, users, rows.domain[known])
        found |= dict(zip(("weighted_auc", "domain_auc"), domains, strict=True))
    if rows.request is not None:
        found |= request_metrics_by_user(z, positive, rows.request[known], user, users, _CUTOFF)
    return found, {"calibration_error": calibration_error(p, positive, bins=10)}


def grouped(
    rows: Judged, systems: Mapping[str, Mapping[str, np.ndarray]], number: np.ndarray, names: Sequence[str], about: str
) -> Task:
    """Every head's metrics on parts of the rows: row i is in the part `names[number[i]]`, below 0 in none."""
    groups = {}
    for at, name in enumerate(names):
        mine = np.flatnonzero(number == at)
        for head_at, head in enumerate(rows.heads):
            known = mine[rows.label[mine, head_at] >= 0]
            if not len(known):
                continue
            part, users = rows.take(known)
            values, whole = {}, {}
            for system, logits in systems.items():
                z = logits[head][known]
                values[system], whole[system] = head_metrics(part, head_at, z)
                if head not in rows.values:
                    label = part.label[:, head_at].astype(np.float64)
                    values[system]["shift"] = shift_by_user(z, label, part.user, part.users)
            title = f"{name}: {head}" if len(rows.heads) > 1 else name
            groups[f"{title} ({len(known):,} rows)"] = Group(user_index=users, values=values, whole=whole)
    return Task(about=about, groups=groups, shown=(*_SHOWN, *(OF_REQUESTS if rows.request is not None else ())))


def calibration_task(rows: Judged, systems: Mapping[str, Mapping[str, np.ndarray]]) -> Task:
    """Said and happened in each tenth of the rows by the first head's probability, a group for each system's tenths."""
    known = np.flatnonzero(rows.label[:, 0] >= 0)
    groups = {}
    for system, logits in systems.items():
        p = sigmoid(logits[rows.heads[0]][known])
        place = deciles(p)
        for tenth in np.unique(place).tolist():
            mine = place == tenth
            part, users = rows.take(known[mine])
            many = np.bincount(part.user, minlength=part.users).astype(np.float64)
            sums = {"said": p[mine], "happened": part.label[:, 0].astype(np.float64)}
            values = {
                name: ratio_by_user(np.bincount(part.user, x, minlength=part.users), many) for name, x in sums.items()
            }
            title = f"{system}, tenth {tenth + 1} ({int(mine.sum()):,} rows)"
            groups[title] = Group(user_index=users, values={system: values})
    about = "Tenths of the rows by predicted probability: its mean, and how often it happened"
    return Task(about=about, groups=groups, shown=("said", "happened"))
