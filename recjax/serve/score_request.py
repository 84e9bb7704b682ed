"""Reading a request to score candidates: bytes to checked parts of a prompt, or a `RequestError` that says what is odd.

What belongs into a part (the fields of a question, say) is the task's matter; here it is text that has a form in UTF-8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from recjax.core.errors import RequestError
from recjax.serve.request import MAX_CANDIDATES, MAX_HISTORY, candidates_of, check_text, object_of, short, wrong

_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
# Shown by /docs; `parse_score` is what counts.
SCORE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["candidates"],
    "additionalProperties": False,
    "properties": {
        "candidates": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_CANDIDATES,
            "items": _TEXTS,
            "description": "the fields of the question for each; /v1/models lists them",
        },
        "history": {
            "type": "array",
            "maxItems": MAX_HISTORY,
            "items": {
                "type": "object",
                "required": ["item", "action"],
                "properties": {"item": {"type": "string"}, "action": {"type": "string"}},
            },
            "description": "what the user did, in words, oldest first; nothing is said of one when left out",
        },
        "profile": {"type": "array", "items": {"type": "string"}, "description": "what is said of the user"},
        "instruction": {**_TEXTS, "description": "the fields of the instruction"},
        "task": {"type": "string", "description": "which of the model's tasks; the first when left out"},
        "model": {"type": "string", "description": "name of a served bundle; the first that scores when left out"},
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreQuestion:
    """What to score, in the right form; its fields are not yet compared with those of the task."""

    candidates: list[dict[str, str]]
    history: list[dict[str, str]] | None = None
    profile: list[str] = dataclasses.field(default_factory=list)
    instruction: dict[str, str] = dataclasses.field(default_factory=dict)
    task: str = ""
    model: str = ""


def parse_score(body: bytes) -> ScoreQuestion:
    """The question in `body`; raises `RequestError` with status 400 (not JSON) or 422 (not the right form)."""
    value = object_of(body, SCORE_SCHEMA, "a list of the question's fields, one for each candidate")
    for at, candidate in enumerate(candidates_of(value)):
        _check_texts(f"candidates[{at}]", candidate)
    history = value.get("history")
    if history is not None:
        if not isinstance(history, list) or len(history) > MAX_HISTORY:
            raise wrong("history", history, f"a list of at most {MAX_HISTORY} events")
        for at, event in enumerate(history):
            _check_texts(f"history[{at}]", event)
            if set(event) != {"item", "action"}:
                raise RequestError(
                    f"an event has {short(list(event))}", where=f"history[{at}]", expected="item and action"
                )
    profile = value.get("profile", [])
    if not isinstance(profile, list):
        raise wrong("profile", profile, "a list of texts")
    for at, text in enumerate(profile):
        check_text(f"profile[{at}]", text)
    _check_texts("instruction", value.get("instruction", {}))
    for name in ("task", "model"):
        check_text(name, value.get(name, ""))
    return ScoreQuestion(**value)


def _check_texts(where: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise wrong(where, value, "an object of texts")
    for name, text in value.items():
        check_text(f"{where}.{short(name)}", text)
