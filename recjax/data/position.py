"""Where an endless stream of batches stands: saved as a few numbers, and taken up only by the same stream.

A position is independent of the batch size and of the number of processes. `Counted` is a stream over things of which
each comes once an epoch, where it is one number; that of windows is in `recjax.data.pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from recjax.core.errors import CheckpointError


class OneSlot:
    """What a feed of windows would say of one whose rows have a single slot, and no history."""

    row_length: ClassVar[int] = 1
    history_length: ClassVar[int] = 1
    text_length: ClassVar[int] = 1
    times: ClassVar[str] = "none"


class Counted:
    """This process's part of the batches of such a stream."""

    unit: ClassVar[str]  # what is counted
    other: ClassVar[str]  # what a position that does not fit belongs to
    row_use = 1.0

    def __init__(self, identity: str) -> None:
        """`identity` stands for everything that decides what comes next."""
        self._identity, self._position = identity, 0

    def __iter__(self) -> Any:
        return self

    def get_state(self) -> dict[str, Any]:
        """How many have been handed out."""
        return {self.unit: self._position, "identity": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises `CheckpointError` when the state belongs to another stream."""
        check_identity(state, self._identity, other=self.other)
        self._position = int(state[self.unit])

    def close(self) -> None:
        """Nothing is held open."""


class Rounds:
    """An endless stream that goes through `count` things; `order(e)` says in which order in epoch e, int64 [count]."""

    def __init__(self, count: int, order: Callable[[int], np.ndarray]) -> None:
        self._count, self._make = count, order
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._count

    def at(self, places: np.ndarray) -> np.ndarray:
        """int64: what comes at these places of the stream, counted from 0."""
        epochs, within = np.divmod(places, self._count)
        found = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._make(epoch)
            now = epochs == epoch
            found[now] = self._order[within[now]]
        return found


def check_identity(state: Mapping[str, Any], identity: str, *, other: str) -> None:
    """Raises `CheckpointError` for the saved position of another stream; `other` says what it may belong to."""
    if state.get("identity") != identity:
        raise CheckpointError(
            f"the saved position belongs to {other}",
            where=f"data position {state.get('identity')!r}",
            expected=repr(identity),
            mend="train with the recipe and data of the checkpoint, or start a new run",
        )
