"""Writes records of instructions: conversations of a file, or questions about the catalogue."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.hashing import hashes, uniform
from recjax.data.tables import Tables
from recjax.prompts.chat import ROLES, Chat, Part, Turn
from recjax.prompts.library import TEMPLATES
from recjax.tasks.prompted import PERIODS
from recjax.tasks.prompted_conversations import Instructions, Jsonl
from recjax.tasks.prompted_log import chat_of, tokenizer_of
from recjax.tasks.prompted_work import MASKED, masked, text_work
from recjax.tasks.work import Example, Work

_HELD, _STYLE = 0x68656C64, 0x7374796C  # what a draw is for
_ROLES = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant", "bot": "assistant"}


def make_work(task: Instructions, tables: Tables) -> Work:
    """The work of `task` on these tables; raises what `Instructions.work` says."""
    if tables.items is None:
        raise DataError("a task in words needs an items table", where="items", expected="items.parquet or items.csv")
    tokenizer = tokenizer_of(task.wording, tables, TEMPLATES)
    chat = chat_of(task.wording, tokenizer)
    source = _of_file(task.source) if task.source else _of_catalogue(task, tables.items)
    examples: dict[str, list[Example]] = {split: [] for split in PERIODS}
    names, lost, cut = [], 0, 0
    for name, turns in source:
        number = len(names)
        names.append(name)
        fitting = _fitting(chat, turns, task.budget.length)
        lost += not fitting
        cut += 0 < len(fitting) < len(turns)
        if fitting:
            draw = uniform(hashes(1, task.seed, _HELD, number))[0]
            split = "valid" if draw < task.held_out else "test" if draw < 2 * task.held_out else "train"
            examples[split].append(masked(number, chat.write(fitting), mask=task.mask))
    return text_work(
        task,
        tables,
        tokenizer=tokenizer,
        examples=examples,
        schemas=dict.fromkeys(PERIODS, MASKED),
        users=pl.DataFrame({"user_index": np.arange(len(names)), "user_id": names}),
        whole=True,
        facts={
            "kind": "instructions",
            "split_rule": f"{task.held_out:g} of the records each for valid and test, by a hash",
            "tie_rule": "none: records have no order",
            "chat": chat.format.name,
            "too_long": {"left_out": lost, "shortened": cut},
        },
    )


def _of_catalogue(task: Instructions, items: pl.DataFrame) -> Iterator[tuple[str, list[Turn]]]:
    """A question about each field that a document tells of each item, but its title, and the answer."""
    title = task.wording.title.column(items.columns, "items")
    told = task.wording.details or task.wording.items
    fields = [field for field in told.fields if field.column(items.columns, "items") not in (None, title)]
    if title is None or not fields:
        raise DataError(
            "the catalogue has nothing to ask about",
            where="items",
            expected="a title and another field",
            mend="set Wording.items or details, or give conversations: Instructions.source",
        )
    rows = items.select("item_id", title, *(field.column(items.columns, "items") for field in fields)).rows()
    for number, (item, name, *values) in enumerate(rows):
        if not isinstance(name, str) or not name.strip():
            continue
        for place, (field, value) in enumerate(zip(fields, values, strict=True)):
            said = field.said(value)
            if said:
                style = task.template.styled(int(hashes(1, task.seed, _STYLE, number, place)[0]))
                words = style.say("question", field=field.label or field.name, item=task.wording.title.said(name))
                asked = (Part("instruction", style.say("instruction")), Part("question", words))
                yield f"item {item}, {field.name}", [Turn("user", asked), Turn("assistant", (Part("answer", said),))]


def _of_file(source: Jsonl) -> Iterator[tuple[str, list[Turn]]]:
    """The conversations of a file; raises `DataError` for a line that is none, with its number."""
    for number, line in enumerate(source.read().decode("utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            turns = [_turn(said) for said in _messages(json.loads(line))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _odd(source, number, str(error) or type(error).__name__) from None
        asked = turns[1:] if turns and turns[0].role == "system" else turns
        if not asked or [turn.role for turn in asked] != ["user", "assistant"] * (len(asked) // 2):
            raise _odd(source, number, f"turns of {', '.join(turn.role for turn in turns) or 'nobody'}")
        yield f"line {number}", turns


def _messages(record: Any) -> list[dict[str, Any]]:
    return record["messages"] if "messages" in record else record["conversations"]


def _turn(said: dict[str, Any]) -> Turn:
    role, text = (said["role"], said["content"]) if "role" in said else (said["from"], said["value"])
    if role not in _ROLES or not isinstance(text, str):
        raise ValueError(f"a turn of {role!r} that says {text!r}")
    return Turn(_ROLES[role], (Part("question", text),))


def _odd(source: Jsonl, number: int, what: str) -> DataError:
    return DataError(
        f"this line is no conversation: {what}",
        where=f"{source.path}, line {number}",
        expected='{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
        "a system's turn first if there is one, then users and assistants in turn",
    )


def _fitting(chat: Chat, turns: list[Turn], length: int) -> list[Turn]:
    """The conversation without the last exchanges that do not fit; nothing where not even the first does."""
    least = 3 if turns[0].role == "system" else 2
    count = len(turns)
    while count >= least and len(chat.write(turns[:count]).tokens) > length:
        count -= 2
    return turns[:count] if count >= least else []
