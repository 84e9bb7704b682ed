"""Prompts in tokens: what all candidates share, what is asked about each, and what is left out to stay in the budget.

A prompt is one user's turn, instruction, profile, history and a question, up to the slot where the assistant's answer
stands. Everything before the question is the same for all candidates, so that it is written, and later scored, once.
Whole events are dropped from a history, oldest first, and whole fields from a profile, last first; an instruction, a
question or an event is never cut, and a prompt that is over its budget even so is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from recjax.core.errors import ConfigError, DataError
from recjax.data.text import Tokenizer
from recjax.prompts.chat import ANSWER, MARKUP, Chat, ChatFormat, Memo, Rendered, joined
from recjax.prompts.template import Style, Template


class Event(NamedTuple):
    """An entity and what was done with it, both in words."""

    item: str
    action: str


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most tokens of a prompt with its answer (`length`), and of single sections of it (0: what is left)."""

    length: int = 1024
    instruction: int = 0
    profile: int = 0
    history: int = 0
    question: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "instruction", "profile", "history", "question"):
            if getattr(self, name) < (name == "length"):
                raise ConfigError(f"Budget.{name} = {getattr(self, name)}", expected="at least 1, or 0 for no limit")


@dataclass(frozen=True)
class Prompt:
    """What several candidates share (`prefix`), what is asked about each, and how many of the events are in it."""

    prefix: Rendered
    questions: tuple[Rendered, ...]
    events: int

    def answered(self, *answers: np.ndarray) -> tuple[Rendered, np.ndarray]:
        """The prompt with its questions and, after each, the tokens of its answer; and the branch of each token.

        The section "answer" is the answers. Branch 0, int32, is what all share, branch k question k - 1 and its answer.
        """
        parts = [(self.prefix.tokens[span.start : span.stop], span.section, 0) for span in self.prefix.spans]
        for branch, (question, answer) in enumerate(zip(self.questions, answers, strict=True), start=1):
            parts += [(question.tokens[span.start : span.stop], span.section, branch) for span in question.spans]
            parts.append((answer, ANSWER, branch))
        tokens, sections, branches = zip(*parts, strict=True)
        return joined(tokens, sections), np.repeat(np.array(branches, np.int32), [len(one) for one in tokens])


