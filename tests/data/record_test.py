import numpy as np
import pytest

from recjax.data.record import Column, Field, Runs, decode, encode, spans

SCHEMA = (
    Field(name="user_index", dtype="int64", rank=0),
    Field(name="items", dtype="int32", rank=1),
    Field(name="score", dtype="float32", rank=0),
    Field(name="times", dtype="int64", rank=1),
)


def random_columns(rng: np.random.Generator, count: int) -> dict[str, Column]:
    def ragged(dtype: str) -> Column:
        offsets = np.concatenate([[0], rng.integers(0, 5, count).cumsum()])
        return Column(rng.integers(-(2**31), 2**31, offsets[-1]).astype(dtype), offsets)

    return {
        "user_index": Column(rng.integers(-(2**62), 2**62, count)),
        "items": ragged("int32"),
        "score": Column(rng.normal(size=count).astype(np.float32)),
        "times": ragged("int64"),
    }


@pytest.mark.parametrize("count", [0, 1, 2, 37])
def test_decoding_gives_back_what_was_encoded(count: int) -> None:
    columns = random_columns(np.random.default_rng(count), count)
    back = decode(encode(columns, SCHEMA), SCHEMA)
    for field in SCHEMA:
        assert back[field.name].values.dtype == np.dtype(field.dtype)
        assert len(back[field.name]) == count
        for i in range(count):
            np.testing.assert_array_equal(back[field.name][i], columns[field.name][i])


def test_a_record_has_the_documented_bytes() -> None:
    columns = {
        "user_index": Column(np.array([7])),
        "items": Column(np.array([5, 6], np.int32), np.array([0, 2])),
        "score": Column(np.array([1.5], np.float32)),
        "times": Column(np.array([-1]), np.array([0, 1])),
    }
    expected = np.array([2, 1], "<i4").tobytes()  # the lengths of the two lists
    expected += np.array([7], "<i8").tobytes() + np.array([5, 6], "<i4").tobytes()
    expected += np.array([1.5], "<f4").tobytes() + np.array([-1], "<i8").tobytes()
    assert [*encode(columns, SCHEMA)] == [expected]


def test_columns_may_begin_in_the_middle_of_their_values() -> None:
    columns = random_columns(np.random.default_rng(0), 10)
    part = {
        name: Column(c.values[4:8]) if c.offsets is None else Column(c.values, c.offsets[4:9])
        for name, c in columns.items()
    }
    back = decode(encode(part, SCHEMA), SCHEMA)
    for name in columns:
        for i in range(4):
            np.testing.assert_array_equal(back[name][i], columns[name][i + 4])


def test_runs_are_lists_that_may_overlap_and_have_the_records_of_a_copy() -> None:
    rng, values = np.random.default_rng(4), np.arange(40)
    starts, lengths = rng.integers(0, 30, 12), rng.integers(0, 10, 12)
    runs = Runs(values, starts, lengths)
    copied = Column(
        np.concatenate([values[s : s + n] for s, n in zip(starts, lengths, strict=True)]),
        np.concatenate([[0], lengths.cumsum()]),
    )
    schema = (Field(name="items", dtype="int64", rank=1),)
    for start, stop in ((0, 12), (3, 7), (5, 5)):
        some, same = runs.part(start, stop), copied.part(start, stop)
        assert [some[i].tolist() for i in range(len(some))] == [same[i].tolist() for i in range(len(same))]
        assert some.joined().values.tolist() == same.joined().values.tolist()
        assert some.joined().offsets.tolist() == same.joined().offsets.tolist()
        assert [*encode({"items": some}, schema)] == [*encode({"items": same}, schema)]


@pytest.mark.parametrize("cut", [1, 4, 8, 1000])
def test_a_shortened_or_lengthened_record_is_refused(cut: int) -> None:
    whole = [*encode(random_columns(np.random.default_rng(1), 3), SCHEMA)]
    for records in ([whole[0], whole[1][:-cut], whole[2]], [whole[0] + b"\0" * cut]):
        with pytest.raises(ValueError, match="record"):
            decode(records, SCHEMA)


def test_only_whole_words_can_be_stored() -> None:
    for bad in ({"dtype": "int16", "rank": 1}, {"dtype": "int32", "rank": 2}):
        with pytest.raises(ValueError, match="cannot be stored"):
            Field(name="x", **bad)


def test_spans_are_ranges_one_after_the_other() -> None:
    rng = np.random.default_rng(2)
    starts, lengths = rng.integers(0, 100, 50), rng.integers(0, 4, 50)
    expected = [k for s, n in zip(starts, lengths, strict=True) for k in range(s, s + n)]
    assert spans(starts, lengths).tolist() == expected
    assert spans(np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == []
