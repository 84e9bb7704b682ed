"""From prepared examples to batches: the one place where training and evaluation get their numpy arrays.

Training rows are planned by index (`stream.py`), and the planned windows copied into rows (`filling.py`); here a batch
is cut out of the endless row stream, and every process takes its own slice of the same global batch. The position is
the number of a block and a row in it: small, exact, independent of batch size and of the number of processes. Nothing
is put on a device here, and nothing is drawn that is not a function of the seed and the position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import grain
import numpy as np

from recjax.core.errors import ConfigError, ExamplesError
from recjax.data.batch import Batch
from recjax.data.coverage import Coverage, coverage
from recjax.data.examples import Examples
from recjax.data.filling import TIME_FIELDS, Beside, empty, fill
from recjax.data.hashing import hashed_with, hashes, uniform
from recjax.data.heldout import eval_batches, process_rows
from recjax.data.position import check_identity
from recjax.data.shards import ExampleSource
from recjax.data.spelling import ANSWERS, Shape, Speller
from recjax.data.stream import Block, Rates, Stream
from recjax.data.teacher import Rankings, Teacher
from recjax.data.tokens import Tokens
from recjax.data.windows import History, check

__all__ = ["BatchIterator", "Feed", "eval_batches", "train_batches"]

# These do not change which row comes next.
_NOT_ORDER = ("batch_size", "times", "teacher", "prefetch", "memory_gib", "answer", "answer_length", "text_length")
_USERS = 0x75736572  # what a draw is for
_READ_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class Feed:
    """How examples become batches of `batch_size` global rows of `row_length` slots.

    A window has at most `history_length` inputs and as many targets. `history` says which windows of a user are
    trained on (see `windows.py`): "last" the newest one, "chunk" consecutive ones so that every target counts once an
    epoch, "tile" the same with cuts that move every epoch, "random" one with a new end each epoch, "cycle" one in turn,
    "subsample" a random part of the events; or an object of `windows.py` that mixes them. The first `context` targets
    of a window that does not start at the user's first event carry no weight.

    Only a fixed share `user_fraction` of the users is trained on, whatever the seed; the users of a smaller fraction
    are among those of a larger one.

    With `mask_rate` above 0 the model fills gaps instead (BERT4Rec, Sun et al. 2019): slot i shows event i of the
    window, and is hidden with this probability, at least one of each window. A hidden slot has `masked` 1 and the item
    as target; the others have weight 0.

    Where a recipe spells items in tokens (`recjax.data.tokens`), `row_length` counts tokens and the windows are spelled
    (`recjax.data.spelling`): with `answer` "inline" every token of an item is predicted in the row, with "decoder" the
    last event of each window is, in rows of `answer_length` tokens of their own; "every" is the history for that. The
    first `text_length` tokens of a text are read.

    Where examples say with a list `loss` which of their events are predicted, the others have weight 0; where they say
    with a list `branch` which of them see a common beginning and not each other, there are `parents`.

    With a `teacher`, `teacher/rows` and `teacher/distance` give its list for each event to be predicted.

    With `pack` several windows share a row, without it each has its own. `block` is the number of windows packed at a
    time (0: chosen from the data). `times` "history" adds `history_time`; "target" adds `query_time` too, the time of
    the event to be predicted, and so lets the model know when that happens, which is a choice to state beside any
    result. Devices keep 32 bits of a time, so that beyond 2038 only differences of times are right there. `prefetch`
    batches are made ahead in a thread. Examples larger than `memory_gib` are read from disk.
    """

    batch_size: int
    row_length: int
    history_length: int
    pack: bool = True
    history: History = "last"
    context: int = 0
    user_fraction: float = 1.0
    mask_rate: float = 0.0
    answer: str = "inline"
    answer_length: int = 64
    text_length: int = 32
    times: str = "none"
    teacher: Teacher | None = None
    block: int = 0
    prefetch: int = 2
    memory_gib: float = 2.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "row_length", "history_length", "answer_length", "text_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Feed.{name} = {getattr(self, name)}", expected="at least 1")
        for name in ("block", "prefetch"):
            if getattr(self, name) < 0:
                raise ConfigError(f"Feed.{name} = {getattr(self, name)}", expected="0 or more")
        check(self.history, self.history_length, self.context)
        if not 0 < self.user_fraction <= 1:
            raise ConfigError(f"Feed.user_fraction = {self.user_fraction}", expected="above 0, at most 1")
        if not 0 <= self.mask_rate < 1 or (self.mask_rate and self.context):
            raise ConfigError(
                f"Feed.mask_rate = {self.mask_rate}, context = {self.context}",
                expected="a mask_rate of at least 0, below 1; context 0 where it is above 0",
            )
        if self.times not in TIME_FIELDS:
            raise ConfigError(f"Feed.times = {self.times!r}", expected=" or ".join(map(repr, TIME_FIELDS)))
        if self.answer not in ANSWERS:
            raise ConfigError(f"Feed.answer = {self.answer!r}", expected=" or ".join(map(repr, ANSWERS)))
        if self.history_length > self.row_length:
            raise ConfigError(
                f"a window of {self.history_length} does not fit a row of {self.row_length}",
                where="Feed.history_length, Feed.row_length",
                expected="history_length at most row_length",
                mend="raise row_length or lower history_length",
            )


class BatchIterator(grain.DatasetIterator[Batch]):
    """An endless iterator of batches with a position, and what an epoch is.

    `get_state` is the position after the last batch handed out, whatever was made ahead. Targets are counted as they
    are planned: those with an unknown item are counted too, and with `Feed.mask_rate` every slot is.
    """

    def __init__(self, parent: grain.DatasetIterator[Batch], stream: Stream) -> None:
        super().__init__(parent)
        self._stream, self._first = stream, stream.plan(0)

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises `CheckpointError` when the state belongs to other examples or another feeding."""
        self._parent.set_state(state)

    @property
    def epochs(self) -> list[float]:
        """How often each task's windows have been handed out."""
        return self._stream.epochs(self.get_state()["windows"])

    @property
    def epoch_windows(self) -> list[int]:
        """Windows of one epoch of each task."""
        return self._stream.epoch_windows

    @property
    def epoch_targets(self) -> list[int]:
        """Targets (real tokens) of one epoch of each task."""
        return self._stream.epoch_targets

    @property
    def unique_targets(self) -> list[int]:
        """Different targets of each task that are trained on in the long run, of the users that are fed."""
        return self._stream.unique_targets

    @property
    def targets(self) -> list[int]:
        """Targets of each task handed out so far, repeated ones counted again."""
        state = self.get_state()
        return self._stream.targets(state["block"], state["row"])

    @property
    def passes(self) -> list[float]:
        """How often each task's different targets have been trained on, on average."""
        return [seen / u for seen, u in zip(self.targets, self.unique_targets, strict=True)]

    def epochs_of(self, batches: int, batch_size: int) -> list[float]:
        """How often each task's windows are gone through in so many batches, if all blocks pack like the first."""
        rows = self._first.num_rows
        return self._stream.epochs(round(batches * batch_size * self._stream.block / rows))

    def coverage(self, epochs: Sequence[int]) -> list[Coverage]:
        """For each task, which share of its targets has been trained on after so many epochs."""
        return [coverage(self._stream, task, epochs) for task in range(len(self.epoch_windows))]

    @property
    def row_use(self) -> float:
        """Share of the slots that are not padding, in the first block."""
        first = self._first
        return float(first.slots.sum()) / (first.num_rows * self._stream.row_length)


