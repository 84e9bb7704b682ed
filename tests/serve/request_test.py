"""Any bytes are a question or a refusal with a 4xx and a reason; well-formed questions come through unchanged."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.errors import RequestError
from recjax.serve.request import MAX_HISTORY, SCHEMA, Question, parse

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
BODIES = st.fixed_dictionaries(
    {"user_history": JSON | st.lists(st.integers() | st.text(), max_size=5)},
    optional={"k": JSON, "exclude_seen": JSON, "model": JSON, "other": JSON},
)


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


@given(st.lists(st.integers() | st.text(), max_size=6), st.integers(), st.booleans(), st.text())
def test_a_well_formed_question_comes_through(history, k, exclude_seen, model):
    body = {"user_history": history, "k": k, "exclude_seen": exclude_seen, "model": model}
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
        (b'{"user_history": [1], "K": 3}', 422, 'unknown field "K"'),
        (b'{"user_history": [1], "\\ud800": 3}', 422, "unknown field"),
        (json.dumps({"user_history": [1] * (MAX_HISTORY + 1)}).encode(), 422, "10001 items"),
    ],
)
def test_refusals_say_why(body, status, message):
    with pytest.raises(RequestError, match=message) as caught:
        parse(body)
    assert caught.value.status == status


def test_the_shown_schema_names_the_fields_and_defaults_of_a_question():
    assert set(SCHEMA["properties"]) == set(Question.__dataclass_fields__)
    for name in ("k", "exclude_seen"):
        assert SCHEMA["properties"][name]["default"] == Question.__dataclass_fields__[name].default
