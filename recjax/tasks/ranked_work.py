"""Writes the prompts of ranking tasks: training examples with one answer each, and records of many candidates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl

from recjax.data.hashing import hashes
from recjax.data.tables import Tables
from recjax.data.vocab import FIRST_ITEM
from recjax.prompts.chat import Chat
from recjax.prompts.labels import label_tokens
from recjax.prompts.library import TEMPLATES
from recjax.prompts.tokenizer import rows_of
from recjax.prompts.writer import Prompt, PromptWriter
from recjax.tasks.prompted import PERIODS
from recjax.tasks.prompted_log import TRAIN, Log, chat_of, read_log, tokenizer_of
from recjax.tasks.prompted_ranking import GenreAffinity, Ranked, Rated, Relevance, Stars, WatchNext
from recjax.tasks.prompted_work import BRANCHED, MASKED, RANKED, branched, document, masked, text_work
from recjax.tasks.ranked_questions import Asked, Questions, genre_affinity, rated, watch_next
from recjax.tasks.ranked_relevance import judged
from recjax.tasks.work import Example, Work

_STYLE = 0x7374796C  # what a draw is for


def make_work(task: Ranked, tables: Tables) -> Work:
    """The work of `task` on these tables; raises what `Ranked.work` says."""
    log = read_log(task.wording, task.periods, tables)
    tokenizer = tokenizer_of(task.wording, tables, TEMPLATES)
    chat = chat_of(task.wording, tokenizer)
    labels = label_tokens(chat, task.words)
    users = pl.DataFrame({"user_index": np.arange(len(log.user_ids)), "user_id": log.user_ids})
    rule, facts = log.rule, {}
    if isinstance(task, Relevance):
        found = judged(task, log, tables)
        users = found.queries.select(pl.int_range(pl.len(), dtype=pl.Int64).alias("user_index"), user_id="query_id")
        rule, facts = "judged pairs by a hash of the query", {"relevance": found.counts}
        asked: Questions = found.questions
        writer = _Writer(task, log, chat, queries=found.texts)
    else:
        asked = _questions(task, log)
        writer = _Writer(task, log, chat)
    examples = {
        split: list(writer.examples(asked(period)) if period == TRAIN else writer.records(asked(period)))
        for period, split in enumerate(PERIODS)
    }
    return text_work(
        task,
        tables,
        tokenizer=tokenizer,
        examples=examples,
        schemas={split: RANKED if split != "train" else BRANCHED if task.together > 1 else MASKED for split in PERIODS},
        users=users,
        whole=True,
        facts={
            "kind": "ranking",
            "asks": type(task).__name__,
            "split_rule": rule,
            "tie_rule": "events at the second of what is asked about are not told",
            "template": writer.told(),
            "chat": chat.format.name,
            "label_words": list(task.words),
            "label_rows": (labels + FIRST_ITEM).tolist(),
            **facts,
        },
    )


def _questions(task: Ranked, log: Log) -> Questions:
    if isinstance(task, Rated | Stars):
        return rated(task, log)
    if isinstance(task, WatchNext):
        return watch_next(task, log)
    if isinstance(task, GenreAffinity):
        return genre_affinity(task, log)
    raise TypeError(f"{type(task).__name__} has no questions")


class _Writer:
    """Turns questions into examples and records."""

    def __init__(self, task: Ranked, log: Log, chat: Chat, *, queries: list[str] | None = None) -> None:
        self._task, self._log, self._queries = task, log, queries
        self._answers = [chat.answer(word) for word in task.words]
        self._prompts = PromptWriter(
            task.template, chat, task.budget, name=task.name, question=task.question, instruction=task.about
        )

    def told(self) -> dict[str, Any]:
        """What its prompts are like, for whoever asks the model later."""
        return self._prompts.told()

    def examples(self, every: Iterable[Asked]) -> Iterable[Example]:
        """Examples of up to `together` questions, each example in a style of its own."""
        count = self._task.together
        for asked in every:
            starts = range(0, len(asked.labels), count)
            draws = hashes(len(starts), self._task.seed, _STYLE, asked.user, asked.end).tolist()
            for start, draw in zip(starts, draws, strict=True):
                prompt = self._write(asked, asked.questions[start : start + count], draw)
                answers = (self._answers[label] for label in asked.labels[start : start + count])
                rendered, branch = prompt.answered(*answers)
                if count > 1:
                    yield branched(asked.user, rendered, branch, mask=self._task.mask)
                else:
                    yield masked(asked.user, rendered, mask=self._task.mask)

    def records(self, every: Iterable[Asked]) -> Iterable[Example]:
        """One record for each user, in the first style."""
        for asked in every:
            prompt = self._write(asked, asked.questions, 0)
            suffixes = [question.tokens for question in prompt.questions]
            first = 0 if self._queries is not None else int(self._log.offsets[asked.user])
            yield {
                **document(asked.user, prompt.prefix.tokens),
                "suffixes": rows_of(np.concatenate(suffixes)),
                "suffix_lengths": np.array([len(suffix) for suffix in suffixes], np.int32),
                "labels": np.array(asked.labels, np.int32),
                "history_events": prompt.events,
                "total_events": asked.end - first,
            }

    def _write(self, asked: Asked, questions: list[dict[str, str]], draw: int) -> Prompt:
        longest = max(map(len, self._answers))
        if self._queries is not None:
            said = {"query": self._queries[asked.user]}
            return self._prompts.write(questions, instruction=said, answer_length=longest, draw=draw)
        start = max(int(self._log.offsets[asked.user]), asked.end - self._task.history)
        said = {"least": f"{self._task.least:g}"} if isinstance(self._task, Rated) else {}
        return self._prompts.write(
            questions,
            instruction=said,
            profile=self._log.profiles[asked.user],
            history=self._log.told(start, asked.end),
            answer_length=longest,
            draw=draw,
        )
