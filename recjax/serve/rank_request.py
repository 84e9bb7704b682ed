"""Reading a request to rank candidates: bytes to checked columns, or a `RequestError` that says what is odd.

What a column may hold is the bundle's matter (`Columns`); here it is what JSON can say and a row can carry: text, a
number, true or false, null, or a list of these.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from recjax.core.errors import RequestError
from recjax.serve.request import (
    MAX_CANDIDATES,
    MAX_HISTORY,
    MAX_TEXT,
    candidates_of,
    check_text,
    object_of,
    short,
    wrong,
)

_KINDS = {
    "number": "a number, or null",
    "value": "text, a number, true, false or null",
    "list": "a value, or a list of them",
}
_VALUE = {"type": ["string", "number", "boolean", "null", "array"], "maxItems": MAX_HISTORY, "maxLength": MAX_TEXT}
_ROW = {"type": "object", "additionalProperties": _VALUE}
# Shown by /docs; `parse_rank` is what counts.
RANK_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["candidates"],
    "additionalProperties": False,
    "properties": {
        "context": {**_ROW, "description": "columns that all candidates share; /v1/models lists what is read"},
        "candidates": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_CANDIDATES,
            "items": _ROW,
            "description": "the columns of each candidate, which go before those of the context",
        },
        "k": {"type": "integer", "minimum": 1, "description": "how many of the best to answer with; all when left out"},
        "head": {"type": "string", "description": "the head that orders them; the first when left out"},
        "model": {"type": "string", "description": "name of a served bundle; the first that ranks when left out"},
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankQuestion:
    """What to rank, in the right form; its columns are not yet compared with those of the model."""

    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    candidates: Sequence[Mapping[str, Any]]
    k: int | None = None
    head: str = ""
    model: str = ""


def parse_rank(body: bytes) -> RankQuestion:
    """The question in `body`; raises `RequestError` with status 400 (not JSON) or 422 (not the right form)."""
    value = object_of(body, RANK_SCHEMA, "a list of candidates, each an object of its columns")
    if not isinstance(value.get("context", {}), dict):
        raise wrong("context", value["context"], "an object of columns")
    for at, candidate in enumerate(candidates_of(value)):
        if not isinstance(candidate, dict):
            raise wrong(f"candidates[{at}]", candidate, "an object of columns")
    k = value.get("k")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise wrong("k", k, "a whole number from 1 on")
    for name in ("head", "model"):
        check_text(name, value.get(name, ""))
    return RankQuestion(**value)


@dataclasses.dataclass(frozen=True)
class Columns:
    """What a model reads of a row: column -> "number", "value" or "list"."""

    kinds: Mapping[str, str]

    def check(self, asked: RankQuestion) -> None:
        """Raises `RequestError` for a column that is not read, or a value that it cannot hold."""
        self._check_row("context", asked.context)
        for at, candidate in enumerate(asked.candidates):
            self._check_row(f"candidates[{at}]", candidate)

    def _check_row(self, where: str, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            kind = self.kinds.get(name)
            if kind is None:
                known = ", ".join(self.kinds)
                raise RequestError(f"unknown column {short(name)}", where=where, expected=f"some of {known}")
            if isinstance(value, list):
                if kind != "list":
                    raise wrong(f"{where}.{name}", value, _KINDS[kind])
                if len(value) > MAX_HISTORY:
                    what = f"a list of {len(value)} values"
                    raise RequestError(what, where=f"{where}.{name}", expected=f"at most {MAX_HISTORY}")
                for entry in value:
                    _check_value(f"{where}.{name}", entry, "value")
            else:
                _check_value(f"{where}.{name}", value, kind)


def _check_value(where: str, value: Any, kind: str) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str) and kind != "number":
        check_text(where, value)
    elif isinstance(value, float | int) and not isinstance(value, bool):
        if isinstance(value, int) and abs(value) >= 2**63 or isinstance(value, float) and not math.isfinite(value):
            raise RequestError("a number that is too large", where=where, expected="one of 64 bits")
    else:
        raise wrong(where, value, _KINDS[kind])
