"""Gives the columns of a table their meaning: ids, times, positions, and plain values of text files.

Every function takes a column as it came from the file and returns it in the one form the rest of recjax knows, or
None after adding a problem with the first offending row. Nothing is guessed silently: how a column was understood
comes back as a phrase for the report. Negative integer ids are refused, because in practice they stand for "missing".
"""

from __future__ import annotations

import polars as pl

from recjax.data.problems import Findings

MISSING = ("", "nan", "NaN", "NAN", "<NA>", "N/A", "None", "null", "NULL", "\\N")
_INTEGER = r"^-?(0|[1-9]\d{0,18})$"
_PER_SECOND = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_TIME_EXPECTED = "seconds or milliseconds since 1970, a date, or ISO text such as 2024-05-01T12:30:00Z"


def _first(mask: pl.Series) -> int:
    """1-based row of the first true value."""
    return int(mask.arg_true()[0]) + 1


def _flag(mask: pl.Series, found: Findings, file: str, column: str, what: str, **more: str) -> bool:
    """Add an error when any row of the mask is true."""
    count = int(mask.sum())
    if not count:
        return False
    rows = "1 row" if count == 1 else f"{count:,} rows"
    found.error(file, f"{what} in {rows}", row=_first(mask), column=column, **more)
    return True


def _is_missing(values: pl.Series) -> pl.Series:
    if values.dtype.is_float():
        return (values.is_null() | values.is_nan()).fill_null(True)
    if values.dtype == pl.String:
        return values.is_null() | values.is_in(MISSING)
    return values.is_null()


def _null_missing(values: pl.Series) -> pl.Series:
    return pl.select(pl.when(~_is_missing(values)).then(values)).to_series().alias(values.name)


def read_ids(
    values: pl.Series, found: Findings, file: str, *, from_text: bool, optional: bool = False
) -> tuple[pl.Series, str] | None:
    """Ids as Int64 (whole numbers) or String, and how they were understood; `optional` ones may be missing.

    Text files hold whole-number ids when every value is a plain integer ("7", not "007"); otherwise their ids are
    text. Parquet text stays text.
    """
    column = values.name
    expected = "whole numbers or text"
    if values.dtype in (pl.Categorical, pl.Enum):
        values = values.cast(pl.String)
    if not (values.dtype.is_integer() or values.dtype.is_float() or values.dtype == pl.String):
        found.error(file, f"an id cannot be of type {values.dtype}", column=column, expected=expected)
        return None
    mend = "drop these rows, or give them their ids"
    if optional:
        values = _null_missing(values)
    elif _flag(_is_missing(values), found, file, column, "the id is missing", expected=expected, mend=mend):
        return None
    meaning = "id, whole numbers"
    if values.dtype == pl.String and from_text:
        whole = values.str.contains(_INTEGER)
        if whole.all():
            longest = values.str.len_bytes().max() or 0
            values = values.cast(pl.Int64) if longest < 19 else values  # type: ignore[operator]
        elif values.str.contains(r"^-?\d+\.0+$").all():
            values = values.cast(pl.Float64)
        elif whole.any():
            share = f"{int(whole.sum()):,} of {len(values):,} values are whole numbers, the others text"
            found.warn(
                file,
                f"mixed types: {share}",
                row=_first(~whole),
                column=column,
                expected="ids of one kind",
                mend="nothing to do if ids may look like this (all are taken as text); else mend the odd rows",
            )
    if values.dtype.is_float():
        mend = "write the ids as whole numbers or text"
        fractional = (values != values.round()) | (values.abs() > 2.0**53)
        if _flag(fractional, found, file, column, "the id is not a whole number", expected=expected, mend=mend):
            return None
        meaning = "id, whole numbers (written with decimals)"
    if values.dtype == pl.String:
        return values, "id, text"
    if values.dtype == pl.UInt64 and (values.max() or 0) >= 2**63:  # type: ignore[operator]
        return values.cast(pl.String), "id, unsigned 64-bit numbers kept as text"
    mend = "drop these rows if they mean missing; else renumber, or write the ids as text in Parquet"
    if _flag(values < 0, found, file, column, "the id is negative", expected="ids from 0 upwards", mend=mend):
        return None
    return values.cast(pl.Int64), meaning


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
    column = values.name
    if from_text or values.dtype == pl.String:
        values = type_text(values.cast(pl.String))
    more = {"expected": _TIME_EXPECTED, "mend": "drop these rows, or give them their times"}
    if _flag(_is_missing(values), found, file, column, "the time is missing", **more):
        return None
    if values.dtype.is_float():
        if _flag(values.is_infinite(), found, file, column, "the time is not finite", **more):
            return None
        if (values != values.round()).any():
            unit, per_second = _unit(values), _PER_SECOND[_unit(values)]
            micro = (values * (10**6 / per_second)).round().cast(pl.Int64)
            return micro, 10**6, f"time, {unit} since 1970 with decimals (by magnitude)"
        values = values.cast(pl.Int64)
    if values.dtype.is_integer():
        return _read_numbers(values.cast(pl.Int64), found, file, column)
    if values.dtype == pl.Date:
        return values.cast(pl.Datetime("us")).cast(pl.Int64), 10**6, "time, dates (midnight UTC)"
    if isinstance(values.dtype, pl.Datetime):
        zone = values.dtype.time_zone
        return values.cast(pl.Datetime("us", zone)).cast(pl.Int64), 10**6, f"time, date and time in {zone or 'UTC'}"
    if values.dtype == pl.String:
        return _read_iso(values, found, file, column)
    found.error(file, f"a time cannot be of type {values.dtype}", column=column, expected=_TIME_EXPECTED)
    return None


