"""Any bytes are a question or a refusal with a 4xx and a reason; well-formed questions come through unchanged."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.errors import RequestError
from recjax.serve.request import (
    MAX_HISTORY,
    MAX_TEXT,
    SCHEMA,
    SEARCH_SCHEMA,
    Question,
    SearchQuestion,
    parse,
    parse_search,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
BODIES = st.fixed_dictionaries(
    {"user_history": JSON | st.lists(st.integers() | st.text(), max_size=5)},
    optional={"k": JSON, "exclude_seen": JSON, "filter": JSON, "model": JSON, "other": JSON},
)
QUERIES = st.fixed_dictionaries(
    {"query": JSON | st.text()}, optional={"k": JSON, "filter": JSON, "model": JSON, "other": JSON}
)
FILTERS = st.dictionaries(st.text(max_size=5), st.lists(st.text(max_size=5), min_size=1, max_size=3), max_size=3)


@given(st.binary() | (JSON | BODIES).map(lambda v: json.dumps(v).encode()))
def test_any_body_is_a_question_or_a_4xx(body):
    try:
        question = parse(body)
    except RequestError as error:
        assert error.status in (400, 422) and error.what
        json.dumps(str(error)).encode("utf-8")
    else:
        assert isinstance(question, Question)
        assert all(type(item) in (int, str) for item in question.user_history)
        assert type(question.k) is int and type(question.exclude_seen) is bool and type(question.model) is str


@given(st.binary() | (JSON | QUERIES).map(lambda v: json.dumps(v).encode()))
def test_any_body_is_a_query_or_a_4xx(body):
    try:
        question = parse_search(body)
    except RequestError as error:
        assert error.status in (400, 422) and error.what
        json.dumps(str(error)).encode("utf-8")
    else:
        assert isinstance(question, SearchQuestion)
        question.query.encode("utf-8")
        assert all(values and all(type(v) is str for v in values) for values in question.filter.values())


@given(st.text(st.characters(codec="utf-8")), st.integers(), FILTERS, st.text())
def test_a_well_formed_query_comes_through(query, k, wanted, model):
    body = {"query": query, "k": k, "filter": wanted, "model": model}
    assert parse_search(json.dumps(body).encode()) == SearchQuestion(**body)
    assert parse_search(json.dumps({"query": query}).encode()) == SearchQuestion(query=query)


def test_one_value_of_a_filter_is_a_list_of_one():
    for parsed in (
        parse(b'{"user_history": [1], "filter": {"a": "b"}}'),
        parse_search(b'{"query": "", "filter": {"a": "b"}}'),
    ):
        assert parsed.filter == {"a": ["b"]}


@given(st.lists(st.integers() | st.text(), max_size=6), st.integers(), st.booleans(), FILTERS, st.text())
def test_a_well_formed_question_comes_through(history, k, exclude_seen, wanted, model):
    body = {"user_history": history, "k": k, "exclude_seen": exclude_seen, "filter": wanted, "model": model}
    assert parse(json.dumps(body).encode()) == Question(**body)
    assert parse(json.dumps({"user_history": history}).encode()) == Question(user_history=history)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not JSON"),
        (b"\xff\xfe\xff", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"user_history": [NaN]}', 400, "NaN is not a JSON number"),
        (b'{"user_history": [1], "k": Infinity}', 400, "Infinity is not a JSON number"),
        (b'{"user_history": [' + b"9" * 5000 + b"]}", 400, "not JSON"),
        (b"[]", 422, "the body is a list"),
        (b"{}", 422, "user_history is missing"),
        (b'{"user_history": "1"}', 422, "user_history is text"),
        (b'{"user_history": [1, 2.0]}', 422, r"user_history\[1\] is a number"),
        (b'{"user_history": [true]}', 422, r"user_history\[0\] is true or false"),
        (b'{"user_history": [null]}', 422, r"user_history\[0\] is null"),
        (b'{"user_history": [1], "k": 2.5}', 422, "k is a number"),
        (b'{"user_history": [1], "k": true}', 422, "k is true or false"),
        (b'{"user_history": [1], "exclude_seen": 1}', 422, "exclude_seen is a number"),
        (b'{"user_history": [1], "model": null}', 422, "model is null"),
        (b'{"user_history": [1], "history_time": []}', 422, "does not go with"),
        (b'{"user_history": [1], "history_time": null}', 422, "does not go with"),
        (b'{"user_history": [1], "history_time": [1.5]}', 422, r"history_time\[0\] is a number"),
        (b'{"user_history": [1], "history_time": [9999999999999999999]}', 422, r"history_time\[0\]"),
        (b'{"user_history": [1], "time": "now"}', 422, "time is text"),
        (b'{"user_history": [1], "filter": "red"}', 422, "filter is text"),
        (b'{"user_history": [1], "filter": {"a": 3}}', 422, r'filter."a" is a number'),
        (b'{"user_history": [1], "filter": {"a": []}}', 422, r'filter."a" is a list'),
        (b'{"user_history": [1], "filter": {"a": ["b", 1]}}', 422, r'filter."a" is a list'),
        (b'{"user_history": [1], "K": 3}', 422, 'unknown field "K"'),
        (b'{"user_history": [1], "\\ud800": 3}', 422, "unknown field"),
        (json.dumps({"user_history": [1] * (MAX_HISTORY + 1)}).encode(), 422, "10001 items"),
    ],
)
def test_refusals_say_why(body, status, message):
    with pytest.raises(RequestError, match=message) as caught:
        parse(body)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{}", "query is missing"),
        (b'{"query": 3}', "query is a number"),
        (b'{"query": null}', "query is null"),
        (b'{"query": "\\ud800"}', "query is text"),
        (b'{"query": "a", "user_history": []}', 'unknown field "user_history"'),
        (b'{"query": "a", "filter": []}', "filter is a list"),
        (json.dumps({"query": "a" * (MAX_TEXT + 1)}).encode(), "10001 characters"),
    ],
)
def test_refusals_of_queries_say_why(body, message):
    with pytest.raises(RequestError, match=message) as caught:
        parse_search(body)
    assert caught.value.status == 422


def test_the_shown_schemas_name_the_fields_and_defaults_of_a_question():
    assert set(SCHEMA["properties"]) == set(Question.__dataclass_fields__)
    assert set(SEARCH_SCHEMA["properties"]) == set(SearchQuestion.__dataclass_fields__)
    assert SEARCH_SCHEMA["properties"]["k"]["default"] == SearchQuestion.__dataclass_fields__["k"].default
    for name in ("k", "exclude_seen"):
        assert SCHEMA["properties"][name]["default"] == Question.__dataclass_fields__[name].default
