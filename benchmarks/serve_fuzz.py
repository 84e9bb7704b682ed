"""Requests made from a server's own OpenAPI: right ones, nearly right ones, and rubbish; the same for the same seed.

What is right is read from the schemas that the server publishes, so that a field that is added is asked about without
a change here. Item ids and words are drawn from `Known`, for a schema cannot say which of them there are.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        -(2**63),
        10**40,
        0.5,
        -1e308,
        "",
        " ",
        "x",
        "\u0000",
        "\ud800",
        "ł😀",
        [],
        {},
    ),
    *([[]], [None], {"": None}, {"x": {"y": [1]}}, ["a", 1, None], "x" * 20_000, list(range(12_000))),
)
ODD_BODIES: tuple[bytes, ...] = (
    *(b"", b"{", b"null", b"[]", b'"x"', b"NaN", b'{"k": NaN}', b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"{}" * 3),
    *(b"[" * 50_000, b'{"a":' * 5_000, b'{"k": 1' + b"0" * 5_000 + b"}", b"\x00" * 1_000),
)
METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW")


@dataclasses.dataclass(frozen=True)
class Known:
    """What there is to ask about: item ids, words of queries, facets with some values, the largest `k`."""

    items: Sequence[int | str]
    words: Sequence[str]
    facets: Mapping[str, Sequence[str]]
    max_k: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request; `question` is there when it is one that has to be answered."""

    method: str
    path: str
    body: bytes
    question: dict[str, Any] | None = None


class Fuzzer:
    """Draws requests for the paths of an OpenAPI that take a JSON body."""

    def __init__(self, openapi: Mapping[str, Any], known: Known, paths: Sequence[str], seed: int = 0) -> None:
        """`paths` are those for which `known` can make right requests; other ones get wrong requests only."""
        self._rng, self._known, self._able = random.Random(seed), known, set(paths)
        self._schemas = {
            path: methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            for path, methods in openapi["paths"].items()
            if "post" in methods
        }

    def right(self, path: str) -> Asked:
        """A request that has to be answered with 200."""
        schema, question = self._schemas[path], {}
        for name, part in schema["properties"].items():
            if name in schema["required"] or (name != "model" and self._rng.random() < 0.5):
                question[name] = self._value(name, part)
        question.pop("history_time", None)
        question.pop("time", None)
        if not question.get("filter", True):
            del question["filter"]
        return Asked("POST", path, json.dumps(question).encode(), question)

    def any(self) -> Asked:
        """Any request: a quarter are right ones."""
        rng, path = self._rng, self._rng.choice(list(self._schemas))
        kind = rng.randrange(8)
        if kind < 2:
            return self.right(rng.choice(sorted(self._able)))
        if kind == 2:
            return Asked("POST", path, rng.choice(ODD_BODIES))
        if kind == 3:
            return Asked(rng.choice(METHODS), path, b"")
        if kind == 4:
            tail = "".join(rng.choice("abc/%.?=&;~1") for _ in range(rng.randrange(12)))
            return Asked(rng.choice(("GET", "POST")), f"/v1/{tail}", b"{}")
        body = json.loads(self.right(rng.choice(sorted(self._able))).body)
        for _ in range(rng.randrange(1, 3)):
            name = rng.choice([*body, *self._schemas[path]["properties"], "no such field"])
            if rng.random() < 0.3:
                body.pop(name, None)
            else:
                body[name] = rng.choice(ODD_VALUES)
        raw = json.dumps(body).encode()
        if kind == 5:
            raw = raw[: rng.randrange(len(raw))]
        if kind == 6 and raw:
            at = rng.randrange(len(raw))
            raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        return Asked("POST", path, raw)

    def _value(self, name: str, schema: Mapping[str, Any]) -> Any:
        """A value of one field that the server must take."""
        rng, known = self._rng, self._known
        if name == "filter":
            chosen = rng.sample(list(known.facets), min(len(known.facets), 1))
            return {facet: rng.choice(known.facets[facet]) for facet in chosen}
        if name == "k":
            return rng.randint(1, known.max_k)
        if schema["type"] == "array":
            return [rng.choice(known.items) for _ in range(rng.choice((1, 2, 5, 20, 300)))]
        if schema["type"] == "boolean":
            return rng.random() < 0.5
        if schema["type"] == "integer":
            return rng.randrange(2**31)
        return " ".join(rng.choice(known.words) for _ in range(rng.choice((1, 2, 5, 40))))