def _unit(values: pl.Series) -> str:
    size = values.abs().max()
    bounds = (("seconds", 10**11), ("milliseconds", 10**14), ("microseconds", 10**17))
    return next((unit for unit, bound in bounds if size < bound), "nanoseconds")  # type: ignore[operator]


def _read_numbers(values: pl.Series, found: Findings, file: str, column: str) -> tuple[pl.Series, int, str] | None:
    if values.is_between(19000101, 21001231).all() and (values // 100 % 100).is_between(1, 12).all():
        days = values.cast(pl.String).str.to_date("%Y%m%d", strict=False)
        if days.null_count() == 0:
            return days.cast(pl.Datetime("us")).cast(pl.Int64), 10**6, "time, dates as YYYYMMDD (midnight UTC)"
    unit = _unit(values)
    per_second = _PER_SECOND[unit]
    if unit != "seconds":  # such a value would lie within days of 1970 if it were of the large unit
        small = values.is_between(10**8, 10**11 - 1)
        more = {"expected": f"{unit} throughout", "mend": "write all times in one unit"}
        if _flag(small, found, file, column, f"mixed units: {unit} and seconds, the latter", **more):
            return None
    return values, per_second, f"time, {unit} since 1970 (by magnitude)"


def _read_iso(values: pl.Series, found: Findings, file: str, column: str) -> tuple[pl.Series, int, str] | None:
    text = values.str.strip_chars().str.replace(r"^(\d{4}-\d{2}-\d{2}) ", "${1}T").str.replace(r"(Z|z| UTC)$", "+00:00")
    text = text.str.replace(r"([+-]\d{2}):?(\d{2})$", "${1}:${2}")
    zoned = text.str.contains(r"T.*[+-]\d{2}:\d{2}$")
    has_zone = bool(zoned.any())
    # the zone is taken off and subtracted, because one column may mix zones
    sign = pl.when(pl.col("z").str.head(1) == "-").then(-1).otherwise(1)
    offset = sign * (pl.col("z").str.slice(1, 2).cast(pl.Int64) * 60 + pl.col("z").str.slice(4, 2).cast(pl.Int64))
    local = pl.when(pl.col("zoned")).then(pl.col("text").str.head(-6)).otherwise(pl.col("text"))  # type: ignore[arg-type]
    formats = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y/%m/%d %H:%M:%S%.f")
    parse = [local.str.to_datetime(f, time_unit="us", strict=False) for f in formats]
    parse += [local.str.to_date(f, strict=False).cast(pl.Datetime("us")) for f in ("%Y-%m-%d", "%Y/%m/%d")]
    frame = pl.DataFrame({"text": text, "zoned": zoned}).with_columns(
        z=pl.when(pl.col("zoned")).then(pl.col("text").str.tail(6)).otherwise(pl.lit("+00:00"))
    )
    micro = frame.select(pl.coalesce(parse).cast(pl.Int64) - offset * 60 * 10**6).to_series()
    bad = micro.is_null()
    if bad.any():
        value = values[_first(bad) - 1]
        more = {"expected": _TIME_EXPECTED, "mend": "write all times in one of these forms"}
        _flag(bad, found, file, column, f"not understood as a time ({str(value)[:40]!r})", **more)
        return None
    zone = "with their zones" if has_zone else "taken as UTC"
    return micro, 10**6, f"time, ISO text {zone}"


def type_text(values: pl.Series) -> pl.Series:
    """A text column as Int64 or Float64 when every non-empty value is such a number, else as it is."""
    if values.dtype != pl.String or values.null_count() == len(values):
        return values
    filled = _null_missing(values)
    for dtype, pattern in ((pl.Int64, r"^-?(0|[1-9]\d{0,17})$"), (pl.Float64, None)):
        if pattern is None or filled.str.contains(pattern).all():
            numbers = filled.cast(dtype, strict=False)
            if numbers.null_count() == filled.null_count():
                return numbers
    return values
