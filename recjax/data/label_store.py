"""What a teacher said of every row of a training split, kept so that many students can read it.

A columnar artifact: one float32 array of all rows for each head (logits; NaN where the teacher said nothing), in the
order of the rows, and a hash of the rows. Which fields a row is told of does not matter, so that a teacher may know
more than its students; a store of other rows, or of the same in another order, is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recjax.core.artifact import open_artifact, read_artifact
from recjax.core.errors import ArtifactError, ConfigError
from recjax.data.examples import Examples

KIND = "row_labels"
_PREFIX = "label_"


@dataclass(frozen=True, kw_only=True)
class LabelStore:
    """The artifact at `path`, or with `stage` that of a stage of the system whose stages lie at `path`.

    `names` are the arrays to read (none named: all); a batch has them as `teacher/<name>`.
    """

    path: str
    stage: str = ""
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if not self.path:
            raise ConfigError("a label store without a place", where="LabelStore.path", expected="an artifact")

    def read(self, examples: Examples) -> dict[str, np.ndarray]:
        """name -> float32 [rows of the training split]. Raises `ArtifactError` for one of other examples."""
        path = Path(self.path, self.stage, "artifacts", KIND) if self.stage else Path(self.path)
        artifact = read_artifact(path, kind=KIND)
        made_of, wanted = artifact.manifest["about"].get("rows"), examples.manifest["rows_hash"]["train"]
        if made_of != wanted:
            raise ArtifactError(
                f"the labels are of the rows {made_of}",
                where=str(path),
                expected=f"{wanted}, the rows that the student is trained on",
                mend="let the teacher label the student's rows",
            )
        known = [name for name in artifact if name.startswith(_PREFIX)]
        names = self.names or tuple(name.removeprefix(_PREFIX) for name in known)
        for name in names:
            if _PREFIX + name not in known:
                expected = ", ".join(name.removeprefix(_PREFIX) for name in known)
                raise ArtifactError(f"there are no labels {name!r}", where=str(path), expected=expected)
        return {name: np.asarray(artifact[_PREFIX + name]) for name in names}


def write_labels(
    path: str | os.PathLike[str], examples: Examples, labels: Mapping[str, np.ndarray], **facts: Any
) -> None:
    """Write what a teacher said of the rows of the training split, name -> [rows]; `facts` as for `open_artifact`.

    Raises `ValueError` where there are not as many as rows.
    """
    count = examples.count("train")
    if wrong := [name for name, values in labels.items() if values.shape != (count,)]:
        raise ValueError(f"{', '.join(wrong)}: not {count} labels")
    about = {"examples": examples.hash, "rows": examples.manifest["rows_hash"]["train"], "split": "train"}
    with open_artifact(path, kind=KIND, about=about, vocabulary_hash=examples.vocab.hash, **facts) as writer:
        for name, values in labels.items():
            writer.append(_PREFIX + name, values.astype(np.float32))
