"""Gives the columns of a table their meaning: ids, times, positions, and plain values of text files.

Every function takes a column as it came from the file and returns it in the one form the rest of recjax knows, or
None after adding a problem with the first offending row. Nothing is guessed silently: how a column was understood
comes back as a phrase for the report. Negative integer ids are refused, because in practice they stand for "missing".
"""

from __future__ import annotations

import polars as pl

from recjax.data.problems import Findings, rows

MISSING = ("", "nan", "NaN", "NAN", "<NA>", "N/A", "None", "null", "NULL", "\\N")
_INTEGER = r"^-?(0|[1-9]\d*)$"
_PER_SECOND = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_PLAUSIBLE = (315_532_800, 4_102_444_800)  # 1980 to 2100, in seconds
_TIME_EXPECTED = "seconds or milliseconds since 1970, a date, or ISO text such as 2024-05-01T12:30:00Z"


def _first(mask: pl.Series) -> int:
    """1-based row of the first true value."""
    return int(mask.arg_true()[0]) + 1


def _flag(mask: pl.Series, found: Findings, file: str, column: str, what: str, **more: str) -> bool:
    """Add an error when any row of the mask is true."""
    count = int(mask.sum())
    if not count:
        return False
    found.error(file, f"{what} in {rows(count)}", row=_first(mask), column=column, **more)
    return True


def _is_missing(values: pl.Series) -> pl.Series:
    if values.dtype.is_float():
        return (values.is_null() | values.is_nan()).fill_null(True)
    if values.dtype == pl.String:
        return values.is_null() | values.is_in(MISSING)
    return values.is_null()


def _null_missing(values: pl.Series) -> pl.Series:
    missing = _is_missing(values)
    return pl.select(pl.when(~missing).then(values)).to_series().alias(values.name) if missing.any() else values


def read_ids(
    values: pl.Series, found: Findings, file: str, *, from_text: bool, optional: bool = False
) -> tuple[pl.Series, str] | None:
    """Ids as Int64 (whole numbers) or String, and how they were understood; `optional` ones may be missing.

    Text files hold whole-number ids when every value is a plain integer ("7", not "007"); otherwise their ids are
    text. Parquet text stays text.
    """
    column, count = values.name, len(found.errors)
    more = {"expected": "whole numbers or text", "mend": "drop these rows, or give them their ids"}
    if values.dtype in (pl.Categorical, pl.Enum):
        values = values.cast(pl.String)
    if values.dtype == pl.Null:
        values = values.cast(pl.Int64)
    if not (values.dtype.is_integer() or values.dtype.is_float() or values.dtype == pl.String):
        found.error(file, f"an id cannot be of type {values.dtype}", column=column, **more)
        return None
    if not optional:
        _flag(_is_missing(values), found, file, column, "the id is missing", **more)
    if values.dtype != pl.String or from_text:
        values = _null_missing(values)
    if values.dtype == pl.String and from_text:
        values = _type_ids(values, found, file)
    meaning = "id, whole numbers"
    if values.dtype.is_float():
        more["mend"] = "write the ids as whole numbers or text"
        fractional = (values != values.round()) | (values.abs() > 2.0**53)
        _flag(fractional, found, file, column, "the id is not a whole number", **more)
        meaning = "id, whole numbers (written with decimals)"
    if values.dtype == pl.String:
        return None if len(found.errors) > count else (values, "id, text")
    if values.dtype == pl.UInt64 and (values.max() or 0) >= 2**63:  # type: ignore[operator]
        return None if len(found.errors) > count else (values.cast(pl.String), "id, 64-bit numbers kept as text")
    more["mend"] = "drop these rows if they mean missing; else renumber, or write the ids as text in Parquet"
    _flag(values < 0, found, file, column, "the id is negative", expected="ids from 0 upwards", mend=more["mend"])
    return None if len(found.errors) > count else (values.cast(pl.Int64), meaning)


