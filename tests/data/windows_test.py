from typing import Any

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.data.hashing import hashes
from recjax.data.windows import MODES, Alternate, Chance, Chunk, Cycle, Place, Then, Tile, check, parts, place, tiles

ALL: list[Any] = [
    *MODES,
    Cycle(phase=3),
    Chunk(most=2),
    Tile(most=2),
    Alternate(modes=("random", "cycle")),
    Then(first="subsample", epochs=2, then="random"),
    Chance(modes=("last", "random", "cycle"), rates=(1.0, 2.0, 3.0)),
]


def placed(history: Any, lengths: np.ndarray, limit: int, epoch: int = 0, seed: int = 0) -> tuple[np.ndarray, Place]:
    """All windows of an epoch: the example of each, and where it lies."""
    mode = parts(history, epoch)[0].mode
    counts = mode.counts(lengths, limit)
    example = np.repeat(np.arange(len(lengths)), counts)
    number = np.concatenate([np.arange(c) for c in counts])
    draws = hashes(len(lengths), seed, epoch)[example]
    return example, place(history, lengths[example], number, limit, epoch, draws)


def visits(history: Any, lengths: np.ndarray, limit: int, epochs: range, seed: int = 0) -> np.ndarray:
    """int [examples, longest + 1]: how often each event was a target that counts."""
    found = np.zeros((len(lengths), int(lengths.max()) + 1), int)
    for epoch in epochs:
        example, where = placed(history, lengths, limit, epoch, seed)
        np.add.at(found, (example, where.start + 1 + where.skip), 1)
        np.add.at(found, (example, where.end), -1)
    return np.cumsum(found, axis=1)[:, :-1]


def targets(lengths: np.ndarray) -> np.ndarray:
    """bool [examples, longest]: which events are targets at all."""
    number = np.arange(lengths.max())
    return (number >= 1) & (number < lengths[:, None])


