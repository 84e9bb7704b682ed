"""Writes the conversations of users about what they did."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.hashing import hashes
from recjax.data.tables import Tables
from recjax.prompts.chat import ANSWER, Chat, Part, Rendered, Turn
from recjax.prompts.library import TEMPLATES
from recjax.prompts.template import Style
from recjax.prompts.writer import Event
from recjax.tasks.prompted import PERIODS
from recjax.tasks.prompted_conversations import Conversations
from recjax.tasks.prompted_log import TRAIN, Log, chat_of, read_log, tokenizer_of
from recjax.tasks.prompted_work import MASKED, masked, text_work
from recjax.tasks.work import Example, Work

_STYLE, _DRAWN = 0x7374796C, 0x64726177  # what a draw is for
_TRIES = 8


def make_work(task: Conversations, tables: Tables) -> Work:
    """The work of `task` on these tables; raises what `Conversations.work` says."""
    log = read_log(task.wording, task.periods, tables)
    tokenizer = tokenizer_of(task.wording, tables, TEMPLATES)
    writer = _Writer(task, log, chat_of(task.wording, tokenizer))
    examples = {split: list(writer.examples(period)) for period, split in enumerate(PERIODS)}
    return text_work(
        task,
        tables,
        tokenizer=tokenizer,
        examples=examples,
        schemas=dict.fromkeys(PERIODS, MASKED),
        users=pl.DataFrame({"user_index": np.arange(len(log.user_ids)), "user_id": log.user_ids}),
        whole=True,
        facts={
            "kind": "conversations",
            "split_rule": log.rule,
            "tie_rule": "events of a user at the same time stay in file order",
            "chat": writer.chat.format.name,
        },
    )


class _Told(NamedTuple):
    """An event, and whether its answer is predicted."""

    event: Event
    is_asked: bool


class _Writer:
    def __init__(self, task: Conversations, log: Log, chat: Chat) -> None:
        self._task, self._log, self.chat = task, log, chat

    def examples(self, period: int) -> Iterator[Example]:
        """The conversations of a period, user by user, the oldest of a user first."""
        draws = hashes(len(self._log.user_ids), self._task.seed, _STYLE).tolist()
        for user in range(len(self._log.user_ids)):
            events = self._log.of_period(user, period)
            if not len(events):
                continue
            style = self._task.template.styled(draws[user] if period == TRAIN else 0)
            said = self._opening(user, style)
            # What a user picks after the training period is not known in training, not even by its absence.
            known = events if period == TRAIN else np.arange(self._log.offsets[user], self._log.offsets[user + 1])
            known = set(self._log.item[known].tolist())
            if period == TRAIN:
                told = [one for event in events.tolist() for one in self._told(event, known, is_asked=True)]
                parts = list(itertools.islice(self._cut(told, said, style), self._task.most or None))[::-1]
            else:
                first = int(self._log.offsets[user])
                asked = events[: self._task.asked].tolist()
                told = [one for event in range(first, asked[0]) for one in self._told(event, known, is_asked=False)]
                told += [one for event in asked for one in self._told(event, known, is_asked=True)]
                parts = [next(self._cut(told, said, style))]
            for part in parts:
                yield self._example(user, said, part, style)

    def _opening(self, user: int, style: Style) -> Turn:
        profile = "; ".join(self._log.profiles[user])
        parts = [Part("instruction", style.say("instruction"))]
        parts += [Part("profile", style.say("profile", profile=profile))] if profile else []
        return Turn("system", tuple(parts))

    def _told(self, event: int, known: set[int], *, is_asked: bool) -> list[_Told]:
        """An event, among as many drawn items outside `known` as the task says, in an order that is drawn too."""
        log, count = self._log, self._task.negatives
        found = [_Told(event_told, is_asked) for event_told in log.told(event, event + 1)]
        if not count:
            return found
        drawn = hashes(count * _TRIES + 1, self._task.seed, _DRAWN, event)
        items = (drawn[1:] % np.uint64(len(log.texts))).tolist()
        others = [item for item in dict.fromkeys(items) if item not in known][:count]
        found += [_Told(Event(log.texts[item], self._task.not_picked), is_asked) for item in others]
        turn = int(drawn[0] % np.uint64(len(found)))
        return [*found[turn:], *found[:turn]]

    def _cut(self, told: list[_Told], said: Turn, style: Style) -> Iterator[list[_Told]]:
        """The events in conversations that fit the budget, the newest one first, each filled from its end backwards."""
        room = self._task.budget.length - len(self._write(said, [], style).tokens)
        part: list[_Told] = []
        left = room
        for one in reversed(told):
            cost = len(self.chat.write(self._turns(one.event, style)).tokens) - len(self.chat.begin)
            if cost > room:
                raise DataError(
                    f"a conversation of {self._task.budget.length - room + cost} tokens about a single event",
                    where=f"{self._task.name}: {one.event.item!r}",
                    expected=f"at most {self._task.budget.length} (Budget.length)",
                    mend="raise Budget.length, or lower Field.limit",
                )
            if cost > left:
                yield part[::-1]
                part, left = [], room
            part.append(one)
            left -= cost
        yield part[::-1]

    def _turns(self, event: Event, style: Style) -> list[Turn]:
        asked = Part("question", style.say("question", item=event.item))
        return [Turn("user", (asked,)), Turn("assistant", (Part(ANSWER, event.action),))]

    def _write(self, said: Turn, told: list[_Told], style: Style) -> Rendered:
        turns = [turn for one in told for turn in self._turns(one.event, style)]
        # An empty user's turn stands in where a format puts what the system says into the first one.
        return self.chat.write([said, *(turns or [Turn("user", (Part("question", ""),))])])

    def _example(self, user: int, said: Turn, part: list[_Told], style: Style) -> Example:
        rendered = self._write(said, part, style)
        example = masked(user, rendered, mask=self._task.mask)
        if self._task.mask and not all(one.is_asked for one in part):
            answers = [span for span in rendered.spans if span.section == ANSWER]
            for span, one in zip(answers, part, strict=True):
                example["loss"][span.start : span.stop] *= one.is_asked
        return example
