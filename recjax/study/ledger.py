"""The finished cells of a study: one line of JSON each in `<workdir>/cells.jsonl`, found by the hash of their config.

A line is added whole and synced before a cell counts as finished; a line that was cut short is dropped, and its cell
is run again, which its checkpoints make cheap. What is finished never changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

CELLS = "cells.jsonl"
# What a run is called in the part of the study that asks for it.
_NAMES = ("label", "size", "arm", "budget")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """What came out of one cell.

    `parameters` N, `targets` D seen in training, `unique` U, `flops` of one target ("backbone", "total"); `valid` and
    `test` are the metrics of the best checkpoint (at `best_step` of `steps`), `nll` in nats among them; `curve` is
    (step, validation loss) of every evaluation.
    """

    key: str
    label: str
    size: str
    num_layers: int
    width: int
    num_heads: int
    parameters: int
    learning_rate: float
    seed: int
    user_fraction: float
    arm: str
    budget: float
    unique: int
    targets: int
    flops: Mapping[str, float]
    steps: int
    best_step: int
    curve: Sequence[Sequence[float]]
    valid: Mapping[str, float]
    test: Mapping[str, float]
    examples: str
    seconds: float
    finished: str

    @property
    def passes(self) -> float:
        """D / U."""
        return self.targets / self.unique

    @property
    def compute(self) -> float:
        """C_total: training FLOPs of the run, softmax included."""
        return self.flops["total"] * self.targets

    def loss(self, split: str) -> float:
        """Held-out cross-entropy in nats."""
        return (self.test if split == "test" else self.valid)["nll"]


class Ledger:
    """Finished cells by key, in the order in which they finished."""

    def __init__(self, workdir: Path) -> None:
        self.path = workdir / CELLS
        self._found: dict[str, Finished] = {}
        for line in _lines(self.path):
            one = Finished(**line)
            self._found[one.key] = one

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Finished:
        return self._found[key]

    def get(self, key: str) -> Finished | None:
        """The finished cell, or None."""
        return self._found.get(key)

    def add(self, one: Finished) -> None:
        """Write a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = "".join(json.dumps(line) + "\n" for line in _lines(self.path))
        if self.path.exists() and self.path.read_text(encoding="utf-8") != whole:  # the last line was cut short
            beside = self.path.with_name(f".{CELLS}.{os.getpid()}.tmp")
            beside.write_text(whole, encoding="utf-8")
            os.replace(beside, self.path)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(one)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._found[one.key] = one


def digest(found: Iterable[Finished]) -> str:
    """A hash of what is known of some finished cells, whatever their order and the names they go by."""
    known = ({k: v for k, v in dataclasses.asdict(one).items() if k not in _NAMES} for one in found)
    lines = sorted(json.dumps(one, sort_keys=True) for one in known)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            break
    return out