@pytest.mark.parametrize("phase", [0, 1, 7])
def test_a_cycle_trains_every_target_exactly_once(phase: int) -> None:
    lengths = np.arange(2, 501)
    for limit in range(phase + 1, 65):
        targets_of, cut = lengths - 1, phase * (lengths - 1 > limit)
        epochs = -(-(targets_of - cut) // limit) + (cut > 0)
        seen = np.zeros((len(lengths), 501), int)
        for epoch in range(epochs.max()):
            mine = np.flatnonzero(epoch < epochs)  # those that are not through yet
            _, where = placed(Cycle(phase=phase), lengths[mine], limit, epoch)
            assert (where.end - where.start - 1 <= limit).all()
            np.add.at(seen, (mine, where.start + 1 + where.skip), 1)
            np.add.at(seen, (mine, where.end), -1)
        np.testing.assert_array_equal(np.cumsum(seen, axis=1)[:, :-1], targets(np.append(lengths, 500))[:-1])


def test_a_cycle_begins_anew_and_goes_from_the_newest_backwards() -> None:
    lengths = np.full(1, 25)
    ends = [int(placed("cycle", lengths, 10, e)[1].end[0]) for e in range(7)]
    assert ends == [25, 15, 5, 25, 15, 5, 25]
    where = [placed(Cycle(phase=4), lengths, 10, e)[1] for e in range(4)]
    assert [(int(w.start[0]), int(w.end[0]), int(w.skip[0])) for w in where] == [
        (14, 25, 6),  # the newest 4 targets, in a whole window
        (10, 21, 0),
        (0, 11, 0),
        (14, 25, 6),
    ]


@pytest.mark.parametrize("mode", ["chunk", "tile"])
def test_all_windows_of_an_epoch_hold_every_target_once(mode: str) -> None:
    lengths = np.arange(0, 60)
    for limit in (1, 2, 7, 12, 80):
        for epoch in range(4):
            np.testing.assert_array_equal(visits(mode, lengths, limit, range(epoch, epoch + 1)), targets(lengths))


def test_the_cuts_of_tiles_move_and_those_of_chunks_do_not() -> None:
    lengths = np.full(30, 40)
    starts = {mode: {tuple(placed(mode, lengths, 12, e)[1].start) for e in range(20)} for mode in ("chunk", "tile")}
    assert len(starts["chunk"]) == 1 and len(starts["tile"]) == 20
    start, end = tiles(np.array([30]), np.array([30]), 12, np.array([5], np.uint64))
    assert (start >= 0).all() and (end == 30).all()


def test_the_last_window_is_the_newest_events() -> None:
    lengths = np.arange(0, 30)
    example, where = placed("last", lengths, 9)
    assert example.tolist() == list(range(2, 30))  # one event has no target
    np.testing.assert_array_equal(where.end, lengths[2:])
    np.testing.assert_array_equal(where.end - where.start, np.minimum(lengths[2:], 10))


def test_random_windows_visit_targets_as_often_as_counting_says() -> None:
    length, limit, draws = 30, 8, 20_000
    lengths = np.full(draws, length)
    share = visits("random", lengths, limit, range(1))[:, 1:].mean(axis=0)
    target = np.arange(1, length)
    # ends are uniform on limit + 1 .. length; a target lies in windows with ends of target + 1 .. target + limit
    ends = np.minimum(target + limit, length) - np.maximum(target + 1, limit + 1) + 1
    wanted = ends / (length - limit)
    assert set(ends[limit : length - limit - 1].tolist()) == {limit}  # inner targets are equal, outer ones rarer
    assert (np.abs(share - wanted) <= 3 * np.sqrt(wanted * (1 - wanted) / draws)).all()
    where = placed("random", lengths, limit)[1]
    assert set(where.end.tolist()) == set(range(limit + 1, length + 1))


@pytest.mark.parametrize("history", ALL, ids=repr)
def test_windows_are_pieces_of_their_example(history: Any) -> None:
    lengths = np.random.default_rng(0).integers(0, 90, 200)
    for epoch in range(5):
        example, where = placed(history, lengths, 12, epoch)
        length = where.end - where.start - 1
        assert (where.start >= 0).all() and (where.end <= lengths[example]).all()
        assert (length >= 1).all() and (length <= 12).all()
        assert (where.skip >= 0).all() and (where.skip < length).all()
        assert set(example.tolist()) == set(np.flatnonzero(lengths >= 2).tolist())


@pytest.mark.parametrize("history", [h for h in ALL if h != "every"], ids=repr)
def test_short_examples_have_the_same_window_in_all_modes(history: Any) -> None:
    lengths = np.arange(2, 14)
    for epoch in range(7):
        example, where = placed(history, lengths, 12, epoch, seed=epoch)
        assert example.tolist() == list(range(12))
        assert not where.start.any() and not where.skip.any() and not where.thinned.any()
        np.testing.assert_array_equal(where.end, lengths)


def test_every_target_ends_a_window_of_its_own() -> None:
    lengths = np.arange(0, 40)
    example, where = placed("every", lengths, 7)
    assert list(zip(example.tolist(), where.end.tolist(), strict=True)) == [
        (n, k + 1) for n in lengths for k in range(1, n)
    ]
    np.testing.assert_array_equal(where.start, np.maximum(where.end - 8, 0))
    assert not where.skip.any() and not where.thinned.any()


def test_modes_with_one_window_cost_the_same() -> None:
    lengths = np.random.default_rng(1).integers(0, 90, 300)
    for history in [*(n for n, m in MODES.items() if m.is_single), *ALL[-3:]]:
        for epoch in range(4):
            assert len(placed(history, lengths, 12, epoch)[0]) == int((lengths >= 2).sum())


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_limit_of_windows_takes_turns(most: int) -> None:
    lengths = np.array([5, 12, 30, 61, 100])
    for mode in (Chunk(most=most), Tile(most=most)):
        example, where = placed(mode, lengths, 10)
        assert np.bincount(example).tolist() == [min(most, -(-(n - 1) // 10)) for n in lengths.tolist()]
        assert len({(e, s) for e, s in zip(example.tolist(), where.start.tolist(), strict=True)}) == len(example)
    windows = 10  # of the longest; after as many epochs each of them has been seen `most` times
    seen = visits(Chunk(most=most), lengths[-1:], 10, range(windows))
    assert set(seen[0, 1:].tolist()) == {most}
    if most == 1:
        np.testing.assert_array_equal(
            visits(Chunk(most=1), lengths, 10, range(5)), visits("cycle", lengths, 10, range(5))
        )


def test_schedules_keep_their_ratios_and_each_mode_its_own_epochs() -> None:
    names = {type(mode).__name__.lower(): name for name, mode in MODES.items()}

    def run(history: Any, epochs: int) -> list[tuple[str, int]]:
        return [(names[type(p.mode).__name__.lower()], p.epoch) for e in range(epochs) for p in parts(history, e)]

    assert run(Alternate(modes=("last", "cycle")), 5) == [
        ("last", 0), ("cycle", 0), ("last", 1), ("cycle", 1), ("last", 2),
    ]  # fmt: skip
    three_in_four = run(Alternate(modes=("last", "random", "random", "random")), 400)
    assert sum(name == "random" for name, _ in three_in_four) == 300
    assert [e for name, e in three_in_four if name == "random"] == list(range(300))
    assert run(Then(first="random", epochs=2, then=Alternate(modes=("last", "cycle"))), 5) == [
        ("random", 0), ("random", 1), ("last", 0), ("cycle", 0), ("last", 1),
    ]  # fmt: skip


def test_a_cycle_that_takes_turns_with_another_mode_still_covers_everything() -> None:
    lengths = np.full(1, 41)  # four blocks: without epochs of its own the cycle would see only every other one
    seen = visits(Alternate(modes=("last", "cycle")), lengths, 10, range(8))
    assert seen[0, 1:].tolist() == [1] * 30 + [5] * 10


def test_chances_are_kept_and_drawn_anew() -> None:
    lengths = np.full(20_000, 50)
    history = Chance(modes=("last", Then(first="cycle", epochs=9, then="last"), "random"), rates=(2.0, 1.0, 1.0))
    first, second = (placed(history, lengths, 10, e)[1].end for e in (1, 2))
    # epoch 1 is the cycle's second: it ends at 40. A random window ends at 50 with probability 1/40.
    for end, wanted in ((50, 0.5 + 0.25 / 40), (40, 0.25 + 0.25 / 40)):
        assert abs(float((first == end).mean()) - wanted) < 3 * (wanted * (1 - wanted) / 20_000) ** 0.5
    both = float(((first == 50) & (second == 50)).mean())
    assert abs(both - 0.50625**2) < 4 * (0.256 * 0.744 / 20_000) ** 0.5


@pytest.mark.parametrize("history", ALL, ids=repr)
def test_windows_depend_on_nothing_but_their_own_example(history: Any) -> None:
    lengths = np.random.default_rng(2).integers(2, 90, 50)
    example, where = placed(history, lengths, 12, 3)
    number = np.arange(len(example)) - np.searchsorted(example, example)
    draws = hashes(50, 0, 3)
    for k in (0, 17, len(example) - 1):
        one = slice(k, k + 1)
        alone = place(history, lengths[example[one]], number[one], 12, 3, draws[example[one]])
        assert (alone.start[0], alone.end[0], alone.skip[0]) == (where.start[k], where.end[k], where.skip[k])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Alternate(modes=("last", "chunk")), "Alternate.modes"),
        (lambda: Alternate(modes=()), "Alternate.modes"),
        (lambda: Then(first="tile", epochs=3), "Then.first"),
        (lambda: Then(epochs=0), "Then.epochs"),
        (lambda: Chance(modes=("last",), rates=(1.0, 2.0)), "Chance.rates"),
        (lambda: Chance(rates=(1.0, 0.0)), "Chance.rates"),
        (lambda: Chance(modes=("last", "newest")), "newest"),
        (lambda: Tile(most=-1), "Tile.most"),
        (lambda: check(Cycle(phase=12), 12, 0), "Cycle.phase"),
        (lambda: check("random", 12, 12), "Feed.context"),
        (lambda: check(Alternate(modes=("last", "cycle")), 12, 2), "never be trained"),
        (lambda: check("first", 12, 0), "Feed.history"),
    ],
)
def test_mistakes_are_told(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
