"""Which windows of an example are trained on: how a long history becomes pieces of bounded length.

A window that ends before event `end` and starts at event `start` has the targets `start + 1` to `end - 1`, each
predicted from the events of the window before it. A mode says how many windows an example has in an epoch, and where
window number k of epoch e lies, as a function of the example's length, of e and of a draw made for (seed, task, epoch,
example); so a window is the same whatever was fed before it. Examples with at most K + 1 events (K is the number of
targets of a window) have one window in every mode but "every", and it is the same: the whole example.

Netflix' sliding windows (Joshi et al., RecSys 2024, arXiv 2409.14517) are "random" and "cycle" with one window of each
user an epoch, and "chunk" or "tile" with `most`; "subsample" is the stochastic length of HSTU (Zhai et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recjax.core.errors import ConfigError
from recjax.data.hashing import mixed, uniform

_CHANCE = np.uint64(0xC4A)  # the draw between the modes of a `Chance` is not the draw inside a mode


@dataclass(frozen=True)
class Place:
    """Where windows lie; all int64, `thinned` bool.

    The first `skip` targets of a window are not trained on. A window that is `thinned` has not the events from `start`
    to `end` but as many of the whole example, in order, which `thin` chooses.
    """

    start: np.ndarray
    end: np.ndarray
    skip: np.ndarray
    thinned: np.ndarray


@dataclass(frozen=True)
class Mode:
    """One way to choose windows."""

    @property
    def is_single(self) -> bool:
        """Whether an example has one window in an epoch."""
        return True

    @property
    def is_even(self) -> bool:
        """Whether all epochs have as many targets."""
        return True

    def counts(self, lengths: np.ndarray, limit: int) -> np.ndarray:
        """Windows of each example in an epoch, `limit` targets in each; none for examples below two events."""
        return np.minimum(np.maximum(lengths - 1, 0), 1)

    def reach(self, lengths: np.ndarray, limit: int, context: int) -> np.ndarray:
        """How many different targets of each example are ever trained on, `context` of a cut window left out."""
        return np.maximum(lengths - 1, 0)

    def place(self, lengths: np.ndarray, number: np.ndarray, limit: int, epoch: int, draws: np.ndarray) -> Place:
        """Window `number` of examples of these `lengths` (at least 2); `draws` uint64 differ between epochs."""
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True)
class Last(Mode):
    """The newest window."""

    def reach(self, lengths: np.ndarray, limit: int, context: int) -> np.ndarray:
        targets = np.maximum(lengths - 1, 0)
        return np.where(targets > limit, limit - context, targets)

    def place(self, lengths: np.ndarray, number: np.ndarray, limit: int, epoch: int, draws: np.ndarray) -> Place:
        return _whole(window_start(lengths, limit), lengths)


@dataclass(frozen=True)
class Random(Mode):
    """One window with a new end each epoch, all ends that leave the window whole equally likely."""

    def place(self, lengths: np.ndarray, number: np.ndarray, limit: int, epoch: int, draws: np.ndarray) -> Place:
        end = random_ends(lengths, limit, draws)
        return _whole(window_start(end, limit), end)


@dataclass(frozen=True)
class Subsample(Mode):
    """K + 1 of the example's events in their order, chosen anew each epoch, all choices equally likely."""

    def place(self, lengths: np.ndarray, number: np.ndarray, limit: int, epoch: int, draws: np.ndarray) -> Place:
        end = np.minimum(lengths, limit + 1)
        zeros = np.zeros_like(end)
        return Place(zeros, end, zeros, lengths > end)