def _type_ids(values: pl.Series, found: Findings, file: str) -> pl.Series:
    """Ids of a text file as numbers when all are; a mixture stays text, with a warning."""
    longest = values.str.len_bytes().max() or 0
    if longest < 19 and values.str.contains(_INTEGER).all():  # type: ignore[operator]
        return values.cast(pl.Int64)
    if longest < 19 and values.str.contains(r"^-?(0|[1-9]\d*)(\.0+)?$").all():  # type: ignore[operator]
        return values.cast(pl.Float64)
    digits = values.str.contains(r"^\d+$")
    if digits.any() and not digits.all():
        found.warn(
            file,
            f"mixed types: {int(digits.sum()):,} of {len(values):,} ids are whole numbers, the others text",
            row=_first(~digits),
            column=values.name,
            expected="ids of one kind",
            mend="nothing to do if ids may look like this (all are taken as text); else mend the odd rows",
        )
    return values


def read_present(values: pl.Series, found: Findings, file: str) -> None:
    """Texts of queries and labels of judgments: of any kind, but never missing; a text is text."""
    more = {"expected": "a value in every row", "mend": "drop these rows, or fill them in"}
    missing = values.str.strip_chars() == "" if values.dtype == pl.String else values.is_null()
    _flag(missing.fill_null(True), found, file, values.name, f"the {values.name} is missing", **more)
    if values.name == "text" and values.dtype != pl.String:
        found.error(file, f"a text cannot be of type {values.dtype}", column="text", expected="text")


def read_position(values: pl.Series, found: Findings, file: str, *, from_text: bool) -> pl.Series | None:
    """Positions as Int64: any whole numbers that grow with time within a user."""
    values = type_text(values) if from_text else values
    more = {"expected": "whole numbers, oldest first within a user", "mend": "number each user's events 0, 1, 2, ..."}
    if not values.dtype.is_numeric():
        found.error(file, f"a position cannot be of type {values.dtype}", column=values.name, **more)
        return None
    if _flag(_is_missing(values), found, file, values.name, "the position is missing", **more):
        return None
    whole = values != values.round() if values.dtype.is_float() else values < values
    if _flag(whole, found, file, values.name, "the position is not a whole number", **more):
        return None
    return values.cast(pl.Int64)


