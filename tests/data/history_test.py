import numpy as np
import polars as pl
import pytest

from recjax.core.errors import DataError
from recjax.data.history import (
    cutoff_times,
    events_before,
    given,
    global_time,
    histories,
    leave_last,
    leave_one_out,
)


def random_log(seed: int, *, events: int = 200, users: int = 25, ties: int = 40) -> pl.DataFrame:
    """Events in random file order, with many equal times; `order` as the reader gives it."""
    rng = np.random.default_rng(seed)
    log = pl.DataFrame(
        {
            "user_id": [f"u{k}" for k in rng.integers(0, users, events)],
            "item_id": rng.integers(0, 60, events) * 7,
            "timestamp": rng.integers(0, ties, events) * 100,
        }
    )
    log = log.sort(["user_id", "timestamp"], maintain_order=True)
    return log.with_columns(order=pl.int_range(pl.len()).over("user_id"))


def by_user(log: pl.DataFrame) -> dict[str, list[tuple[int, int]]]:
    """user -> [(item, time)], from the rows as they are in the file."""
    found: dict[str, list[tuple[int, int]]] = {}
    for user, item, time in log.select("user_id", "item_id", "timestamp").iter_rows():
        found.setdefault(user, []).append((item, time))
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("min_events", [1, 7])
def test_histories_hold_every_event_of_each_user_in_order(seed: int, min_events: int) -> None:
    log = random_log(seed)
    expected = {u: e for u, e in sorted(by_user(log).items()) if len(e) >= min_events}
    found = histories(log.sample(fraction=1, shuffle=True, seed=seed), min_events=min_events)
    assert found.user_ids.to_list() == list(expected)
    assert found.times is not None
    for number, events in enumerate(expected.values()):
        mine = slice(found.offsets[number], found.offsets[number + 1])
        ids = found.item_ids.gather(found.items[mine]).to_list()
        assert list(zip(ids, found.times[mine].tolist(), strict=True)) == events
    assert found.users_dropped == len(by_user(log)) - len(expected)
    assert found.events_dropped + len(found.items) == log.height


def test_times_are_optional_and_text_ids_too() -> None:
    found = histories(pl.DataFrame({"user_id": [2, 1, 1], "item_id": ["b", "b", "a"], "order": [0, 1, 0]}))
    assert found.times is None
    assert found.user_ids.to_list() == [1, 2]
    assert found.item_ids.gather(found.items).to_list() == ["a", "b", "b"]


def test_a_log_without_users_with_enough_events_is_an_error() -> None:
    with pytest.raises(DataError, match="no user has enough events"):
        histories(random_log(0), min_events=10_000)


@pytest.mark.parametrize("seed", range(5))
def test_leave_one_out_is_the_last_two_events(seed: int) -> None:
    log = histories(random_log(seed, events=80))
    cuts = leave_one_out(log.lengths)
    for user, length in enumerate(log.lengths):
        events = list(range(length))
        if length < 3:
            expected = (events, None, None)
        else:
            expected = (events[:-2], events[-2], events[-1])
        valid, test = (None if at < 0 else at for at in (cuts.valid_at[user], cuts.test_at[user]))
        assert (events[: cuts.train_end[user]], valid, test) == expected


@pytest.mark.parametrize("held_out", [1, 2, 10])
def test_leave_last_holds_out_the_last_events_and_one_before(held_out: int) -> None:
    cuts = leave_last(np.arange(1, 30), held_out)
    for length, train, valid, test, valid_end, test_end in zip(
        range(1, 30), cuts.train_end, cuts.valid_at, cuts.test_at, cuts.valid_end, cuts.test_end, strict=True
    ):
        if length < held_out + 2:
            assert (train, valid, test) == (length, -1, -1)
            continue
        parts = [range(train), range(valid, valid_end), range(test, test_end)]
        assert [len(p) for p in parts] == [length - held_out - 1, 1, held_out]
        assert [k for p in parts for k in p] == list(range(length))


