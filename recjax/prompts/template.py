"""What a prompt says: the phrases of its sections, in the order instruction, profile, history, question.

A template is data. A section has one phrasing or several; which of them an example has is a function of a draw made for
it, so that a model meets several styles and nothing has to be remembered. The fields in braces are checked when a
template is made ready for a task: a field that the task does not have, or a question that leaves one out, is a mistake
of the configuration.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

import numpy as np

from recjax.core.errors import ConfigError
from recjax.data.hashing import hashes

LAYOUTS = ("time", "grouped")
# The fields that every task has in these sections; those of an instruction and a question are the task's own.
_FIELDS = {
    "profile": ("profile",),
    "history": (),
    "nothing": (),
    "event": ("item", "action"),
    "group": ("action",),
    "member": ("item",),
}


@dataclass(frozen=True, kw_only=True)
class Template:
    """The phrases of a kind of prompt, one or several of each; a section's style is one of them.

    With `layout` "time" the history is one `event` after the other, oldest first; with "grouped" the items of each
    action stand together (`group`, then a `member` for each), in order of time. `nothing` stands in place of an empty
    history.
    """

    instruction: tuple[str, ...]
    question: tuple[str, ...]
    profile: tuple[str, ...] = ("Member: {profile}\n", "About the member: {profile}\n")
    history: tuple[str, ...] = ("History, oldest first:\n", "What the member did, in order of time:\n")
    nothing: tuple[str, ...] = ("There is no history yet.\n",)
    event: tuple[str, ...] = ("[{item}] {action}\n", "{action}: {item}\n")
    group: tuple[str, ...] = ("{action}:",)
    member: tuple[str, ...] = (" [{item}]",)
    layout: str = "time"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ConfigError(f"Template.layout = {self.layout!r}", expected=" or ".join(map(repr, LAYOUTS)))
        for section in self.sections():
            object.__setattr__(self, section, tuple(getattr(self, section)))
            if not getattr(self, section):
                raise ConfigError(f"Template.{section} has no phrase", expected="one or several")

    @classmethod
    def sections(cls) -> tuple[str, ...]:
        """The names of the sections."""
        return tuple(field.name for field in fields(cls) if field.name != "layout")

    def check(self, name: str, *, instruction: Collection[str], question: Collection[str]) -> None:
        """Raise `ConfigError` for a field that a section cannot have, or one that a question or an event leaves out.

        `instruction` and `question` are the fields that the task called `name` has for these sections.
        """
        known = {**_FIELDS, "instruction": instruction, "question": question}
        for section, allowed in known.items():
            for phrase in getattr(self, section):
                found = _fields_of(phrase, section, name)
                missing = [] if section == "instruction" else [one for one in allowed if one not in found]
                odd = [one for one in found if one not in allowed]
                if odd or missing:
                    what = f"there is no field {odd[0]!r} for it" if odd else f"it leaves out the field {missing[0]!r}"
                    raise ConfigError(
                        f"the prompt's {section} {phrase!r}: {what}",
                        where=f"{name}: Template.{section}",
                        expected=f"the fields {', '.join(allowed) or '(none)'}",
                        mend="write braces that are not fields twice: {{ and }}",
                    )

    def styled(self, draw: int) -> Style:
        """The phrases of one prompt; 0 gives the first of each section, another draw any of them."""
        drawn = hashes(len(self.sections()), draw) if draw else np.zeros(len(self.sections()), np.uint64)
        chosen = {}
        for section, number in zip(self.sections(), drawn.tolist(), strict=True):
            phrases = getattr(self, section)
            chosen[section] = phrases[number % len(phrases)]
        return Style(chosen, self.layout)

    def words(self) -> list[str]:
        """All that its phrases say besides their fields: text for training a tokenizer."""
        every = (phrase for section in self.sections() for phrase in getattr(self, section))
        return ["".join(text for text, *_ in string.Formatter().parse(phrase)) for phrase in every]


@dataclass(frozen=True)
class Style:
    """One phrase for each section."""

    phrases: Mapping[str, str]
    layout: str

    def say(self, section: str, **said: str) -> str:
        """The phrase of a section with its fields."""
        return self.phrases[section].format(**said)


def _fields_of(phrase: str, section: str, name: str) -> list[str]:
    try:
        parsed = list(string.Formatter().parse(phrase))
    except ValueError as error:
        raise ConfigError(f"the prompt's {section} {phrase!r}: {error}", where=f"{name}: Template.{section}") from None
    return [field for _, field, *_ in parsed if field is not None]