def read_times(values: pl.Series, found: Findings, file: str, *, from_text: bool) -> tuple[pl.Series, int, str] | None:
    """Times as Int64 in their own precision, units per second, and how they were understood.

    Dividing by the units (rounding down) gives seconds since 1970 in UTC; the finer value orders events. Numbers are
    seconds, milliseconds, microseconds or nanoseconds by their size; times without a zone are taken as UTC.
    """
    column, count = values.name, len(found.errors)
    if from_text or values.dtype == pl.String:
        values = type_text(values.cast(pl.String))
    more = {"expected": _TIME_EXPECTED, "mend": "drop these rows, or give them their times"}
    _flag(_is_missing(values), found, file, column, "the time is missing", **more)
    values = _null_missing(values)
    read = None
    if values.null_count() == len(values):
        return None
    if values.dtype.is_float():
        if not _flag(values.is_infinite(), found, file, column, "the time is not finite", **more):
            read = _read_decimals(values, found, file)
    elif values.dtype.is_integer():
        read = _read_numbers(values.cast(pl.Int64), found, file)
    elif values.dtype == pl.Date:
        read = values.cast(pl.Datetime("us")).cast(pl.Int64), 10**6, "time, dates (midnight UTC)"
    elif isinstance(values.dtype, pl.Datetime):
        zone = values.dtype.time_zone
        read = values.cast(pl.Datetime("us", zone)).cast(pl.Int64), 10**6, f"time, date and time in {zone or 'UTC'}"
    elif values.dtype == pl.String:
        read = _read_iso(values, found, file)
    else:
        found.error(file, f"a time cannot be of type {values.dtype}", column=column, expected=_TIME_EXPECTED)
    if read is None or len(found.errors) > count:
        return None
    odd = ~(read[0] // read[1]).is_between(*_PLAUSIBLE)
    if odd.any():
        what = f"{int(odd.sum()):,} times lie before 1980 or after 2100; they are kept"
        found.warn(file, what, row=_first(odd), column=column, mend="look whether the unit is right")
    return read


def _unit(values: pl.Series) -> str:
    size = values.abs().max()
    bounds = (("seconds", 10**11), ("milliseconds", 10**14), ("microseconds", 10**17))
    return next((unit for unit, bound in bounds if size < bound), "nanoseconds")  # type: ignore[operator]


def _read_decimals(values: pl.Series, found: Findings, file: str) -> tuple[pl.Series, int, str] | None:
    if (values == values.round()).all():
        return _read_numbers(values.cast(pl.Int64), found, file)
    unit = _unit(values)
    micro = (values * (10**6 / _PER_SECOND[unit])).round().cast(pl.Int64)
    return micro, 10**6, f"time, {unit} since 1970 with decimals (by magnitude)"


def _read_numbers(values: pl.Series, found: Findings, file: str) -> tuple[pl.Series, int, str] | None:
    if values.is_between(19000101, 21001231).all() and (values // 100 % 100).is_between(1, 12).all():
        days = values.cast(pl.String).str.to_date("%Y%m%d", strict=False)
        if days.null_count() == values.null_count():
            return days.cast(pl.Datetime("us")).cast(pl.Int64), 10**6, "time, dates as YYYYMMDD (midnight UTC)"
    unit = _unit(values)
    per_second = _PER_SECOND[unit]
    if unit != "seconds":  # such a value would lie within days of 1970 if it were of the large unit
        small = values.is_between(10**8, 10**11 - 1)
        more = {"expected": f"{unit} throughout", "mend": "write all times in one unit"}
        if _flag(small, found, file, values.name, f"mixed units: most are {unit}, but this looks like seconds", **more):
            return None
    return values, per_second, f"time, {unit} since 1970 (by magnitude)"


def _read_iso(values: pl.Series, found: Findings, file: str) -> tuple[pl.Series, int, str] | None:
    text = values.str.strip_chars().str.replace(r"^(\d{4}-\d{2}-\d{2}) ", "${1}T").str.replace(r"(Z|z| UTC)$", "+00:00")
    text = text.str.replace(r"([+-]\d{2}):?(\d{2})$", "${1}:${2}")
    zoned = text.str.contains(r"T.*[+-]\d{2}:\d{2}$")
    # the zone is taken off and subtracted, because one column may mix zones
    zone, local = pl.col("text").str.tail(6), pl.when(pl.col("zoned")).then(pl.col("text").str.head(-6))
    local = local.otherwise(pl.col("text"))
    minutes = zone.str.slice(1, 2).cast(pl.Int64, strict=False) * 60 + zone.str.tail(2).cast(pl.Int64, strict=False)
    minutes = minutes * pl.when(zone.str.head(1) == "-").then(-1).otherwise(1)
    formats = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y/%m/%d %H:%M:%S%.f")
    parse = [local.str.to_datetime(f, time_unit="us", strict=False) for f in formats]
    parse += [local.str.to_date(f, strict=False).cast(pl.Datetime("us")) for f in ("%Y-%m-%d", "%Y/%m/%d")]
    offset = pl.when(pl.col("zoned")).then(minutes).otherwise(0) * 60 * 10**6
    frame = pl.DataFrame({"text": text, "zoned": zoned})
    micro = frame.select(pl.coalesce(parse).cast(pl.Int64) - offset).to_series()
    bad = micro.is_null() & values.is_not_null()
    number = values.str.contains(r"^-?\d+(\.\d+)?$").fill_null(False)
    if 2 * number.sum() > values.is_not_null().sum():  # a column of numbers with a few other things in it
        bad = ~number & values.is_not_null()
    if bad.any():
        value = str(values[_first(bad) - 1])[:40]
        more = {"expected": _TIME_EXPECTED, "mend": "write all times in one of these forms"}
        _flag(bad, found, file, values.name, f"{value!r} is not understood as a time", **more)
        return None
    return micro, 10**6, f"time, ISO text {'with their zones' if zoned.any() else 'taken as UTC'}"


def type_text(values: pl.Series) -> pl.Series:
    """A text column as Int64 or Float64 when every non-empty value is such a number, else as it is."""
    if values.dtype != pl.String:
        return values
    filled = _null_missing(values)
    if filled.null_count() == len(values):
        return values
    for dtype, pattern in ((pl.Int64, r"^-?(0|[1-9]\d{0,17})$"), (pl.Float64, None)):
        if pattern is None or filled.str.contains(pattern).all():
            numbers = filled.cast(dtype, strict=False)
            if numbers.null_count() == filled.null_count():
                return numbers
    return values