def train_batches(
    examples: Sequence[Examples],
    rates: Rates,
    feed: Feed,
    *,
    seed: int,
    tokens: Tokens | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """An endless iterator over this process's rows of the training batches.

    With `tokens` the windows are spelled in them, and the rows of the batch are rows of a table of tokens.

    `history_ids`, `target_ids`, `positions`, `segment_ids`, `weight`, and `history_time` and `query_time` as
    `feed.times` says, each [batch_size / process_count, row_length]. The slices of all processes, one after the other,
    are the batch of a single process. An item outside the vocabulary stays in the history and is no target. Raises
    `ExamplesError` when the tasks do not go together, and `ConfigError` when the batch cannot be divided, or windows
    would cut examples that make sense only as a whole.
    """
    rows = process_rows(feed.batch_size, process_index, process_count)
    given = len(examples) if callable(rates) else len(rates)
    if not examples or len(examples) != given:
        raise ConfigError(f"{len(examples)} tasks with {given} rates", where="Mixture.rates", expected="one rate each")
    for other in examples[1:]:
        if other.manifest["vocabulary_hash"] != examples[0].manifest["vocabulary_hash"]:
            raise ExamplesError(
                "the tasks of the mixture have different vocabularies",
                where=f"{examples[0].path}, {other.path}",
                expected="tasks that share one item vocabulary",
                mend="make them from the same log with the same split",
            )
    for one in examples:
        if feed.times != "none" and not _has(one, "times"):
            raise ExamplesError(
                "the examples have no times",
                where=str(one.path),
                expected=f"a log with timestamps, because Feed.times = {feed.times!r}",
                mend="set Feed.times = 'none', or bring a log with timestamps",
            )
    check_whole(examples, feed)
    rankings = [feed.teacher.read(e) for e in examples] if feed.teacher else []
    sources = [e.source("train", memory_bytes=int(feed.memory_gib * 2**30)) for e in examples]
    speller = None if tokens is None else _speller(tokens, examples, sources, feed)
    stream = Stream(
        [_fed_lengths(source, feed, speller, task) for task, source in enumerate(sources)],
        rates,
        row_length=feed.row_length,
        history_length=feed.history_length,
        cut=feed.history,
        packed=feed.pack,
        context=feed.context,
        last_only=feed.answer == "decoder",
        slots=None if speller is None else speller.slots,
        block=feed.block,
        seed=seed,
    )
    order = {k: v for k, v in asdict(feed).items() if k not in _NOT_ORDER}
    order = {
        **order,
        "history": repr(feed.history),
        "examples": [e.hash for e in examples],
        "rates": stream.rates,
        "seed": seed,
    }
    if tokens is not None:
        order |= {"tokens": tokens.hash, "spelled": [feed.answer, feed.answer_length, feed.text_length]}
    identity = hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()[:16]
    lists = [[name for name in ("loss", "branch") if _has(one, name)] for one in examples]
    beside = Beside(lists, max(one.manifest.get("branches", 0) for one in examples))
    parent = _RowIterator(sources, stream, feed, rows, identity, beside, rankings, speller)
    return BatchIterator(grain.experimental.ThreadPrefetchDatasetIterator(parent, feed.prefetch), stream)


class _RowIterator(grain.DatasetIterator[Batch]):
    """Cuts batches out of the row stream; `rows` is this process's slice of a global batch."""

    def __init__(
        self,
        sources: Sequence[ExampleSource],
        stream: Stream,
        feed: Feed,
        rows: slice,
        identity: str,
        beside: Beside,
        rankings: Sequence[Rankings],
        speller: Speller | None,
    ) -> None:
        super().__init__()
        self._beside, self._rankings, self._speller = beside, rankings, speller
        self._sources, self._stream, self._feed, self._rows, self._identity = sources, stream, feed, rows, identity
        self._block, self._row = 0, 0

    def get_state(self) -> dict[str, Any]:
        windows = self._stream.position(self._block, self._row)
        return {"block": self._block, "row": self._row, "windows": windows, "identity": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        check_identity(state, self._identity, other="other examples, rates, seed or feeding")
        self._block, self._row = int(state["block"]), int(state["row"])

    def __next__(self) -> Batch:
        batch, done = self._empty(self._rows.stop - self._rows.start), 0
        while done < self._feed.batch_size:
            block = self._stream.plan(self._block)
            count = min(self._feed.batch_size - done, block.num_rows - self._row)
            first, last = max(self._rows.start - done, 0), min(self._rows.stop - done, count)
            if first < last:
                at = slice(done + first - self._rows.start, done + last - self._rows.start)
                part = {k: v[at] for k, v in batch.items()}
                kept = range(self._row + first, self._row + last)
                self._fill(part, block, kept)
            done += count
            self._row += count
            if self._row == block.num_rows:
                self._block, self._row = self._block + 1, 0
        return batch

    def _empty(self, rows: int) -> Batch:
        if self._speller is not None:
            return self._speller.empty(rows)
        listed, masked = self._rankings[0].k if self._rankings else 0, self._feed.mask_rate > 0
        more = {"masked": masked, "listed": listed, "branches": self._beside.branches > 0}
        return empty(rows, self._feed.row_length, times=self._feed.times, **more)

    def _fill(self, part: Batch, block: Block, kept: range) -> None:
        if self._speller is not None:
            self._speller.fill(part, block, kept)
        else:
            more = {"mask_rate": self._feed.mask_rate, "rankings": self._rankings, "beside": self._beside}
            fill(part, block, kept, self._sources, **more)


def _has(examples: Examples, name: str) -> bool:
    """Whether the training examples have this field."""
    return any(field.name == name for field in examples.schema("train"))


def check_whole(examples: Sequence[Examples], feed: Feed) -> None:
    """Raise `ConfigError` when a window is shorter than an example that must not be cut, such as a prompt."""
    for one in examples:
        longest = one.manifest.get("longest_whole", 0)
        if longest - 1 > feed.history_length:
            raise ConfigError(
                f"examples of {longest} tokens would be cut",
                where=f"Feed.history_length = {feed.history_length}, task {one.manifest['task']}",
                expected=f"at least {longest - 1}",
                mend="raise Feed.history_length and Feed.row_length, or lower the budget of the prompts",
            )


def _speller(tokens: Tokens, examples: Sequence[Examples], sources: Sequence[ExampleSource], feed: Feed) -> Speller:
    """What spells these examples; raises `ConfigError` for what a feed of tokens does not do."""
    for name, value, only in (
        ("mask_rate", feed.mask_rate, 0.0),
        ("times", feed.times, "none"),
        ("teacher", feed.teacher, None),
    ):
        if value != only:
            raise ConfigError(f"Feed.{name} = {value!r} where items are spelled in tokens", expected=repr(only))
    masked = next((e for e in examples if _has(e, "loss")), None)
    if masked is not None:
        raise ConfigError(
            "examples that say which of their events are predicted cannot be spelled in other tokens",
            where=str(masked.path),
            mend="take Recipe.spelling away: texts are in tokens already",
        )
    has_text = [_has(e, "text") for e in examples]
    shape = Shape(
        answer=feed.answer,
        text_length=feed.text_length,
        row_length=feed.row_length,
        answer_length=feed.answer_length,
    )
    speller = Speller(tokens, sources, has_text, shape)
    needed = speller.longest(feed.history_length)
    if needed > feed.row_length:
        raise ConfigError(
            f"a window of {feed.history_length} targets can take {needed} tokens, a row has {feed.row_length}",
            where="Feed.row_length, Feed.history_length",
            mend="raise row_length, or lower history_length or text_length",
        )
    return speller


def _fed_lengths(source: ExampleSource, feed: Feed, speller: Speller | None, task: int) -> np.ndarray:
    """int64: how many events of each example are fed."""
    lengths = source.lengths.astype(np.int64) if speller is None else speller.events(task)
    if feed.mask_rate:  # as if there were an event before the first, so that the first can be a target too
        lengths = np.where(lengths > 1, lengths + 1, 0)
    if feed.user_fraction < 1:
        every = np.arange(len(lengths))
        for some in np.split(every, range(_READ_AT_ONCE, len(every), _READ_AT_ONCE)):
            users, at = source.read(some, ("user_index",))["user_index"]
            drawn = hashed_with(hashes(1, _USERS), users[at])
            lengths[some] = np.where(uniform(drawn) < feed.user_fraction, lengths[some], 0)
    return lengths
