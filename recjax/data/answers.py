"""What another model answered to the questions of a ranking task in words, to be judged beside a language model.

A columnar artifact of kind `answers`: for a held-out split s, `s_user` [n], the id of the user of each row as text, and
for each head h `s_label_h` and `s_logit_h` float32 [n], users in any order, the rows of a user in the order in which
the questions are asked. They are refused where users, numbers of questions or right answers are not the prompts'.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recjax.core.artifact import open_artifact, read_artifact
from recjax.core.errors import ArtifactError, ConfigError

KIND = "answers"
SPLITS = ("valid", "test")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The artifact at `path`, or with `stage` that of a stage of the system whose stages lie at `path`.

    `name` is what the model is called in tables. `tasks` says which head of it answers which task, task -> head.
    """

    name: str
    path: str
    stage: str = ""
    tasks: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.path or not self.name or not self.tasks:
            raise ConfigError("answers without a name, a place or tasks", where="Answers", expected="all three")

    def read(self, task: str, split: str, users: Sequence[int | str], label: np.ndarray) -> np.ndarray | None:
        """float64 [n, 2]: label logits for the questions of a split, asked about `users` [n], with right answers
        `label` [n]; None where the model does not answer the task. Raises `ArtifactError` for other questions."""
        if task not in self.tasks:
            return None
        head = self.tasks[task]
        path = Path(self.path, self.stage, "artifacts", KIND) if self.stage else Path(self.path)
        artifact = read_artifact(path, kind=KIND)
        if f"{split}_logit_{head}" not in artifact:
            raise ArtifactError(f"there are no answers {head!r} of the split {split}", where=str(path))
        told = np.array(list(map(str, users)))
        found = np.flatnonzero(np.isin(artifact[f"{split}_user"], told))  # a sample of the users may be asked about
        answered = found[np.argsort(artifact[f"{split}_user"][found], kind="stable")]
        asked = np.argsort(told, kind="stable")
        mine = artifact[f"{split}_user"][answered].tolist(), artifact[f"{split}_label_{head}"][answered] >= 0.5
        wanted = [str(users[place]) for place in asked.tolist()], label[asked] == 1
        if mine[0] != wanted[0] or (mine[1] != wanted[1]).any():
            raise ArtifactError(
                f"the answers {head!r} are to other questions than {task} asks",
                where=str(path),
                expected=f"{len(wanted[0])} questions, the same users and right answers",
                mend="let both have the same task, data and periods",
            )
        logit = np.empty(len(asked))
        logit[asked] = artifact[f"{split}_logit_{head}"][answered]
        return np.stack([np.zeros_like(logit), logit], axis=1)


def write_answers(
    path: str | os.PathLike[str],
    users: Mapping[str, Sequence[int | str]],
    labels: Mapping[str, Mapping[str, np.ndarray]],
    logits: Mapping[str, Mapping[str, np.ndarray]],
    **facts: Any,
) -> None:
    """Write what was answered: split -> users, and split -> head -> right answers and logits; `facts` as for
    `open_artifact`."""
    with open_artifact(path, kind=KIND, **facts) as writer:
        for split, ids in users.items():
            writer.append(f"{split}_user", np.array(list(map(str, ids))))
            for head, values in logits[split].items():
                writer.append(f"{split}_label_{head}", np.asarray(labels[split][head], np.float32))
                writer.append(f"{split}_logit_{head}", np.asarray(values, np.float32))