@pytest.mark.parametrize("seed", range(10))
def test_global_time_agrees_with_a_loop_over_events(seed: int) -> None:
    log = histories(random_log(seed))
    assert log.times is not None
    valid_time, test_time = cutoff_times(log.times, valid_fraction=0.2, test_fraction=0.15)
    everything = sorted(log.times.tolist())
    assert valid_time == everything[int(round(0.65 * len(everything), 6))]
    assert test_time == everything[int(round(0.85 * len(everything), 6))]
    before = [events_before(log.times, log.offsets, t) for t in (valid_time, test_time)]
    cuts = global_time(log.lengths, *before)
    for user, length in enumerate(log.lengths):
        times = log.times[log.offsets[user] : log.offsets[user + 1]].tolist()
        train = [k for k in range(length) if times[k] < valid_time]
        valid = [k for k in range(length) if valid_time <= times[k] < test_time]
        test = [k for k in range(length) if times[k] >= test_time]
        assert list(range(cuts.train_end[user])) == train
        assert cuts.valid_at[user] == (valid[0] if valid else -1)
        assert cuts.test_at[user] == (test[0] if test else -1)
        assert list(range(cuts.valid_at[user], cuts.valid_end[user])) == valid or not valid
        assert list(range(cuts.test_at[user], cuts.test_end[user])) == test or not test


@pytest.mark.parametrize("seed", range(10))
def test_global_time_leaks_nothing(seed: int) -> None:
    """No training event is as late as any target; no history holds an event from its target's period on."""
    log = histories(random_log(seed))
    assert log.times is not None
    valid_time, test_time = cutoff_times(log.times, valid_fraction=0.1, test_fraction=0.1)
    cuts = global_time(log.lengths, *(events_before(log.times, log.offsets, t) for t in (valid_time, test_time)))
    times = [log.times[a:b] for a, b in zip(log.offsets[:-1], log.offsets[1:], strict=True)]
    train = np.concatenate([t[:e] for t, e in zip(times, cuts.train_end, strict=True)])
    for at, cutoff in ((cuts.valid_at, valid_time), (cuts.test_at, test_time)):
        targets = [t[a] for t, a in zip(times, at, strict=True) if a >= 0]
        histories_ = [t[:a] for t, a in zip(times, at, strict=True) if a >= 0]
        assert targets and min(targets) >= cutoff > train.max()
        assert all(h.max(initial=-1) < cutoff for h in histories_)
    assert all(v < t for v, t in zip(cuts.valid_at, cuts.test_at, strict=True) if v >= 0 and t >= 0)


def test_an_event_at_the_cutoff_is_after_it_and_equal_times_keep_file_order() -> None:
    times = np.array([10, 20, 20, 20, 30])
    offsets = np.array([0, 5])
    before = events_before(times, offsets, 20)
    assert before.tolist() == [1]
    cuts = global_time(np.array([5]), before, events_before(times, offsets, 30))
    assert (cuts.train_end[0], cuts.valid_at[0], cuts.test_at[0]) == (1, 1, 4)  # the first of the three in the file


@pytest.mark.parametrize("seed", range(3))
def test_given_splits_are_those_of_the_column(seed: int) -> None:
    """A column that says what a cut in time does gives the same cuts."""
    log = random_log(seed)
    first = histories(log)
    assert first.times is not None and first.splits is None
    valid, test = cutoff_times(first.times, valid_fraction=0.2, test_fraction=0.2)
    name = pl.when(pl.col("timestamp") < valid).then(pl.lit("train"))
    name = name.when(pl.col("timestamp") < test).then(pl.lit("valid")).otherwise(pl.lit("test"))
    found = histories(log.with_columns(split=name))
    assert found.splits is not None
    cuts = given(found.splits, found.offsets)
    before = (events_before(first.times, first.offsets, t) for t in (valid, test))
    for one, other in zip(vars(cuts).values(), vars(global_time(first.lengths, *before)).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_given_splits_that_go_back_are_refused() -> None:
    offsets = np.array([0, 2, 5])
    assert given(np.array([1, 2, 0, 0, 2]), offsets).test_at.tolist() == [1, 2]
    with pytest.raises(DataError, match=r"train event comes after a test event(.|\n)*user number 2"):
        given(np.array([0, 2, 0, 2, 0]), offsets)
    with pytest.raises(DataError, match="in no split"):
        given(np.array([0, -1, 0, 0, 0]), offsets)
