"""Ranked lists of a teacher, one for every event that a student is trained to predict.

An artifact of kind `teacher_rankings` has, for n events of the training split,

    user_index int64 [n]    position int32 [n]    rows int32 [n, k]    distance float32 [n, k]

`position` p is the place of an event among the user's training events: the list was made from the p events before it,
best item first, row 0 where there is no more; `distance` is smaller for better items. A student must never be given
the list of another event: the artifact says which examples it was made from and carries a hash of which list belongs
to which event, and `read_rankings` raises `ArtifactError` when either is not so. Lists made at the test position, such
as the candidates of other people's retrievers, cannot be written in this form, and must not be: they would teach the
answer's neighbourhood.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recjax.core.artifact import ArtifactWriter, open_artifact, read_artifact
from recjax.core.errors import ArtifactError
from recjax.data.examples import Examples

KIND = "teacher_rankings"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Where a teacher's lists are: the artifact at `path`, or, with `stage`, that of this stage among all in `path`.

    Only the first `k` items of each list are taken.
    """

    path: str
    stage: str = ""
    k: int = 10

    def read(self, examples: Examples) -> Rankings:
        """The lists, aligned with the training events of these examples."""
        path = Path(self.path, self.stage, "artifacts", KIND) if self.stage else Path(self.path)
        return read_rankings(path, examples, k=self.k)


@dataclass(frozen=True)
class Rankings:
    """Lists by event: event p of example i is number `first[i] + p`. Events without a list have rows of 0."""

    first: np.ndarray
    rows: np.ndarray
    distance: np.ndarray

    @property
    def k(self) -> int:
        return self.rows.shape[1]


class AlignmentHash:
    """A hash of which list belongs to which event, the same in whatever order they come."""

    def __init__(self) -> None:
        self._sum, self._count = 0, 0

    def add(self, user_index: np.ndarray, position: np.ndarray, rows: np.ndarray) -> None:
        """Take in some lists."""
        keys = np.stack([user_index.astype("<i8"), position.astype("<i8")], axis=1)
        for key, row in zip(keys, np.ascontiguousarray(rows, "<i4"), strict=True):
            digest = hashlib.blake2b(key.tobytes() + row.tobytes(), digest_size=16).digest()
            self._sum = (self._sum + int.from_bytes(digest, "little")) % 2**128
            self._count += 1

    def hex(self) -> str:
        """32 hex digits."""
        return hashlib.sha256(f"{self._sum}:{self._count}".encode()).hexdigest()[:32]


class RankingsWriter:
    """Adds lists to an artifact, hashing them as they come; made by `open_rankings`."""

    def __init__(self, writer: ArtifactWriter) -> None:
        self._writer, self.alignment = writer, AlignmentHash()

    def add(self, user_index: np.ndarray, position: np.ndarray, rows: np.ndarray, distance: np.ndarray) -> None:
        """Lists of some events."""
        self.alignment.add(user_index, position, rows)
        self._writer.append("user_index", user_index.astype(np.int64))
        self._writer.append("position", position.astype(np.int32))
        self._writer.append("rows", rows.astype(np.int32))
        self._writer.append("distance", distance.astype(np.float32))


@contextlib.contextmanager
def open_rankings(
    path: str | os.PathLike[str], examples: Examples, *, recipe: str = "", step: int = 0
) -> Iterator[RankingsWriter]:
    """Write a new artifact of rankings at `path`, which appears when the block ends well."""
    about: dict[str, str] = {"examples": examples.hash, "split": "train"}
    facts = {"recipe": recipe, "step": step, "vocabulary_hash": examples.vocab.hash}
    with open_artifact(path, kind=KIND, about=about, **facts) as writer:
        rankings = RankingsWriter(writer)
        yield rankings
        writer.append("alignment", np.asarray([rankings.alignment.hex()]))


def read_rankings(path: str | os.PathLike[str], examples: Examples, *, k: int = 0) -> Rankings:
    """The lists of an artifact by event of the training split; the first `k` items of each (0: all).

    Raises `ArtifactError` when the artifact was made from other examples, when lists and events no longer belong
    together, and for an event that the examples do not have or that has two lists.
    """
    artifact = read_artifact(path, kind=KIND, vocabulary_hash=examples.vocab.hash)
    made_from = artifact.manifest["about"].get("examples")
    if made_from != examples.hash:
        raise ArtifactError(
            f"the rankings were made from the examples {made_from}",
            where=str(path),
            expected=f"{examples.hash}, those the student is trained on",
            mend="run the teacher on the student's task, then infer teacher_rankings again",
        )
    user, position, rows = (np.asarray(artifact[name]) for name in ("user_index", "position", "rows"))
    check_alignment(str(np.asarray(artifact["alignment"])[0]), user, position, rows, where=str(path))
    source = examples.source("train")
    lengths = source.lengths.astype(np.int64)
    first = np.cumsum(lengths) - lengths
    users, at = source.read(np.arange(len(lengths)), ("user_index",))["user_index"]
    users = users[at]
    order = np.argsort(users, kind="stable")
    example = order[np.minimum(np.searchsorted(users[order], user), len(users) - 1)]
    known = (users[example] == user) & (position >= 0) & (position < lengths[example])
    event = first[example] + position
    if not known.all() or len(np.unique(event)) != len(event):
        wrong = int(np.argmin(known)) if not known.all() else -1
        raise ArtifactError(
            "an event has two lists" if wrong < 0 else f"there is no event {position[wrong]} of user {user[wrong]}",
            where=str(path),
            expected="one list for each event of the training split",
        )
    k = min(k or rows.shape[1], rows.shape[1])
    out = Rankings(first, np.zeros((int(lengths.sum()), k), np.int32), np.zeros((int(lengths.sum()), k), np.float32))
    out.rows[event], out.distance[event] = rows[:, :k], np.asarray(artifact["distance"])[:, :k]
    return out


def check_alignment(said: str, user_index: np.ndarray, position: np.ndarray, rows: np.ndarray, *, where: str) -> None:
    """Raise `ArtifactError` unless these lists are those of these events by the hash that was `said`."""
    found = AlignmentHash()
    found.add(user_index, position, rows)
    if found.hex() != said:
        raise ArtifactError(
            "lists and events do not belong together any more",
            where=where,
            expected=f"alignment {said}, found {found.hex()}",
            mend="permute user_index, position, rows and distance together, or write the artifact again",
        )
