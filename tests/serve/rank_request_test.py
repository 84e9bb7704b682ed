"""A request to rank is read or refused with a reason, before any model is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from recjax.core.errors import RequestError
from recjax.serve.rank_request import MAX_CANDIDATES, Columns, RankQuestion, parse_rank

COLUMNS = Columns({"user_id": "value", "device": "value", "history": "list", "count": "number"})
ASKED: dict[str, Any] = {"context": {"user_id": 3, "device": "phone"}, "candidates": [{"count": 2.5}, {}]}


def read(body: Any) -> RankQuestion:
    asked = parse_rank(body if isinstance(body, bytes) else json.dumps(body).encode())
    COLUMNS.check(asked)
    return asked


def test_what_is_said_is_kept() -> None:
    asked = read({**ASKED, "k": 3, "head": "click", "model": "m"})
    assert asked.context == ASKED["context"] and list(asked.candidates) == ASKED["candidates"]
    assert (asked.k, asked.head, asked.model) == (3, "click", "m")
    assert read({"candidates": [{}]}) == RankQuestion(candidates=[{}])


@pytest.mark.parametrize(
    "row",
    [
        {"user_id": None, "device": True, "history": None, "count": None},
        {"user_id": 2**63 - 1, "history": [1, "two", None, 3.5], "count": -1},
        {"user_id": -(2**63) + 1, "history": "1|2", "count": False},
        {"user_id": "Zoë", "history": [], "count": 1e300},
    ],
)
def test_whatever_a_column_can_hold_is_taken(row: dict[str, Any]) -> None:
    assert read({"context": row, "candidates": [row]}).candidates[0] == row


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"candidates": []}, "candidates"),
        ({"candidates": "5"}, "candidates"),
        ({"candidates": [5]}, "candidates[0]"),
        ({"candidates": [{}] * (MAX_CANDIDATES + 1)}, "candidates"),
        ({"context": [1]}, "context"),
        ({"context": None}, "context"),
        ({"context": {"colour": 1}}, "context"),
        ({"candidates": [{}, {"genre": "x"}]}, "candidates[1]"),
        ({"context": {"device": {"a": 1}}}, "context.device"),
        ({"context": {"device": ["a"]}}, "context.device"),
        ({"context": {"history": [[1]]}}, "context.history"),
        ({"context": {"history": [{}]}}, "context.history"),
        ({"context": {"history": [1] * 10_001}}, "context.history"),
        ({"context": {"count": "many"}}, "context.count"),
        ({"context": {"count": [1]}}, "context.count"),
        ({"context": {"user_id": 2**63}}, "context.user_id"),
        ({"context": {"user_id": "x" * 10_001}}, "context.user_id"),
        ({"context": {"user_id": "\ud800"}}, "context.user_id"),
        ({"k": 0}, "k"),
        ({"k": 1.0}, "k"),
        ({"k": True}, "k"),
        ({"head": 5}, "head"),
        ({"model": None}, "model"),
        ({"colour": 1}, "body"),
    ],
)
def test_what_is_odd_is_refused(change: dict[str, Any], where: str) -> None:
    with pytest.raises(RequestError) as refused:
        read({**ASKED, **change})
    assert (refused.value.status, refused.value.where) == (422, where)
    assert refused.value.what and refused.value.expected


@pytest.mark.parametrize("body", [b"", b"{", b'{"candidates": [{"count": NaN}]}', b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_400(body: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        read(body)
    assert refused.value.status == 400


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 400])
def test_a_number_that_no_row_can_hold_is_refused(number: str) -> None:
    with pytest.raises(RequestError, match="too large"):
        read(f'{{"candidates": [{{"count": {number}}}]}}'.encode())


def test_candidates_are_needed() -> None:
    with pytest.raises(RequestError, match="candidates is missing"):
        read({"context": {}})
