"""How turns of a conversation are written down: what stands around them, and where an answer ends.

A format is data: the text around a turn of each role, in which special tokens are single tokens that no title or query
can spell. Everything is spelt part by part and joined, so that a span begins and ends where its part does and no token
belongs to two of them. What is predicted in training is what an assistant says and the token that ends its turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recjax.core.errors import ConfigError
from recjax.data.text import Tokenizer

ANSWER = "answer"
MARKUP = "markup"  # the section of what stands around turns
ROLES = ("system", "user", "assistant")


class Part(NamedTuple):
    """A text, and the section of the prompt that it belongs to."""

    section: str
    text: str


class Turn(NamedTuple):
    """What one role says."""

    role: str
    parts: tuple[Part, ...]


class Span(NamedTuple):
    """The tokens from `start` up to, and without, `stop` are of this section."""

    section: str
    start: int
    stop: int


@dataclass(frozen=True)
class Rendered:
    """A prompt or conversation as `tokens` int32 [n]; its spans cover all of them, in order."""

    tokens: np.ndarray
    spans: tuple[Span, ...]

    def mask(self, *sections: str) -> np.ndarray:
        """int32 [n]: 1 where a token is of one of these sections."""
        found = np.zeros(len(self.tokens), np.int32)
        for span in self.spans:
            if span.section in sections:
                found[span.start : span.stop] = 1
        return found


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A way to write turns; `{}` is what is said.

    `specials` are the tokens that only a format writes. A conversation opens with `begin`; `end` is the special token
    that an assistant's turn ends with. Where a system has no turn of its own (`system_inside`), what it says opens
    what the first user says. Spaces before `{}` are spelt with what follows them.
    """

    name: str
    specials: tuple[str, ...]
    begin: str = ""
    system: str = "{}\n\n"
    user: str
    assistant: str
    end: str
    system_inside: bool = False

    def __post_init__(self) -> None:
        for role in ROLES:
            if getattr(self, role).count("{}") != 1:
                raise ConfigError(
                    f"ChatFormat.{role} = {getattr(self, role)!r}", where=self.name, expected="one {}, for what is said"
                )
        if self.end not in self.specials or self.end not in self.assistant.partition("{}")[2]:
            raise ConfigError(
                f"ChatFormat.end = {self.end!r}",
                where=self.name,
                expected="one of the specials, which stands behind {} in the assistant's turn",
            )


FORMATS = {
    found.name: found
    for found in (
        ChatFormat(
            name="turns",
            specials=("<s>", "<system>", "<user>", "<assistant>", "<end>"),
            begin="<s>",
            system="<system>{}<end>",
            user="<user>{}<end>",
            assistant="<assistant>{}<end>",
            end="<end>",
        ),
        ChatFormat(
            name="chatml",
            specials=("<|im_start|>", "<|im_end|>"),
            system="<|im_start|>system\n{}<|im_end|>\n",
            user="<|im_start|>user\n{}<|im_end|>\n",
            assistant="<|im_start|>assistant\n{}<|im_end|>\n",
            end="<|im_end|>",
        ),
        ChatFormat(
            name="llama2",
            specials=("<s>", "</s>"),
            system="<<SYS>>\n{}\n<</SYS>>\n\n",
            user="<s>[INST] {} [/INST]",
            assistant=" {} </s>",
            end="</s>",
            system_inside=True,
        ),
        ChatFormat(
            name="llama3",
            specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            begin="<|begin_of_text|>",
            system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
            user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
            assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
            end="<|eot_id|>",
        ),
        ChatFormat(
            name="mistral",
            specials=("<s>", "</s>", "[INST]", "[/INST]"),
            begin="<s>",
            user="[INST] {}[/INST]",
            assistant=" {}</s>",
            end="</s>",
            system_inside=True,
        ),
        ChatFormat(
            name="zephyr",
            specials=("</s>",),
            system="<|system|>\n{}</s>\n",
            user="<|user|>\n{}</s>\n",
            assistant="<|assistant|>\n{}</s>\n",
            end="</s>",
        ),
    )
}
SPECIALS = tuple(sorted({special for found in FORMATS.values() for special in found.specials}))


def format_named(name: str | ChatFormat) -> ChatFormat:
    """A format by its name in `FORMATS`, or itself; raises `ConfigError` for a name that is not there."""
    if isinstance(name, ChatFormat):
        return name
    if name not in FORMATS:
        raise ConfigError(f"there is no chat format {name!r}", expected=", ".join(FORMATS) + ", or a ChatFormat")
    return FORMATS[name]


class Memo:
    """Spells texts, each of them once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, text: str) -> np.ndarray:
        found = self._known.get(text)
        if found is None:
            found = self._known[text] = self.tokenizer.encode(text)
        return found

    def learn(self, texts: Iterable[str]) -> None:
        """Spell many texts at once, which is faster than one by one."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known.update(zip(new, self.tokenizer.encode_all(new), strict=True))