@dataclass(frozen=True, kw_only=True)
class Cycle(Mode):
    """One window an epoch, in turn: the targets are cut into m blocks of K from the newest backwards, and epoch e
    trains block e mod m. Every target counts once in m epochs.

    With a `phase` p in [1, K) the newest p targets are a block of their own, trained in a whole window.
    """

    phase: int = 0

    @property
    def is_even(self) -> bool:
        return False

    def place(self, lengths: np.ndarray, number: np.ndarray, limit: int, epoch: int, draws: np.ndarray) -> Place:
        targets = lengths - 1
        phase = np.where(targets > limit, self.phase, 0)
        blocks = -(-(targets - phase) // limit) + (phase > 0)
        block = epoch % blocks
        is_extra = (phase > 0) & (block == 0)
        end = np.where(is_extra, lengths, lengths - phase - (block - (phase > 0)) * limit)
        start = window_start(end, limit)
        return Place(start, end, np.where(is_extra, end - start - 1 - phase, 0), np.zeros(len(end), bool))


@dataclass(frozen=True, kw_only=True)
class Chunk(Mode):
    """Consecutive windows from the newest backwards, so that every target counts once an epoch.

    With `most` above 0 an example has at most so many windows in an epoch, the next ones in turn.
    """

    most: int = 0

    def __post_init__(self) -> None:
        if self.most < 0:
            raise ConfigError(f"{type(self).__name__}.most = {self.most}", expected="0 (all windows) or more")

    @property
    def is_single(self) -> bool:
        return self.most == 1

    @property
    def is_even(self) -> bool:
        return not self.most

    def counts(self, lengths: np.ndarray, limit: int) -> np.ndarray:
        every = -(-np.maximum(lengths - 1, 0) // limit)
        return np.minimum(every, self.most) if self.most else every

    def place(self, lengths: np.ndarray, number: np.ndarray, limit: int, epoch: int, draws: np.ndarray) -> Place:
        end = self._end(lengths, number, limit, epoch)
        return _whole(window_start(end, limit), end)

    def _end(self, lengths: np.ndarray, number: np.ndarray, limit: int, epoch: int) -> np.ndarray:
        if self.most:
            every = -(-(lengths - 1) // limit)
            number = np.where(every > self.most, (epoch * self.most + number) % every, number)
        return lengths - number * limit


@dataclass(frozen=True, kw_only=True)
class Tile(Chunk):
    """As many windows as "chunk", and every target once an epoch too, but the cuts between them move each epoch."""

    def place(self, lengths: np.ndarray, number: np.ndarray, limit: int, epoch: int, draws: np.ndarray) -> Place:
        return _whole(*tiles(lengths, self._end(lengths, number, limit, epoch), limit, draws))


@dataclass(frozen=True)
class Every(Mode):
    """A window for every target, which is its last: for models that give one answer to all that came before it."""

    @property
    def is_single(self) -> bool:
        return False

    def counts(self, lengths: np.ndarray, limit: int) -> np.ndarray:
        return np.maximum(lengths - 1, 0)

    def place(self, lengths: np.ndarray, number: np.ndarray, limit: int, epoch: int, draws: np.ndarray) -> Place:
        end = number + 2
        return _whole(window_start(end, limit), end)


MODES: dict[str, Mode] = {
    "last": Last(),
    "chunk": Chunk(),
    "tile": Tile(),
    "random": Random(),
    "cycle": Cycle(),
    "subsample": Subsample(),
    "every": Every(),
}


@dataclass(frozen=True, kw_only=True)
class Alternate:
    """Epoch after epoch the next of `modes`, over and over: ("last", "random") is every other epoch."""

    modes: tuple[History, ...] = ("last", "random")

    def __post_init__(self) -> None:
        object.__setattr__(self, "modes", _checked(self.modes, "Alternate.modes"))


@dataclass(frozen=True, kw_only=True)
class Then:
    """`first` for so many `epochs`, and `then` from there on."""

    first: History = "random"
    epochs: int
    then: History = "last"

    def __post_init__(self) -> None:
        _checked((self.first, self.then), "Then.first, Then.then")
        if self.epochs < 1:
            raise ConfigError(f"Then.epochs = {self.epochs}", expected="at least 1")


@dataclass(frozen=True, kw_only=True)
class Chance:
    """Each window of each epoch by one of `modes`, drawn with these `rates` (which need not sum to one)."""

    modes: tuple[History, ...] = ("last", "random")
    rates: tuple[float, ...] = (1.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modes", _checked(self.modes, "Chance.modes"))
        object.__setattr__(self, "rates", tuple(map(float, self.rates)))
        if len(self.rates) != len(self.modes) or not all(0 < r < float("inf") for r in self.rates):
            raise ConfigError(f"Chance.rates = {self.rates}", expected=f"{len(self.modes)} numbers above 0")


History = str | Mode | Alternate | Then | Chance


@dataclass(frozen=True)
class Part:
    """A mode, which of its own epochs it is at, and the share of the windows that it has."""

    mode: Mode
    epoch: int
    share: float


def parts(history: History, epoch: int) -> list[Part]:
    """What `history` does in this epoch. A mode in a schedule counts only the epochs that are its own."""
    if isinstance(history, str):
        return [Part(MODES[history], epoch, 1.0)]
    if isinstance(history, Mode):
        return [Part(history, epoch, 1.0)]
    if isinstance(history, Then):
        is_first = epoch < history.epochs
        return parts(history.first, epoch) if is_first else parts(history.then, epoch - history.epochs)
    if isinstance(history, Alternate):
        rounds, turn = divmod(epoch, len(history.modes))
        mode = history.modes[turn]
        return parts(mode, rounds * history.modes.count(mode) + history.modes[:turn].count(mode))
    found = []
    for mode, rate in zip(history.modes, history.rates, strict=True):
        share = rate / sum(history.rates)
        found += [Part(p.mode, p.epoch, p.share * share) for p in parts(mode, epoch)]
    return found


def check(history: History, limit: int, context: int) -> None:
    """Raise `ConfigError` for a history that cannot be used with windows of `limit` targets and this context."""
    for mode in modes_of(history):
        if isinstance(mode, Cycle) and not 0 <= mode.phase < limit:
            raise ConfigError(f"Cycle.phase = {mode.phase}", expected=f"at least 0, less than history_length {limit}")
        if context and (isinstance(mode, Cycle) or type(mode) is Chunk):
            raise ConfigError(
                f"Feed.context = {context} with windows whose cuts never move: some targets would never be trained on",
                where=f"Feed.history = {history!r}",
                mend="take 'tile' or 'random', or context 0",
            )
    if not 0 <= context < limit:
        raise ConfigError(f"Feed.context = {context}", expected=f"at least 0, less than history_length {limit}")


def modes_of(history: History) -> list[Mode]:
    """All modes that a history uses in some epoch; raises `ConfigError` for what is none."""
    if isinstance(history, Mode):
        return [history]
    if isinstance(history, Then):
        return modes_of(history.first) + modes_of(history.then)
    if isinstance(history, Alternate | Chance):
        return [m for mode in history.modes for m in modes_of(mode)]
    if history not in MODES:
        raise ConfigError(
            f"Feed.history = {history!r}",
            expected=" or ".join(map(repr, MODES)) + ", or Alternate, Then, Chance, Cycle, Chunk or Tile of windows.py",
        )
    return [MODES[history]]


def place(
    history: History, lengths: np.ndarray, number: np.ndarray, limit: int, epoch: int, draws: np.ndarray
) -> Place:
    """Where window `number` of examples of these lengths lies in this epoch; see `Mode.place`."""
    now = parts(history, epoch)
    found = [p.mode.place(lengths, number, limit, p.epoch, draws) for p in now]
    if len(found) == 1:
        return found[0]
    bounds = np.cumsum([p.share for p in now[:-1]])
    chosen = np.searchsorted(bounds, uniform(mixed(draws ^ _CHANCE)), side="right")
    every = np.arange(len(lengths))
    start, end, skip, thinned = (
        np.stack([getattr(f, name) for f in found])[chosen, every] for name in ("start", "end", "skip", "thinned")
    )
    return Place(start, end, skip, thinned)


def random_ends(lengths: np.ndarray, history_length: int, draws: np.ndarray) -> np.ndarray:
    """The ends of windows of `history_length` targets (all of them where there are fewer); `draws` are uint64."""
    choices = np.maximum(lengths - history_length, 1).astype(np.uint64)
    return np.minimum(lengths, history_length + 1) + (draws % choices).astype(np.int64)


def tiles(
    lengths: np.ndarray, end: np.ndarray, history_length: int, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of windows of "tile" in place of those of "chunk", which end at `end`; `lengths` of their examples.

    An example of t targets has c = ceil(t / history_length) windows either way. The oldest takes p targets, the next
    ones `history_length` each and the newest the rest; p is any number that makes this work, chosen by `draws`
    (uint64, the same for all windows of an example). Each window starts with the last target of the one before it.
    """
    targets = lengths - 1
    count = -(-targets // history_length)
    least = targets - (count - 1) * history_length
    most = np.where(count > 1, history_length, targets)
    oldest = least + (draws % (most - least + 1).astype(np.uint64)).astype(np.int64)
    number = count - 1 - (lengths - end) // history_length
    start = np.where(number == 0, 0, oldest + (number - 1) * history_length)
    return start, np.minimum(oldest + 1 + number * history_length, lengths)


def window_start(end: np.ndarray, history_length: int) -> np.ndarray:
    """The first event of a window that ends before `end`; it is input only, the others are targets as well."""
    return np.maximum(end - history_length - 1, 0)


def _whole(start: np.ndarray, end: np.ndarray) -> Place:
    return Place(start, end, np.zeros(len(end), np.int64), np.zeros(len(end), bool))


def _checked(modes: tuple[History, ...] | list[History], where: str) -> tuple[History, ...]:
    modes = tuple(modes)
    if not modes or not all(m.is_single for mode in modes for m in modes_of(mode)):
        raise ConfigError(
            f"{where} = {modes}",
            expected="modes with one window of each user an epoch, such as 'last', 'random', 'cycle', 'subsample'",
            mend="several windows of a user ('chunk', 'tile') cannot be mixed with others",
        )
    return modes
