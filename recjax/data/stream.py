"""Which windows are trained on, in which order, and in which rows: a pure function of (seed, block number).

The endless stream of windows is cut into blocks of equal length. Each block is packed into rows on its own and its rows
are shuffled; the row stream is the blocks' rows one after the other. To know any row it is enough to plan its block,
so a position is two numbers and a restart is immediate. Only indices and lengths are handled here, never items.

Position p of the stream belongs to a task by its rate (`share`), and is that task's next window: a new permutation of
all its windows every epoch. Nothing here depends on the number of processes or on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from recjax.core.errors import ExamplesError
from recjax.data.hashing import hashed_with, hashes, mixed, permutation
from recjax.data.packing import one_per_row, pack
from recjax.data.windows import History, Place, modes_of, place

_RATE_UNITS = 2**20
_MIN_BLOCK = 2048
_MIN_BLOCK_ROWS = 64
_THIN = np.uint64(0x7468696E)  # what a draw is for
_HASH_BITS = 32

# What share of the windows each task has, in any proportion, or what says so when told the windows of an epoch of each.
Rates = Sequence[float] | Callable[[Sequence[int]], Sequence[float]]
# (task, examples, targets of the windows) -> how many slots each window takes
Slots = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


def share(positions: np.ndarray, rates: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The task of each position, and how many earlier positions have the same task.

    Of any first p positions each task has its rate's share, to within two. Rates need not sum to one; their shares are
    kept as multiples of 2^-20.
    """
    task, rest = np.full(len(positions), len(rates) - 1), np.asarray(positions, np.int64)
    local = rest.copy()
    undecided = np.ones(len(positions), bool)
    for number in range(len(rates) - 1):
        units = _units(rates, number)
        before, after = _portion(rest, units), _portion(rest + 1, units)
        chosen = undecided & (after > before)
        task[chosen], local[chosen] = number, before[chosen]
        undecided &= ~chosen
        rest = rest - before
    local[undecided] = rest[undecided]
    return task, local


def _units(rates: Sequence[float], number: int) -> int:
    """Of what the tasks before `number` leave, the share of this one."""
    units = round(rates[number] / sum(rates[number:]) * _RATE_UNITS)
    return min(max(units, 1), _RATE_UNITS - 1)


def _portion(count: np.ndarray, units: int) -> np.ndarray:
    """floor(count * units / _RATE_UNITS) without overflow."""
    whole, part = count // _RATE_UNITS, count % _RATE_UNITS
    return whole * units + part * units // _RATE_UNITS


def shared(position: int, rates: Sequence[float]) -> list[int]:
    """How many of the positions before this one belong to each task."""
    counts, rest = [], np.full(1, position, np.int64)
    for number in range(len(rates) - 1):
        counts.append(int(_portion(rest, _units(rates, number))[0]))
        rest = rest - counts[-1]
    return [*counts, int(rest[0])]


@dataclass(frozen=True)
class Block:
    """The windows of one block in order of row; row r holds windows `bounds[r]` to `bounds[r + 1]`.

    Window k has `length[k]` targets: it is the `length[k] + 1` events from `start[k]` on of example `example[k]` of
    task `task[k]`, and lies in `slots[k]` slots from `offset[k]` on in `row[k]` as `segment[k]`. Its first `skip[k]`
    targets are not trained on. Where `thinned[k]`, its events are as many of the whole example, in order (see `thin`).
    `draw[k]` is a uint64 hash of the seed, the task, the epoch and the example.
    """

    task: np.ndarray
    example: np.ndarray
    draw: np.ndarray
    start: np.ndarray
    length: np.ndarray
    slots: np.ndarray
    skip: np.ndarray
    thinned: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    segment: np.ndarray
    bounds: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.bounds) - 1


