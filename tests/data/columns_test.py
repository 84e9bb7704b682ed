"""What columns mean: ids, times and positions in every form they come in, and the row of what cannot be used."""

from datetime import UTC, date, datetime

import polars as pl
import pytest

from recjax.data.columns import read_ids, read_position, read_times, type_text
from recjax.data.problems import Findings

NOON = 1_714_564_800  # 2024-05-01 12:00:00 UTC


def ids(values, *, from_text=False, optional=False, dtype=None):
    found = Findings()
    series = pl.Series("item_id", values, dtype=dtype)
    return read_ids(series, found, "f", from_text=from_text, optional=optional), found


def times(values, *, from_text=False, dtype=None):
    found = Findings()
    return read_times(pl.Series("timestamp", values, dtype=dtype), found, "f", from_text=from_text), found


@pytest.mark.parametrize(
    "values, from_text, expected",
    [
        ([3, 1], False, [3, 1]),
        ([3.0, 1.0], False, [3, 1]),
        (["3", "1"], False, ["3", "1"]),  # Parquet text stays text
        (["3", "1"], True, [3, 1]),
        (["3.0", "1"], True, [3, 1]),
        (["007", "7"], True, ["007", "7"]),  # not one item
        (["B00X", "B00Y"], True, ["B00X", "B00Y"]),
        (["9" * 25, "1"], True, ["9" * 25, "1"]),
    ],
)
def test_ids_are_whole_numbers_or_text(values, from_text, expected):
    read, found = ids(values, from_text=from_text)
    assert read is not None and not found.problems
    assert read[0].to_list() == expected
    assert read[0].dtype == (pl.Int64 if isinstance(expected[0], int) else pl.String)


def test_categories_and_unsigned_numbers_are_ids():
    assert ids(["a", "b"], dtype=pl.Categorical)[0][0].to_list() == ["a", "b"]
    assert ids([2**64 - 1, 5], dtype=pl.UInt64)[0][0].to_list() == [str(2**64 - 1), "5"]
    assert ids([5], dtype=pl.UInt64)[0][0].dtype == pl.Int64


@pytest.mark.parametrize(
    "values, from_text, row, what",
    [
        ([5, None, 3], False, 2, "missing"),
        ([5.0, float("nan"), None], False, 2, "missing in 2 rows"),
        (["a", "", None], False, 2, "missing in 2 rows"),
        (["5", "nan"], True, 2, "missing"),
        ([5, 3, -1], False, 3, "negative"),
        (["5", "-1"], True, 2, "negative"),
        ([1.5, 2.0], False, 1, "not a whole number"),
        ([True, False], False, None, "type Boolean"),
        ([[1], [2]], False, None, "type List"),
        ([date(2020, 1, 1)], False, None, "type Date"),
    ],
)
def test_what_cannot_be_an_id(values, from_text, row, what):
    read, found = ids(values, from_text=from_text)
    assert read is None
    (problem,) = found.errors
    assert what in problem.what and problem.row == row and problem.column == "item_id" and problem.expected


def test_all_that_is_wrong_with_a_column_is_found():
    _, found = ids([None, -1, 2])
    assert [p.row for p in found.errors] == [1, 2]


def test_mixed_ids_stay_text_with_a_warning():
    read, found = ids(["12", "x7", "3"], from_text=True)
    assert read[0].to_list() == ["12", "x7", "3"]
    assert not found.errors and "mixed types: 2 of 3" in found.problems[0].what and found.problems[0].row == 2


def test_optional_ids_may_be_missing():
    read, found = ids(["4", "", None], from_text=True, optional=True)
    assert read[0].to_list() == [4, None, None] and not found.problems


