"""Which rows of a log a task is about, and which of them may be held out: surfaces, windows of time.

Rows that are left out keep their place and their users' numbers, so that tasks on parts of one log that hold out the
same rows ask the same and can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.tasks.impression_rows import DROPPED, TEST, TRAIN, VALID, labels_of, parts_of, times_of
from recjax.tasks.impressions import Impressions, Rule


def chosen_parts(
    task: Impressions, frame: pl.DataFrame, labels: np.ndarray, domain: np.ndarray, users: np.ndarray
) -> tuple[np.ndarray, str]:
    """`parts_of` of the rows that the task is about; int8 [n], `DROPPED` for all others.

    Raises `DataError` as it does, and where no row is left.
    """
    place = _place_of_user(task, frame, users) if task.window_of == "user" else None
    kept, said = _within(task, frame, place)
    asked = kept & _holds(task.held_out, "held_out", frame)
    if not asked.any():
        raise DataError("no row is left", where="Impressions.only, held_out, window", expected="rows of the task")
    part = np.full(frame.height, DROPPED, np.int8)
    if task.cuts:
        part[asked], rule = _cut(task, frame, asked) if place is None else _cut_users(task, place[asked])
    else:
        part[asked], rule = parts_of(task, frame.filter(asked), labels[asked], domain[asked], users[asked])
    others = kept & ~asked
    if others.any():
        times = times_of(frame, "Impressions.held_out")
        first = times[(part == VALID) | (part == TEST)].min()
        part[others & (times < first - task.gap)] = TRAIN
        said.append(f"only rows with {task.held_out} are held out")
    return part, "; ".join([rule, *said])


def _within(task: Impressions, frame: pl.DataFrame, place: np.ndarray | None) -> tuple[np.ndarray, list[str]]:
    """Which rows are those of the task, and what says so."""
    kept, said = _holds(task.only, "only", frame), [f"rows with {task.only}"] if task.only else []
    if task.window == (0, 1):
        return kept, said
    if place is not None:
        begin, end = task.window
        told = f"rows from {begin:g} on and before {end:g} of the rows of each user in order of time"
        return kept & (place >= begin) & (place < end), [*said, told]
    times = times_of(frame, "Impressions.window")
    begin, end = _at(times, task.window)
    return kept & (times >= begin) & (times < end), [*said, f"rows from {begin} on and before {end}"]


def _cut(task: Impressions, frame: pl.DataFrame, asked: np.ndarray) -> tuple[np.ndarray, str]:
    every = times_of(frame, "Impressions.cuts")
    cuts, times = _at(every, task.cuts), every[asked]
    part = np.searchsorted(cuts, times, side="right").astype(np.int8)
    for cut in cuts:
        part[(times < cut) & (times >= cut - task.gap)] = DROPPED
    rule = f"by time: train before {cuts[0]}, valid from then on, test from {cuts[1]} on (seconds since 1970)"
    return part, rule + (f"; without the {task.gap} seconds before either" if task.gap else "")


def _cut_users(task: Impressions, place: np.ndarray) -> tuple[np.ndarray, str]:
    rule = "by time within each user: valid from {:g} of the user's rows on, test from {:g} on".format(*task.cuts)
    return np.searchsorted(np.asarray(task.cuts), place, side="right").astype(np.int8), rule


def _place_of_user(task: Impressions, frame: pl.DataFrame, users: np.ndarray) -> np.ndarray:
    """float64 [n]: which share of the rows of its user lies before the middle of each row, in order of time."""
    order = np.lexsort((times_of(frame, 'Impressions.window_of = "user"'), users))
    who = users[order]
    place = np.empty(len(users))
    place[order] = (np.arange(len(who)) - np.searchsorted(who, who) + 0.5) / np.bincount(who)[who]
    return place


def _at(times: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """int64: the second before which these shares of all rows lie."""
    ordered = np.append(np.sort(times), times.max() + 1)
    return ordered[[int(len(times) * share) for share in shares]]


def _holds(rule: str, name: str, frame: pl.DataFrame) -> np.ndarray:
    """bool [n]; a row whose column is missing does not hold."""
    return labels_of({name: Rule.read(name, rule)}, frame)[:, 0] >= 0.5 if rule else np.ones(frame.height, bool)
