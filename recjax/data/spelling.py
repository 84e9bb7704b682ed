"""Examples spelled in tokens: windows for training, and held-out records as the prompts that are answered.

A window of events becomes the tokens of the example's text, if it has one, and those of its events one after the
other. A text stands where an event would: what comes after it is predicted from it, it is never predicted itself.
Where answers are inline the tokens stand in one row and each is predicted from those before it; with a decoder the
last event of a window is the answer to all that comes before it, and stands in a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recjax.core.errors import ConfigError
from recjax.data.batch import PAD, Batch
from recjax.data.record import Column, Columns, spans
from recjax.data.shards import ExampleSource, MemorySource
from recjax.data.stream import Block
from recjax.data.tokens import Tokens
from recjax.data.vocab import FIRST_ITEM

ANSWERS = ("inline", "decoder")
_READ_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How windows are laid out: where answers stand, how many tokens of a text are read, slots of a row of answers."""

    answer: str = "inline"
    text_length: int = 32
    row_length: int = 0
    answer_length: int = 0


class _Spelled(NamedTuple):
    """Windows one after the other: their tokens, how many each has, and which of the tokens are trained on."""

    rows: np.ndarray
    counts: np.ndarray
    trained: np.ndarray


class Speller:
    """Spells the training windows of a mixture; `sources[t]` are the examples of task t."""

    def __init__(
        self, tokens: Tokens, sources: Sequence[ExampleSource], has_text: Sequence[bool], shape: Shape
    ) -> None:
        self.tokens, self.shape, self._sources = tokens, shape, list(sources)
        self._text = [
            np.minimum(_lengths_of(source, "text"), shape.text_length) if has else None
            for source, has in zip(sources, has_text, strict=True)
        ]
        if shape.answer == "decoder" and shape.answer_length < tokens.levels:
            raise ConfigError(
                f"an answer of {tokens.levels} tokens does not fit a row of {shape.answer_length}",
                where="Feed.answer_length",
                expected=f"at least {tokens.levels}",
            )

    def events(self, task: int) -> np.ndarray:
        """int64: events of each example as a plan of windows sees them; a text counts as one."""
        lengths = self._sources[task].lengths.astype(np.int64)
        return lengths if self._text[task] is None else lengths + 1

    def longest(self, length: int) -> int:
        """The most slots that a window of up to `length` targets takes."""
        found = []
        for task in range(len(self._sources)):
            targets = np.minimum(self.events(task) - 1, length)
            example = np.flatnonzero(targets > 0)
            found.append(int(self.slots(task, example, targets[example]).max(initial=0)))
        return max(found)

    def slots(self, task: int, example: np.ndarray, length: np.ndarray) -> np.ndarray:
        """int64: slots of windows of `length` + 1 events, of which every row has `row_length`."""
        text = self._text[task]
        whole = (length + 1) * self.tokens.levels if text is None else text[example] + length * self.tokens.levels
        if self.shape.answer == "inline":
            return whole - 1
        # A window takes as large a share of its row as it takes of the row of answers, so that neither is overfull.
        share = -(-self.tokens.levels * self.shape.row_length // self.shape.answer_length)
        return np.maximum(whole - self.tokens.levels, share)

    def empty(self, rows: int) -> Batch:
        """A training batch of padding."""
        names = ["history_ids", "positions", "segment_ids"]
        asked = ["target_ids"]
        if self.shape.answer == "decoder":
            asked += ["decoder_ids", "decoder_positions", "decoder_segment_ids"]
        width = self.shape.row_length if self.shape.answer == "inline" else self.shape.answer_length
        batch: Batch = {name: np.zeros((rows, self.shape.row_length), np.int32) for name in names}
        batch |= {name: np.zeros((rows, width), np.int32) for name in asked}
        batch["weight"] = np.zeros((rows, width), np.float32)
        return batch

    def fill(self, batch: Batch, block: Block, rows: range) -> None:
        """Spell these rows of the block into a batch of padding."""
        kept = np.arange(block.bounds[rows.start], block.bounds[rows.stop])
        flat = {name: array.reshape(-1) for name, array in batch.items()}
        for task in range(len(self._sources)):
            mine = kept[block.task[kept] == task]
            if len(mine):
                self._fill(flat, block, mine, block.row[mine] - rows.start, task)

    def _fill(self, flat: Batch, block: Block, mine: np.ndarray, row: np.ndarray, task: int) -> None:
        spelled, levels = self._spell(block, mine, task), self.tokens.levels
        first = np.cumsum(spelled.counts) - spelled.counts
        answer = 1 if self.shape.answer == "inline" else levels
        shown = spelled.counts - answer
        source = spans(first, shown)
        to = spans(row * self.shape.row_length + block.offset[mine], shown)
        flat["history_ids"][to] = spelled.rows[source]
        flat["positions"][to] = spans(np.zeros_like(shown), shown)
        flat["segment_ids"][to] = np.repeat(block.segment[mine], shown)
        asked = source + 1
        if self.shape.answer == "decoder":
            each = np.full(len(mine), levels)
            asked = spans(first + shown, each)
            to = spans(row * self.shape.answer_length + (block.segment[mine] - 1) * levels, each)
            place = spans(np.zeros_like(each), each)
            flat["decoder_ids"][to] = np.where(place == 0, PAD, spelled.rows[asked - 1])
            flat["decoder_positions"][to] = place
            flat["decoder_segment_ids"][to] = np.repeat(block.segment[mine], levels)
        trained = spelled.trained[asked]
        flat["target_ids"][to] = np.where(trained, spelled.rows[asked], PAD)
        flat["weight"][to] = trained

    def _spell(self, block: Block, mine: np.ndarray, task: int) -> _Spelled:
        if block.thinned[mine].any():
            raise ConfigError(
                "windows of events left out cannot be spelled", where='Feed.history = "subsample"', mend="take another"
            )
        example, levels = block.example[mine], self.tokens.levels
        text = self._text[task]
        is_text = text is not None
        # A text stands in place of event 0, so that the items of the example begin at event 1.
        begin = np.maximum(block.start[mine] - is_text, 0)
        has_text = (block.start[mine] == 0) & is_text
        text_counts = np.where(has_text, text[example], 0) if text is not None else np.zeros(len(mine), np.int64)
        events = block.length[mine] + 1 - has_text
        found = self._sources[task].read(example, ("items", "text") if is_text else ("items",))
        counts = text_counts + events * levels
        out = np.empty(int(counts.sum()), np.int32)
        first = np.cumsum(counts) - counts
        if is_text:
            values, at = found["text"]
            out[spans(first, text_counts)] = values[spans(at, text_counts)] + self.tokens.text_start
        values, at = found["items"]
        items = values[spans(at + begin, events)]
        to = spans(first + text_counts, events * levels)
        out[to] = self.tokens.spelling[items].reshape(-1)
        trained = np.zeros(len(out), bool)
        trained[to] = out[to] >= FIRST_ITEM
        # Without a text the first event is no target, though all but the first of its tokens can be trained on.
        skipped = np.where(block.skip[mine] > 0, (block.skip[mine] + 1 - has_text) * levels, 0)
        trained[spans(first + text_counts, np.minimum(skipped, events * levels))] = False
        return _Spelled(out, counts, trained)


@dataclass(frozen=True)
class Prompts:
    """Held-out records as the prompts that a model of `tokens` answers; texts are cut to `text_length` tokens."""

    tokens: Tokens
    text_length: int

    def slots(self, history_length: int) -> int:
        """The most tokens that a prompt with so many events has."""
        words = self.text_length if self.tokens.text_size else 0
        return max(history_length * self.tokens.levels, words)

    def spell(self, records: Columns, history_length: int) -> Columns:
        """The records with the prompt as `items`: the tokens of the text, then of the newest `history_length` events.

        A view for `HeldExamples.through`; what the user has had stays as `seen`, in item rows.
        """
        tokens, items = self.tokens, records["items"]
        assert items.offsets is not None
        lengths = np.minimum(items.lengths, history_length)
        events = items.values[spans(items.offsets[1:] - lengths, lengths)]
        text = records.get("text", Column(np.zeros(0, np.int32), np.zeros(len(items) + 1, np.int64)))
        assert text.offsets is not None
        words = np.minimum(text.lengths, self.text_length)
        counts = words + lengths * tokens.levels
        first = np.cumsum(counts) - counts
        out = np.empty(int(counts.sum()), np.int32)
        out[spans(first, words)] = text.values[spans(text.offsets[:-1], words)] + tokens.text_start
        out[spans(first + words, lengths * tokens.levels)] = tokens.spelling[events].reshape(-1)
        changed = {name: column for name, column in records.items() if name not in ("times", "text")}
        prompt = Column(out, np.concatenate([[0], np.cumsum(counts)]))
        return {**changed, "items": prompt, "seen": records.get("seen", items)}


def _lengths_of(source: ExampleSource, name: str) -> np.ndarray:
    """int64: how many values the list `name` of each example has."""
    if isinstance(source, MemorySource):
        return source.columns[name].lengths
    every = np.arange(len(source))
    parts = np.split(every, range(_READ_AT_ONCE, len(every), _READ_AT_ONCE))
    return np.concatenate(
        [np.array([len(e[name]) for e in source.__getitems__(part.tolist())], np.int64) for part in parts] or [every]
    )