@pytest.mark.parametrize(
    "values, from_text, seconds, says",
    [
        ([NOON, NOON + 1], False, [NOON, NOON + 1], "seconds"),
        ([NOON * 1000 + 999], False, [NOON], "milliseconds"),
        ([NOON * 10**6], False, [NOON], "microseconds"),
        ([NOON * 10**9], False, [NOON], "nanoseconds"),
        ([NOON + 0.75], False, [NOON], "decimals"),
        ([float(NOON)], False, [NOON], "seconds"),
        ([NOON * 1000 + 0.5], False, [NOON], "milliseconds since 1970 with decimals"),
        ([str(NOON)], True, [NOON], "seconds"),
        ([str(NOON)], False, [NOON], "seconds"),
        (["1.714564800E9"], True, [NOON], "seconds"),
        ([20240501], False, [NOON - 43200], "YYYYMMDD"),
        ([date(2024, 5, 1)], False, [NOON - 43200], "dates"),
        ([datetime(2024, 5, 1, 12)], False, [NOON], "date and time"),
        ([datetime(2024, 5, 1, 12, tzinfo=UTC)], False, [NOON], "UTC"),
        (["2024-05-01"], True, [NOON - 43200], "ISO"),
        (["2024-05-01 12:00:00", "2024-05-01T12:00:01.5"], True, [NOON, NOON + 1], "taken as UTC"),
        (["2024-05-01T12:00"], False, [NOON], "ISO"),
        (["2024-05-01T12:00:00Z", "2024-05-01 14:00:00+02:00"], True, [NOON, NOON], "zones"),
        (["2024-05-01T07:00:00.250-0500"], False, [NOON], "zones"),
        (["2024-05-01 12:00:00 UTC", "2024-05-01T12:00:02"], False, [NOON, NOON + 2], "zones"),
    ],
)
def test_times_in_every_form(values, from_text, seconds, says):
    read, found = times(values, from_text=from_text)
    assert read is not None and not found.problems
    assert (read[0] // read[1]).to_list() == seconds
    assert says in read[2]


def test_a_datetime_with_a_zone_is_the_same_instant():
    zoned = pl.Series("timestamp", [datetime(2024, 5, 1, 12)]).dt.replace_time_zone("America/New_York")
    read = read_times(zoned, Findings(), "f", from_text=False)
    assert read is not None and (read[0] // read[1]).to_list() == [NOON + 4 * 3600]


def test_precision_below_a_second_is_kept_for_the_order():
    read, _ = times([NOON * 1000 + 2, NOON * 1000 + 1])
    assert read[0].to_list() == [NOON * 1000 + 2, NOON * 1000 + 1]
    read, _ = times(["2024-05-01T12:00:00.2", "2024-05-01T12:00:00.1"])
    assert read[0][0] > read[0][1]


def test_times_before_1970_round_down():
    read, found = times([-1500, NOON * 1000])
    assert (read[0] // read[1]).to_list() == [-2, NOON]
    assert "before 1980" in found.problems[0].what and found.problems[0].row == 1


@pytest.mark.parametrize(
    "values, row, what",
    [
        ([NOON, None], 2, "missing"),
        ([float(NOON), float("nan")], 2, "missing"),
        ([float(NOON), float("inf")], 2, "not finite"),
        ([NOON * 1000, NOON], 2, "mixed units"),
        (["2024-05-01", "soon"], 2, "'soon' is not understood"),
        (["2024-05-01", "2024-13-01"], 2, "not understood"),
        ([str(NOON), "2024-05-01"], 1, "not understood"),
        ([str(NOON), str(NOON), "soon"], 3, "'soon' is not understood"),
        ([[1]], None, "type List"),
        ([None, None], 1, "missing in 2 rows"),
    ],
)
def test_what_cannot_be_a_time(values, row, what):
    read, found = times(values)
    assert read is None
    assert what in found.errors[0].what and found.errors[0].row == row


@pytest.mark.parametrize("values, row", [([0, None], 2), ([0.5, 1.0], 1), (["a", "b"], None)])
def test_positions_are_whole_numbers(values, row):
    found = Findings()
    assert read_position(pl.Series("position", [3, 1]), found, "f", from_text=False).to_list() == [3, 1]
    assert read_position(pl.Series("position", ["3", "1"]), found, "f", from_text=True).to_list() == [3, 1]
    assert not found.problems
    assert read_position(pl.Series("position", values), found, "f", from_text=False) is None
    assert found.errors[0].row == row


def test_columns_of_text_files_become_numbers_when_all_values_are():
    def typed(*values):
        return type_text(pl.Series(values)).to_list()

    assert typed("1", "2", "") == [1, 2, None]
    assert typed("1", "2.5", "NaN") == [1.0, 2.5, None]
    assert typed("1", "two") == ["1", "two"]
    assert typed("007", "008") == [7.0, 8.0]
    assert typed("", "") == ["", ""]