class Chat:
    """A format in the tokens of a tokenizer.

    A conversation opens with the tokens `begin`; `opening[role]` and `closing[role]` stand around what a role says, and
    `leads[role]` are the spaces that it begins with. `before_answer` is the ordinary text between the last special
    token and an answer. Raises `ConfigError` when the tokenizer has not all special tokens of the format.
    """

    def __init__(self, chat: ChatFormat, spell: Memo) -> None:
        self.format, self.spell = chat, spell
        missing = [piece for piece in chat.specials if spell.tokenizer.special(piece) is None]
        if missing:
            raise ConfigError(
                f"the tokenizer has no special token {', '.join(missing)}",
                where=f"chat format {chat.name!r}",
                expected="a format that the tokenizer was made for",
                mend=f"take another of {', '.join(FORMATS)}, or add the tokens to the tokenizer",
            )
        around = {role: getattr(chat, role).partition("{}")[::2] for role in ROLES}
        self.leads = {role: before[len(before.rstrip(" ")) :] for role, (before, _) in around.items()}
        self.begin = self._markup(chat.begin)
        self.opening = {role: self._markup(before.rstrip(" ")) for role, (before, _) in around.items()}
        self.closing = {role: self._markup(after) for role, (_, after) in around.items()}
        self.before_answer = self._split(around["assistant"][0].rstrip(" "))[-1][1]
        said, _, rest = around["assistant"][1].partition(chat.end)
        self._end, self._rest = self._markup(said + chat.end), self._markup(rest)

    def answer(self, text: str) -> np.ndarray:
        """int32: an answer, and the token that ends it."""
        return np.concatenate([self.spell(self.leads["assistant"] + text), self._end])

    def write(self, turns: Sequence[Turn]) -> Rendered:
        """A conversation; what assistants say, and the ends of their turns, are its section "answer"."""
        tokens: list[np.ndarray] = []
        sections: list[str] = []

        def add(section: str, found: np.ndarray) -> None:
            tokens.append(found)
            sections.append(section)

        add(MARKUP, self.begin)
        for turn in self._placed(turns):
            add(MARKUP, self.opening[turn.role])
            lead = self.leads[turn.role]
            for number, part in enumerate(turn.parts):
                section = ANSWER if turn.role == "assistant" else part.section
                add(section, self.spell(part.text if number else lead + part.text))
            if turn.role == "assistant":
                add(ANSWER, self._end)
                add(MARKUP, self._rest)
            else:
                add(MARKUP, self.closing[turn.role])
        return joined(tokens, sections)

    def _placed(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns with the system's inside that of the user, where it has none of its own."""
        odd = [turn.role for turn in turns if turn.role not in ROLES]
        if odd:
            raise ConfigError(f"a turn of {odd[0]!r}", expected=", ".join(ROLES))
        if not self.format.system_inside or not turns or turns[0].role != "system":
            return list(turns)
        system, *rest = turns
        if not rest or rest[0].role != "user":
            raise ConfigError(
                "what the system says is not followed by a user",
                where=f"chat format {self.format.name!r}",
                expected="a user's turn, which it becomes part of",
            )
        said = self.format.system.replace("{}", "".join(part.text for part in system.parts))
        inside = Part(system.parts[0].section, said)
        return [Turn("user", (inside, *rest[0].parts)), *rest[1:]]

    def _markup(self, text: str) -> np.ndarray:
        """int32: text in which special tokens are single ones."""
        found = [np.empty(0, np.int32)]
        for special, plain in self._split(text):
            if special:
                found.append(np.array([self.spell.tokenizer.special(special)], np.int32))
            if plain:
                found.append(self.spell(plain))
        return np.concatenate(found)

    def _split(self, text: str) -> list[tuple[str, str]]:
        """Special tokens, each with the ordinary text behind it; before the first there is "" with what opens."""
        pattern = "|".join(map(re.escape, sorted(self.format.specials, key=len, reverse=True)))
        parts = re.split(f"({pattern})", text)
        return [("", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]


def joined(tokens: Sequence[np.ndarray], sections: Sequence[str]) -> Rendered:
    """Pieces of a prompt one after the other; neighbours of one section are one span, empty ones none."""
    spans: list[Span] = []
    at = 0
    for found, section in zip(tokens, sections, strict=True):
        stop = at + len(found)
        if spans and spans[-1].section == section:
            spans[-1] = spans[-1]._replace(stop=stop)
        elif len(found):
            spans.append(Span(section, at, stop))
        at = stop
    return Rendered(np.concatenate([np.empty(0, np.int32), *tokens]), tuple(spans))
