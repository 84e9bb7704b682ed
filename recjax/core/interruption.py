"""How a run ends before its last step: told to stop, or thrown out by an error.

SIGTERM is the notice of every scheduler that takes a machine away. The first one is remembered until the step under
way is done, so that the run can save; the second ends the process at once. Several processes stop after the same step.
What an error interrupts may be saved only where it is whole and finite (`is_sound`). How a run is saved is not decided
here.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from recjax.core.sharding import Mesh


class Stop:
    """Remembers SIGTERM while it is entered, for a run on `mesh`; every process asks after each step."""

    def __init__(self, mesh: Mesh) -> None:
        self._asked = False
        self._before: Any = signal.SIG_DFL
        self._together = _Together(mesh) if jax.process_count() > 1 else None

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *exception: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def is_asked(self) -> bool:
        """Whether to stop now; of several processes all get the same answer, at most one step after one was told."""
        return self._asked if self._together is None else self._together(self._asked)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the next one does not wait for anything
        print("told to stop: saving after this step; told again, ends at once", file=sys.stderr, flush=True)


class _Together:
    """Whether any process had said yes when it was asked the time before: that answer is there without waiting."""

    def __init__(self, mesh: Mesh) -> None:
        devices = mesh.devices
        self._count = devices.devices.size
        self._places = NamedSharding(devices, PartitionSpec(devices.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(devices, PartitionSpec()))
        self._before: jax.Array | None = None

    def __call__(self, yes: bool) -> bool:
        mine = np.full(1, yes, np.int32)
        asked = self._any(jax.make_array_from_callback((self._count,), self._places, lambda index: mine))
        before, self._before = self._before, asked
        return before is not None and bool(np.asarray(before.addressable_data(0)))


def is_sound(state: Any) -> bool:
    """Whether every array of `state` is there, computed without an error, and finite.

    A step that failed has used up the state it was given; an error of a device shows when its result is read.
    """
    leaves = jax.tree.leaves(state)
    if any(leaf.is_deleted() for leaf in leaves):
        return False
    try:
        floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        jax.block_until_ready(leaves)
        return all(bool(jnp.isfinite(leaf).all()) for leaf in floats)
    except Exception:  # whatever a runtime raises for a device that failed
        return False
