"""An exported bundle that scores candidates by label words: the folder that `recjax export` writes for such a model.

    manifest.json             "kind": "score", the tasks with their templates, labels and calibrations, widths, hashes
    prefill-<p>.jaxexport     prompts of at most p tokens -> their keys and values
    branch-<p>.jaxexport      these, and candidates -> logits of the label words
    weights.safetensors       what these functions take as their first argument, by name
    text.model                the tokenizer

A prompt is written here as it was for training (`recjax.prompts`), read once for all its candidates, and remembered
for a while: candidates asked about later, for the same user, cost no more than their own tokens. Loading needs jax,
numpy and safetensors, the library of the tokenizer, and none of the training code.
"""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recjax.core.errors import DataError, RequestError
from recjax.data.text import Tokenizer
from recjax.data.vocab import FIRST_ITEM
from recjax.prompts.writer import Event, Prompt, PromptWriter
from recjax.serve.score_request import ScoreQuestion
from recjax.serve.stored import Stored

REMEMBERED = 32  # prompts


def function_file(name: str, width: int) -> str:
    """Where the function for prompts of `width` tokens lies."""
    return f"{name}-{width}.jaxexport"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreTask:
    """One of the questions that a model was trained on: how it is put, and what its answers mean.

    `prompts` is what `PromptWriter.told` says of them, `tells_history` whether they tell of a user. `label_columns` are
    where in the exported logits the label words stand; calibrated logits are `logits / temperature + bias`.
    """

    name: str
    prompts: Mapping[str, Any]
    tells_history: bool
    label_words: Sequence[str]
    label_columns: Sequence[int]
    answer_length: int
    temperature: float = 1.0
    bias: Sequence[float] = ()

    def told(self) -> dict[str, Any]:
        """For a manifest."""
        return dataclasses.asdict(self)

    @property
    def fields(self) -> Mapping[str, Sequence[str]]:
        """The fields of the sections "instruction" and "question"."""
        return self.prompts["fields"]

    def write(self, tokenizer: Tokenizer, asked: ScoreQuestion) -> Prompt:
        """The prompt in tokens, as in training, in its first style.

        Raises `RequestError` for fields that the task does not have or misses, and for a prompt over its budget.
        """
        _check_fields("instruction", asked.instruction, self.fields["instruction"])
        for at, candidate in enumerate(asked.candidates):
            _check_fields(f"candidates[{at}]", candidate, self.fields["question"])
        if not self.tells_history and (asked.history is not None or asked.profile):
            raise RequestError(f"{self.name} tells nothing of a user", where="history, profile", mend="leave them out")
        writer = PromptWriter.of(self.prompts, tokenizer)  # a new one, because what it has spelt it keeps
        history = [Event(**event) for event in asked.history or ()] if self.tells_history else None
        try:
            return writer.write(
                asked.candidates,
                instruction=asked.instruction,
                profile=asked.profile,
                history=history,
                answer_length=self.answer_length,
            )
        except DataError as error:
            raise RequestError(error.what, where=error.where, expected=error.expected, mend="shorten it") from error

    def answers(self, logits: np.ndarray) -> np.ndarray:
        """float64 [n, c]: calibrated probabilities of the label words, from the bundle's logits."""
        mine = logits[:, list(self.label_columns)].astype(np.float64) / self.temperature
        mine = mine + np.array(self.bias or (0.0,) * len(self.label_words))
        exps = np.exp(mine - mine.max(axis=1, keepdims=True))
        return exps / exps.sum(axis=1, keepdims=True)


class ScoreBundle(Stored):
    """A loaded bundle that scores candidates; to be called by one thread at a time."""

    kind = "score"

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        """As `Stored`."""
        super().__init__(path, verify=verify)
        told = self.manifest
        self.widths: list[int] = told["widths"]
        self.candidates, self.suffix_width = told["candidates"], told["suffix_width"]
        self.tasks = {task["name"]: ScoreTask(**task) for task in told["tasks"]}
        self.tokenizer = self.load_tokenizer()
        self._weights = self.load_weights()
        self._calls = {
            (name, width): self.load_call(function_file(name, width))
            for name in ("prefill", "branch")
            for width in self.widths
        }
        self._remembered: OrderedDict[bytes, Any] = OrderedDict()

    def facts(self) -> dict[str, Any]:
        """What is said of it to callers: its tasks and what they take."""
        tasks = {
            task.name: {
                "label_words": list(task.label_words),
                "instruction": list(task.fields["instruction"]),
                "candidate": list(task.fields["question"]),
                "history": task.tells_history,
            }
            for task in self.tasks.values()
        }
        return {**super().facts(), "scores": True, "tasks": tasks}

    def task(self, name: str = "") -> ScoreTask:
        """A task by its name, the first without one; raises `RequestError` for a name that is not there."""
        if name and name not in self.tasks:
            raise RequestError("there is no such task", where="task", expected="one of: " + ", ".join(self.tasks))
        return self.tasks[name] if name else next(iter(self.tasks.values()))

    def rows(self, asked: ScoreQuestion) -> tuple[Prompt, np.ndarray, list[np.ndarray]]:
        """The prompt of a question, and its rows and those of its candidates; raises `RequestError` as `write`."""
        prompt = self.task(asked.task).write(self.tokenizer, asked)
        prefix, *suffixes = (x.tokens.astype(np.int32) + FIRST_ITEM for x in (prompt.prefix, *prompt.questions))
        longest = max(range(len(suffixes)), key=lambda at: len(suffixes[at]))
        if len(suffixes[longest]) > self.suffix_width:
            raise RequestError(
                f"its question has {len(suffixes[longest])} tokens",
                where=f"candidates[{longest}]",
                expected=f"at most {self.suffix_width}",
                mend="say less of the candidate",
            )
        return prompt, prefix, suffixes

    def logits(self, prefix: np.ndarray, suffixes: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [n, c]: the logits of all label words after a prompt and each of its n candidates, in rows."""
        width = next(w for w in self.widths if w >= len(prefix))
        kept, length = self._kept(prefix, width), np.array([len(prefix)], np.int32)
        found = []
        for start in range(0, len(suffixes), self.candidates):
            part = suffixes[start : start + self.candidates]
            ids = np.zeros((1, self.candidates, self.suffix_width), np.int32)
            at = np.zeros((1, self.candidates), np.int32)
            for number, suffix in enumerate(part):
                ids[0, number, : len(suffix)], at[0, number] = suffix, len(suffix) - 1
            logits = self._calls["branch", width](self._weights, *kept, length, ids, at)
            found.append(np.asarray(logits)[: len(part)])
        return np.concatenate(found)

    def warm_up(self) -> int:
        """Compile every shape; returns how many."""
        for width in self.widths:
            self.logits(np.full(width, FIRST_ITEM, np.int32), [np.full(1, FIRST_ITEM, np.int32)])
        self._remembered.clear()
        return len(self._calls)

    def _kept(self, prefix: np.ndarray, width: int) -> Any:
        """The keys and values of a prompt, made or remembered."""
        key = prefix.tobytes()
        if key not in self._remembered:
            ids = np.zeros((1, width), np.int32)
            ids[0, : len(prefix)] = prefix
            length = np.array([len(prefix)], np.int32)
            self._remembered[key] = self._calls["prefill", width](self._weights, ids, length)
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return self._remembered[key]


def _check_fields(where: str, given: Mapping[str, str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in given]
    if missing or len(given) > len(wanted):
        what = f"{missing[0]} is missing" if missing else "there are fields that the task does not have"
        raise RequestError(what, where=where, expected=", ".join(wanted) or "no field")