class Stream:
    """The blocks of a mixture. `lengths[t]` are the numbers of events of the examples of task t.

    Of a window that does not start with the first event of its example the first `context` targets are not trained on;
    with `last_only` the last target of a window alone is. `slots` says how much of a row the windows of these targets,
    examples and task take: as many slots as they have targets, if it is not given.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        rates: Rates,
        *,
        row_length: int,
        history_length: int,
        cut: History,
        packed: bool,
        context: int = 0,
        last_only: bool = False,
        slots: Slots | None = None,
        block: int = 0,
        seed: int = 0,
    ) -> None:
        self._seed = seed
        self._lengths = [np.asarray(n, np.int64) for n in lengths]
        self.row_length, self._history_length, self._cut, self._packed = row_length, history_length, cut, packed
        self._context, self._modes = context, modes_of(cut)
        self._last_only, self._slots = last_only, slots or (lambda task, example, length: length)
        self._windows = [_windows(self._modes[0].counts(n, history_length)) for n in self._lengths]
        for number, (example, _) in enumerate(self._windows):
            if not len(example):
                raise ExamplesError("no example has two events to train on", where=f"task {number + 1} of the mixture")
        self._rates = list(rates(self.epoch_windows) if callable(rates) else rates)
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._planned: dict[int, Block] = {}
        self._totals: list[list[int]] = [[] for _ in self._lengths]
        self.block = block or self._automatic_block()

    @property
    def history_length(self) -> int:
        """Targets of a window at most."""
        return self._history_length

    @property
    def lengths(self) -> list[np.ndarray]:
        """Events of the examples of each task."""
        return self._lengths

    @property
    def rates(self) -> list[float]:
        """In what proportion the windows of the tasks are drawn."""
        return self._rates

    @property
    def epoch_windows(self) -> list[int]:
        """Windows of one epoch of each task."""
        return [len(example) for example, _ in self._windows]

    @property
    def epoch_targets(self) -> list[int]:
        """Targets of the first epoch of each task; other epochs have as many unless the history says otherwise."""
        return [self._total(task, 0) for task in range(len(self._windows))]

    @property
    def unique_targets(self) -> list[int]:
        """How many different targets each task trains on in the long run."""
        found = [[m.reach(n, self._history_length, self._context) for m in self._modes] for n in self._lengths]
        return [int(np.max(np.stack(reached), axis=0).sum()) for reached in found]

    def epochs(self, position: int) -> list[float]:
        """How often each task's windows have been gone through after so many windows of the stream."""
        total = sum(self._rates)
        return [position * r / total / n for r, n in zip(self._rates, self.epoch_windows, strict=True)]

    def position(self, block: int, row: int) -> int:
        """How many windows lie before this row."""
        return block * self.block + int(self.plan(block).bounds[row])

    def targets(self, block: int, row: int) -> list[int]:
        """How many targets of each task lie before this row, repeated ones counted again."""
        found, planned = [], self.plan(block)
        before = slice(0, planned.bounds[row])
        trained = (planned.length - planned.skip)[before]
        for task, windows in enumerate(shared(block * self.block, self._rates)):
            epoch, rest = divmod(windows, self.epoch_windows[task])
            count = (
                sum(self._total(task, e) for e in range(epoch)) if not self._is_even else epoch * self._total(task, 0)
            )
            count += int(_trained(self.places(task, epoch, self._order(task, epoch)[:rest])).sum())
            found.append(count + int(trained[planned.task[before] == task].sum()))
        return found

    def plan(self, number: int) -> Block:
        """Block `number`."""
        if number not in self._planned:
            while len(self._planned) > 1:
                self._planned.pop(next(iter(self._planned)))
            self._planned[number] = self._plan(number)
        return self._planned[number]

    def seen(self, task: int, epoch: int) -> np.ndarray:
        """bool: for every event of the task's examples, one after the other, whether it is a target of this epoch."""
        lengths, example = self._lengths[task], self._windows[task][0]
        found, first = self.places(task, epoch, np.arange(len(example))), np.cumsum(lengths) - lengths
        plain = ~found.thinned
        begin = (first[example] + found.start + 1 + found.skip)[plain]
        end = (first[example] + found.end)[plain]
        size = int(lengths.sum()) + 1
        seen = np.cumsum(np.bincount(begin, minlength=size) - np.bincount(end, minlength=size))[:-1] > 0
        if not plain.all():
            owner = example[found.thinned]
            events = thin(self._draws(task, epoch, owner), lengths[owner], self._history_length + 1)
            seen[(first[owner][:, None] + events)[:, 1 + self._context :]] = True
        return seen

    def places(self, task: int, epoch: int, window: np.ndarray) -> Place:
        """Where these windows of an epoch lie."""
        example, number = self._windows[task][0][window], self._windows[task][1][window]
        return self._places(task, epoch, example, number, self._draws(task, epoch, example))

    def _plan(self, number: int) -> Block:
        task, local = share(np.arange(number * self.block, (number + 1) * self.block), self._rates)
        example, start, end, skip = (np.empty(self.block, np.int64) for _ in range(4))
        draw, thinned = np.empty(self.block, np.uint64), np.empty(self.block, bool)
        for t, (examples, numbers) in enumerate(self._windows):
            mine = np.flatnonzero(task == t)
            epoch, rank = np.divmod(local[mine], len(examples))
            for e in np.unique(epoch).tolist():
                at = mine[epoch == e]
                window = self._order(t, e)[rank[epoch == e]]
                example[at] = examples[window]
                draw[at] = self._draws(t, e, example[at])
                found = self._places(t, e, example[at], numbers[window], draw[at])
                start[at], end[at], skip[at], thinned[at] = found.start, found.end, found.skip, found.thinned
        length = end - start - 1
        slots = np.empty(self.block, np.int64)
        for t in range(len(self._windows)):
            mine = task == t
            slots[mine] = self._slots(t, example[mine], length[mine])
        packing = pack(slots, self.row_length) if self._packed else one_per_row(self.block)
        new_row = permutation(packing.num_rows, self._seed, 2, number) if self._packed else np.arange(self.block)
        row = new_row[packing.row]
        order = np.lexsort((packing.offset, row))
        return Block(
            task=task[order],
            example=example[order],
            draw=draw[order],
            start=start[order],
            length=length[order],
            slots=slots[order],
            skip=skip[order],
            thinned=thinned[order],
            row=row[order],
            offset=packing.offset[order],
            segment=packing.segment[order],
            bounds=np.searchsorted(row[order], np.arange(packing.num_rows + 1)),
        )

    def _draws(self, task: int, epoch: int, example: np.ndarray) -> np.ndarray:
        return mixed(example.astype(np.uint64) ^ hashes(1, self._seed, 1, task, epoch))

    def _places(self, task: int, epoch: int, example: np.ndarray, number: np.ndarray, draws: np.ndarray) -> Place:
        found = place(self._cut, self._lengths[task][example], number, self._history_length, epoch, draws)
        if self._last_only:
            return Place(found.start, found.end, found.end - found.start - 2, found.thinned)
        if not self._context:
            return found
        is_cut = (found.start > 0) | found.thinned
        skip = np.where(is_cut, np.minimum(self._context, found.end - found.start - 1), 0)
        return Place(found.start, found.end, np.maximum(found.skip, skip), found.thinned)

    @property
    def _is_even(self) -> bool:
        """Whether all epochs have as many targets."""
        return self._last_only or (len(self._modes) == 1 and self._modes[0].is_even and not self._context)

    def _total(self, task: int, epoch: int) -> int:
        """Targets of an epoch."""
        known = self._totals[task]
        while len(known) <= epoch:
            every = np.arange(self.epoch_windows[task])
            known.append(int(_trained(self.places(task, len(known), every)).sum()))
        return known[epoch]

    def _order(self, task: int, epoch: int) -> np.ndarray:
        key = (task, epoch)
        if key not in self._orders:
            for old in [k for k in self._orders if k[0] == task][:-1]:
                del self._orders[old]
            self._orders[key] = permutation(self.epoch_windows[task], self._seed, 0, task, epoch)
        return self._orders[key]

    def _automatic_block(self) -> int:
        """Enough windows to pack well: a power of two, at least 2048, that fills some 64 rows."""
        if not self._packed:
            return _MIN_BLOCK
        shares = np.array(self._rates) / sum(self._rates)
        mean = sum(s * self._mean_slots(task) for task, s in enumerate(shares))
        return max(_MIN_BLOCK, 1 << int(np.ceil(np.log2(_MIN_BLOCK_ROWS * self.row_length / mean))))

    def _mean_slots(self, task: int) -> float:
        """Slots of a window of the first epoch."""
        example = self._windows[task][0]
        found = self.places(task, 0, np.arange(len(example)))
        return float(self._slots(task, example, found.end - found.start - 1).mean())


