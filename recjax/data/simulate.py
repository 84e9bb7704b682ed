"""The simulated world: a log, a catalogue and queries made from a seed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class World:
    num_events: int = 20_000
    seed: int = 0

    def tables(self):
        raise NotImplementedError
