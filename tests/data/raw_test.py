"""Raw columns: one look for one value, wherever it was read."""

import json
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.errors import DataError
from recjax.data.impression_log import raw_of
from recjax.data.raw import Raw, joined, spelled, text_of


def values_of(column: Raw) -> list[Any]:
    """What a column holds, None where it is missing."""
    if column.offsets is None:
        return [None if m else v for v, m in zip(column.values.tolist(), column.missing.tolist(), strict=True)]
    bounds = column.offsets.tolist()
    rows = [column.values[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
    return [None if m else row for row, m in zip(rows, column.missing.tolist(), strict=True)]


def keys_of(column: Raw) -> list[str | None]:
    """The keys of the rows of single values."""
    codes, texts = column.keys
    return [None if m else texts[c] for c, m in zip(codes.tolist(), column.missing.tolist(), strict=True)]


COLUMNS: list[list[Any]] = [
    [1, None, 2**60, -3],
    [0.5, None, 2.0, 1e300],
    ["a", "", None, "  ", "7", "ä b"],
    [["a", "b"], [], None, ["c"]],
    [[1, 2], None, [], [2]],
    [True, None, False],
    [None, None],
]


@pytest.mark.parametrize("values", COLUMNS)
def test_a_table_and_a_request_give_the_same_column(values: list[Any]) -> None:
    one, other = raw_of(pl.Series("x", values)), Raw.of(json.loads(json.dumps(values)))
    assert values_of(one) == values_of(other)
    if one.offsets is None:
        assert keys_of(one) == keys_of(other)


@pytest.mark.parametrize("values", COLUMNS)
def test_a_column_survives_json(values: list[Any]) -> None:
    column = Raw.of(values)
    again = Raw.from_told(json.loads(json.dumps(column.told())))
    assert again.values.dtype == column.values.dtype and values_of(again) == values_of(column)


def test_a_value_is_one_key_whatever_its_type() -> None:
    assert [text_of(v) for v in (7, 7.0, "7", True, 7.5, -2.0, 1e300)] == ["7", "7", "7", "1", "7.5", "-2", "1e+300"]
    assert keys_of(Raw.of([7, "7", 7.0, "x"])) == ["7", "7", "7", "x"]
    assert keys_of(Raw.of([7, None, 7.5])) == ["7", None, "7.5"]


@given(st.lists(st.one_of(st.none(), st.lists(st.integers(0, 5), max_size=4)), min_size=1, max_size=8), st.data())
def test_taking_rows_is_indexing(values: list[Any], data: st.DataObject) -> None:
    if all(v is None for v in values):
        values = [[], *values]
    rows = data.draw(st.lists(st.integers(-1, len(values) - 1), max_size=10))
    assert values_of(Raw.of(values).take(np.array(rows, np.int64))) == [None if r < 0 else values[r] for r in rows]


def test_one_column_stands_in_for_another_where_it_is_missing() -> None:
    found = Raw.of([1, None, None]).otherwise(Raw.of(["a", "b", None]))
    assert keys_of(found) == ["1", "b", None]
    assert values_of(Raw.of([None, [1]]).otherwise(Raw.of([[2, 3], [4]]))) == [[2, 3], [1]]
    assert values_of(Raw.of([None, None]).otherwise(Raw.of([["a"], []]))) == [["a"], []]
    with pytest.raises(DataError, match="lists and single values"):
        Raw.of([1, None]).otherwise(Raw.of([[1], [2]]))
    assert values_of(joined([Raw.of([1]), Raw.of([0.5])])) == [1.0, 0.5]


def test_texts_are_cut_into_lists_words_and_ngrams() -> None:
    assert values_of(Raw.of(["a| b||c", None, "d"]).lists("|")) == [["a", "b", "c"], None, ["d"]]
    assert values_of(Raw.of([3, None]).lists("|")) == [[3], None]
    assert spelled("The Cat", 3, 3) == ["the", "#<th", "#the", "#he>", "cat", "#<ca", "#cat", "#at>"]
    assert spelled("The Cat", 0, 0) == ["the", "cat"]


def test_what_is_no_number_is_told() -> None:
    assert Raw.of(["1.5", None, "2"]).numbers("x").tolist() == [1.5, 0.0, 2.0]
    with pytest.raises(DataError, match="not a number"):
        Raw.of(["1.5", "many"]).numbers("x")
    with pytest.raises(DataError, match="lists"):
        Raw.of([[1]]).numbers("x")
    with pytest.raises(DataError, match="dict"):
        Raw.of([{"a": 1}])