class PromptWriter:
    """Writes the prompts of one kind of task.

    `instruction` and `question` are the fields that the task has for these sections. Raises `ConfigError` when the
    template has other ones.
    """

    def __init__(
        self,
        template: Template,
        chat: Chat,
        budget: Budget,
        *,
        name: str,
        question: Sequence[str],
        instruction: Sequence[str] = (),
    ) -> None:
        template.check(name, instruction=instruction, question=question)
        self.template, self.chat, self.budget, self.name = template, chat, budget, name
        self._fields = {"instruction": list(instruction), "question": list(question)}

    @classmethod
    def of(cls, told: Mapping[str, Any], tokenizer: Tokenizer) -> PromptWriter:
        """The writer that `told` describes, as a prepared folder says it under "template"."""
        chat = Chat(ChatFormat(**{**told["chat"], "specials": tuple(told["chat"]["specials"])}), Memo(tokenizer))
        phrases = {name: tuple(told["template"][name]) for name in Template.sections()}
        template = Template(**phrases, layout=told["template"]["layout"])
        return cls(template, chat, Budget(**told["budget"]), name=told["name"], **told["fields"])

    def told(self) -> dict[str, Any]:
        """All that its prompts depend on besides the tokenizer, as JSON."""
        return {
            "name": self.name,
            "template": dataclasses.asdict(self.template),
            "chat": dataclasses.asdict(self.chat.format),
            "budget": dataclasses.asdict(self.budget),
            "fields": self._fields,
        }

    def write(
        self,
        questions: Sequence[Mapping[str, str]],
        *,
        instruction: Mapping[str, str] | None = None,
        profile: Sequence[str] = (),
        history: Sequence[Event] | None = None,
        answer_length: int = 2,
        draw: int = 0,
    ) -> Prompt:
        """A prompt with these questions, in the style of `draw` (0: the first phrases).

        `answer_length` is what the longest answer takes. Without a `history` (None) nothing is said of one. Raises
        `DataError` when a prompt is over its budget without any history.
        """
        style, chat, spell = self.template.styled(draw), self.chat, self.chat.spell
        lead = chat.leads["user"]
        opening = spell(lead + style.say("instruction", **(instruction or {})))
        asked = [spell(style.say("question", **question)) for question in questions]
        closing = np.concatenate([chat.closing["user"], chat.opening["assistant"]])
        self._check("instruction", len(opening))
        longest = max(map(len, asked))
        self._check("question", longest)
        about = self._profile(style, profile)
        before = [chat.begin, chat.opening["user"], opening, about]
        room = self.budget.length - sum(map(len, before)) - longest - len(closing) - answer_length
        past, kept = self._history(style, history, room)
        if len(past) > room:
            raise DataError(
                f"a prompt of {self.budget.length - room + len(past)} tokens, without any history",
                where=f"{self.name}, asked {spell.tokenizer.decode(asked[0])!r}",
                expected=f"at most {self.budget.length} (Budget.length)",
                mend="raise Budget.length, set Budget.profile, or a lower Field.limit",
            )
        prefix = joined([*before, past], [MARKUP, MARKUP, "instruction", "profile", "history"])
        return Prompt(prefix, tuple(joined([one, closing], ["question", MARKUP]) for one in asked), kept)

    def _profile(self, style: Style, parts: Sequence[str]) -> np.ndarray:
        """The profile with as many of its fields as fit its budget."""
        limit = self.budget.profile
        for count in range(len(parts), 0, -1):
            found = self.chat.spell(style.say("profile", profile="; ".join(parts[:count])))
            if not limit or len(found) <= limit:
                return found
        return np.empty(0, np.int32)

    def _history(self, style: Style, events: Sequence[Event] | None, room: int) -> tuple[np.ndarray, int]:
        """The newest events that fit, in words, and how many they are."""
        if events is None:
            return np.empty(0, np.int32), 0
        spell = self.chat.spell
        limit = min(room, self.budget.history) if self.budget.history else room
        header, nothing = spell(style.say("history")), spell(style.say("nothing"))
        lines, extra = self._lines(style, events)
        # An event costs its line and, where it is the newest of its group, what opens and closes the group.
        cost = np.array([len(line) for line in lines], np.int64) + extra
        fitting = np.cumsum(cost[::-1]) + len(header) <= limit
        kept = int(fitting.argmin()) if not fitting.all() else len(events)
        if not kept:
            return nothing, 0
        first = len(events) - kept
        if self.template.layout == "time":
            return np.concatenate([header, *lines[first:]]), kept
        groups: dict[str, list[np.ndarray]] = {}
        for event, line in zip(events[first:], lines[first:], strict=True):
            groups.setdefault(event.action, []).append(line)
        parts = [header]
        for action, members in groups.items():
            parts += [spell(style.say("group", action=action)), *members, spell("\n")]
        return np.concatenate(parts), kept

    def _lines(self, style: Style, events: Sequence[Event]) -> tuple[list[np.ndarray], np.ndarray]:
        """The tokens of each event, and what it adds by opening its group, seen from the newest."""
        spell, extra = self.chat.spell, np.zeros(len(events), np.int64)
        if self.template.layout == "time":
            return [spell(style.say("event", item=e.item, action=e.action)) for e in events], extra
        newest = {event.action: number for number, event in enumerate(events)}
        for action, number in newest.items():
            extra[number] = len(spell(style.say("group", action=action))) + len(spell("\n"))
        return [spell(style.say("member", item=e.item)) for e in events], extra

    def _check(self, section: str, length: int) -> None:
        limit = getattr(self.budget, section)
        if limit and length > limit:
            raise DataError(
                f"the {section} of a prompt takes {length} tokens",
                where=self.name,
                expected=f"at most {limit} (Budget.{section})",
                mend=f"raise Budget.{section}, or shorten what it says; it is never cut",
            )
