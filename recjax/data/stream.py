"""Which windows are trained on, in which order, and in which rows: a pure function of (seed, block number).

The endless stream of windows is cut into blocks of equal length. Each block is packed into rows on its own and its rows
are shuffled; the row stream is the blocks' rows one after the other. To know any row it is enough to plan its block,
so a position is two numbers and a restart is immediate. Only indices and lengths are handled here, never items.

Position p of the stream belongs to a task by its rate (`share`), and is that task's next window: a new permutation of
all its windows every epoch. Nothing here depends on the number of processes or on the batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recjax.core.errors import ExamplesError
from recjax.data.packing import one_per_row, pack
from recjax.data.windows import Windows, random_ends, tiles, window_start, windows

_RATE_UNITS = 2**20
_MIN_BLOCK = 2048
_MIN_BLOCK_ROWS = 64


def hashes(count: int, *key: int) -> np.ndarray:
    """uint64 [count]: element k is a hash (SplitMix64) of the key and k, the same on every machine."""
    state = np.zeros(1, np.uint64)
    for value in key:
        state = _mixed(state ^ np.array([value % 2**64], np.uint64))
    return _mixed(state + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mixed(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(count: int, *key: int) -> np.ndarray:
    """The numbers 0 to count - 1 in an order that depends on the key alone."""
    return np.argsort(hashes(count, *key), kind="stable")


def share(positions: np.ndarray, rates: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The task of each position, and how many earlier positions have the same task.

    Of any first p positions each task has its rate's share, to within two. Rates need not sum to one; their shares are
    kept as multiples of 2^-20.
    """
    task, rest = np.full(len(positions), len(rates) - 1), np.asarray(positions, np.int64)
    local = rest.copy()
    undecided = np.ones(len(positions), bool)
    for number in range(len(rates) - 1):
        units = round(rates[number] / sum(rates[number:]) * _RATE_UNITS)
        units = min(max(units, 1), _RATE_UNITS - 1)
        before, after = _portion(rest, units), _portion(rest + 1, units)
        chosen = undecided & (after > before)
        task[chosen], local[chosen] = number, before[chosen]
        undecided &= ~chosen
        rest = rest - before
    local[undecided] = rest[undecided]
    return task, local


def _portion(count: np.ndarray, units: int) -> np.ndarray:
    """floor(count * units / _RATE_UNITS) without overflow."""
    whole, part = count // _RATE_UNITS, count % _RATE_UNITS
    return whole * units + part * units // _RATE_UNITS


@dataclass(frozen=True)
class Block:
    """The windows of one block in order of row; row r holds windows `bounds[r]` to `bounds[r + 1]`.

    Window k has `length[k]` targets: it is the `length[k] + 1` events from `start[k]` on of example `example[k]` of
    task `task[k]`, and lies from slot `offset[k]` on in `row[k]` as `segment[k]`.
    """

    task: np.ndarray
    example: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    segment: np.ndarray
    bounds: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.bounds) - 1


class Stream:
    """The blocks of a mixture. `lengths[t]` are the numbers of events of the examples of task t."""

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        rates: Sequence[float],
        *,
        row_length: int,
        history_length: int,
        cut: str,
        packed: bool,
        block: int = 0,
        seed: int = 0,
    ) -> None:
        self._rates, self._seed = list(rates), seed
        self._lengths = [np.asarray(n, np.int64) for n in lengths]
        self.row_length, self._history_length, self._cut, self._packed = row_length, history_length, cut, packed
        self._windows: list[Windows] = [windows(n, history_length, cut=cut) for n in self._lengths]
        for number, found in enumerate(self._windows):
            if not len(found):
                raise ExamplesError("no example has two events to train on", where=f"task {number + 1} of the mixture")
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._planned: dict[int, Block] = {}
        self.block = block or self._automatic_block()

    @property
    def epoch_windows(self) -> list[int]:
        """Windows of one epoch of each task."""
        return [len(w) for w in self._windows]

    @property
    def epoch_targets(self) -> list[int]:
        """Targets of one epoch of each task."""
        found = []
        for kept in self._windows:
            end = np.minimum(kept.end, self._history_length + 1) if self._cut == "random" else kept.end
            found.append(int((end - 1 - window_start(end, self._history_length)).sum()))
        return found

    def epochs(self, position: int) -> list[float]:
        """How often each task's windows have been gone through after so many windows of the stream."""
        total = sum(self._rates)
        return [position * r / total / n for r, n in zip(self._rates, self.epoch_windows, strict=True)]

    def position(self, block: int, row: int) -> int:
        """How many windows lie before this row."""
        return block * self.block + int(self.plan(block).bounds[row])

    def plan(self, number: int) -> Block:
        """Block `number`."""
        if number not in self._planned:
            while len(self._planned) > 1:
                self._planned.pop(next(iter(self._planned)))
            self._planned[number] = self._plan(number)
        return self._planned[number]

    def _plan(self, number: int) -> Block:
        task, local = share(np.arange(number * self.block, (number + 1) * self.block), self._rates)
        example, start, end = (np.empty(self.block, np.int64) for _ in range(3))
        for t, kept in enumerate(self._windows):
            mine = np.flatnonzero(task == t)
            epoch, rank = np.divmod(local[mine], len(kept))
            for e in np.unique(epoch).tolist():
                at = mine[epoch == e]
                window = self._order(t, e)[rank[epoch == e]]
                example[at] = kept.example[window]
                start[at], end[at] = self._bounds(t, e, window)
        length = end - start - 1
        packing = pack(length, self.row_length) if self._packed else one_per_row(self.block)
        place = permutation(packing.num_rows, self._seed, 2, number) if self._packed else np.arange(self.block)
        row = place[packing.row]
        order = np.lexsort((packing.offset, row))
        return Block(
            task=task[order],
            example=example[order],
            start=start[order],
            length=length[order],
            row=row[order],
            offset=packing.offset[order],
            segment=packing.segment[order],
            bounds=np.searchsorted(row[order], np.arange(packing.num_rows + 1)),
        )

    def _bounds(self, task: int, epoch: int, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First event of each window, and the one after its last."""
        kept, limit = self._windows[task], self._history_length
        example, end = kept.example[window], kept.end[window]
        if self._cut in ("random", "tile"):
            drawn = _mixed(example.astype(np.uint64) ^ hashes(1, self._seed, 1, task, epoch))
            if self._cut == "tile":
                return tiles(self._lengths[task][example], end, limit, drawn)
            end = random_ends(end, limit, drawn)
        return window_start(end, limit), end

    def _order(self, task: int, epoch: int) -> np.ndarray:
        key = (task, epoch)
        if key not in self._orders:
            for old in [k for k in self._orders if k[0] == task][:-1]:
                del self._orders[old]
            self._orders[key] = permutation(len(self._windows[task]), self._seed, 0, task, epoch)
        return self._orders[key]

    def _automatic_block(self) -> int:
        """Enough windows to pack well: a power of two, at least 2048, that fills some 64 rows."""
        if not self._packed:
            return _MIN_BLOCK
        shares = np.array(self._rates) / sum(self._rates)
        mean = sum(s * t / w for s, t, w in zip(shares, self.epoch_targets, self.epoch_windows, strict=True))
        return max(_MIN_BLOCK, 1 << int(np.ceil(np.log2(_MIN_BLOCK_ROWS * self.row_length / mean))))
