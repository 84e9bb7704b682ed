"""Writes the documents of a catalogue and a log."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl

from recjax.core.errors import ConfigError
from recjax.data.hashing import hashes, uniform
from recjax.data.tables import Tables
from recjax.data.text import Tokenizer
from recjax.prompts.chat import Memo
from recjax.prompts.library import TEMPLATES
from recjax.tasks.documents import Documents
from recjax.tasks.prompted_log import TRAIN, Log, read_log, tokenizer_of
from recjax.tasks.prompted_work import TEXT, document, text_work
from recjax.tasks.work import Example, Work

_HELD, _STYLE = 0x68656C64, 0x7374796C  # what a draw is for


def make_work(task: Documents, tables: Tables) -> Work:
    """The work of `task` on these tables; raises what `Documents.work` says."""
    task.template.check(task.name, instruction=(), question=())
    log = read_log(task.wording, task.periods, tables)
    tokenizer = tokenizer_of(task.wording, tables, TEMPLATES)
    names = [f"user {user}" for user in log.user_ids.to_list()] if "log" in task.sources else []
    names += [f"item {item}" for item in log.item_ids.to_list()] if "items" in task.sources else []
    examples: dict[str, list[Example]] = {"train": [], "valid": [], "test": []}
    part = uniform(hashes(len(names), task.seed, _HELD))
    for number, tokens in enumerate(_documents(task, log, _details(task, log, tables), tokenizer)):
        if len(tokens):
            split = "valid" if part[number] < task.held_out else "test" if part[number] < 2 * task.held_out else "train"
            examples[split].append(document(number, tokens))
    return text_work(
        task,
        tables,
        tokenizer=tokenizer,
        examples=examples,
        schemas=dict.fromkeys(examples, TEXT),
        users=pl.DataFrame({"user_index": np.arange(len(names)), "user_id": names}),
        whole=False,
        facts={
            "kind": "documents",
            "split_rule": f"{task.held_out:g} of the documents each for valid and test, by a hash; {log.rule}",
            "tie_rule": "events of a user at the same time stay in file order",
            "sources": list(task.sources),
        },
    )


def _documents(task: Documents, log: Log, texts: list[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of each document: of users, then of items (`texts`); none for a user without training events."""
    spell = Memo(tokenizer)
    begin, end = (_special(tokenizer, piece, task.name) for piece in (task.begin, task.end))
    if "log" in task.sources:
        draws = hashes(len(log.user_ids), task.seed, _STYLE)
        for user in range(len(log.user_ids)):
            events = log.of_period(user, TRAIN)
            if not len(events):
                yield np.empty(0, np.int32)
                continue
            style = task.template.styled(int(draws[user]))
            profile = "; ".join(log.profiles[user])
            lines = [style.say("instruction"), style.say("profile", profile=profile) if profile else ""]
            lines.append(style.say("history"))
            lines += [
                style.say("event", item=e.item, action=e.action) for e in log.told(int(events[0]), int(events[-1]) + 1)
            ]
            yield np.concatenate([begin, *map(spell, lines), end])
    if "items" in task.sources:
        for text in texts:
            yield np.concatenate([begin, spell(text), end])


def _details(task: Documents, log: Log, tables: Tables) -> list[str]:
    """What the document of each item tells."""
    entity = task.wording.details
    if entity is None or tables.items is None:
        return log.texts
    items = pl.DataFrame({"item_id": log.item_ids}).join(tables.items, on="item_id", how="left", maintain_order="left")
    return entity.texts(items, "items", "item_id")


def _special(tokenizer: Tokenizer, piece: str, name: str) -> np.ndarray:
    found = tokenizer.special(piece)
    if found is None:
        raise ConfigError(
            f"the tokenizer has no special token {piece!r}",
            where=f"{name}: Documents.begin, Documents.end",
            expected="the tokens that its documents begin and end with",
        )
    return np.array([found], np.int32)