def thin(draw: np.ndarray, length: np.ndarray, count: int) -> np.ndarray:
    """int64 [windows, count]: which events of each example make up its thinned window, in order.

    `length` (at least `count`) are the numbers of events of the examples, `draw` uint64 their windows' draws. All
    choices are equally likely: the events with the least hashes, found by sorting numbers that hold the window in
    their highest bits, then 32 bits of the hash, and the event in the lowest.
    """
    low, high = (max(int(n - 1), 1).bit_length() for n in (length.max(), len(length)))
    if low + high > 64 - _HASH_BITS and len(length) > 1:
        half = len(length) // 2
        return np.concatenate([thin(draw[:half], length[:half], count), thin(draw[half:], length[half:], count)])
    first = np.cumsum(length) - length
    event = np.arange(int(length.sum())) - np.repeat(first, length)
    drawn = hashed_with(np.repeat(mixed(draw ^ _THIN), length), event) >> np.uint64(64 - _HASH_BITS) << np.uint64(low)
    owner = np.repeat(np.arange(len(length), dtype=np.uint64) << np.uint64(_HASH_BITS + low), length)
    key = np.sort(owner | drawn | event.astype(np.uint64))
    chosen = key[first[:, None] + np.arange(count)] & np.uint64(2**low - 1)
    return np.sort(chosen, axis=1).astype(np.int64)


def _windows(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All windows of an epoch: the example of each, and its number among the windows of its example."""
    example = np.repeat(np.arange(len(counts)), counts)
    return example, np.arange(len(example)) - (np.cumsum(counts) - counts)[example]


def _trained(found: Place) -> np.ndarray:
    return found.end - found.start - 1 - found.skip
