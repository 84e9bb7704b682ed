from typing import Any

import numpy as np
import pytest

from recjax.core.errors import ExamplesError
from recjax.data import stream
from recjax.data.stream import Block, Stream, share, shared, thin


def make(lengths: Any, rates: Any = None, **more: Any) -> Stream:
    settings = {"row_length": 20, "history_length": 12, "cut": "last", "packed": True, "block": 64, "seed": 3}
    lengths = [np.asarray(n) for n in lengths]
    return Stream(lengths, rates or [1.0] * len(lengths), **{**settings, **more})


def lengths_of(seed: int, count: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40, count)


def targets_of(block: Block) -> list[tuple[int, int, int]]:
    """(task, example, event) of every target of a block."""
    return [
        (t, e, k)
        for t, e, s, n in zip(block.task, block.example, block.start, block.length, strict=True)
        for k in range(s + 1, s + n + 1)
    ]


@pytest.mark.parametrize("rates", [[1.0], [1.0, 1.0], [0.7, 0.2, 0.1], [5.0, 1e-3, 3.0, 0.5]])
def test_shares_are_right_from_the_first_position_on(rates: list[float]) -> None:
    task, local = share(np.arange(20_000), rates)
    counts = np.cumsum(task[:, None] == np.arange(len(rates)), axis=0)
    wanted = np.arange(1, 20_001)[:, None] * np.array(rates) / sum(rates)
    assert np.abs(counts - wanted).max() < 2
    for number in range(len(rates)):  # each task's windows in turn, none left out
        assert local[task == number].tolist() == list(range(int((task == number).sum())))
        assert [shared(p, rates)[number] for p in (0, 1, 777, 20_000)] == [
            int((task[:p] == number).sum()) for p in (0, 1, 777, 20_000)
        ]
    later, later_local = share(np.arange(12_345, 12_400), rates)
    np.testing.assert_array_equal(later, task[12_345:12_400])
    np.testing.assert_array_equal(later_local, local[12_345:12_400])


@pytest.mark.parametrize("cut", ["last", "chunk", "tile"])
@pytest.mark.parametrize("packed", [True, False])
def test_every_target_of_an_epoch_appears_exactly_once(cut: str, packed: bool) -> None:
    lengths = lengths_of(0)
    total = make([lengths], cut=cut, packed=packed).epoch_windows[0]
    stream = make([lengths], cut=cut, packed=packed, block=total)  # one block is one epoch
    expected = []
    for example, n in enumerate(lengths.tolist()):
        first = 1 if cut in ("chunk", "tile") else max(n - 12, 1)
        expected += [(0, example, k) for k in range(first, n)]
    for epoch in range(3):
        found = targets_of(stream.plan(epoch))
        assert sorted(found) == expected
        assert len(found) == stream.epoch_targets[0]
    assert targets_of(stream.plan(0)) != targets_of(stream.plan(1))


def test_epochs_are_whole_across_blocks_of_any_size() -> None:
    lengths = lengths_of(1)
    total = make([lengths]).epoch_windows[0]
    stream = make([lengths], block=7)
    windows = [
        (t, e, s)
        for k in range(2 * total)
        for b in [stream.plan(k)]
        for t, e, s in zip(b.task, b.example, b.start, strict=True)
    ]
    assert len(windows) == 14 * total
    assert all(windows.count(w) == 14 for w in set(windows))


def test_rows_keep_to_their_length_and_windows_to_theirs() -> None:
    block = make([lengths_of(2)], cut="chunk").plan(5)
    assert block.length.max() <= 12 and block.length.min() >= 1
    used = np.zeros((block.num_rows, 20), int)
    for row, offset, length in zip(block.row, block.offset, block.length, strict=True):
        used[row, offset : offset + length] += 1
    assert used.max() == 1
    assert (used[:, 0] == 1).all()
    for row in range(block.num_rows):
        mine = slice(block.bounds[row], block.bounds[row + 1])
        assert set(block.row[mine].tolist()) == {row}
        assert block.segment[mine].tolist() == list(range(1, 1 + len(block.row[mine])))


def test_rows_do_not_stand_in_order_of_length() -> None:
    block = make([np.random.default_rng(0).integers(2, 14, 5000)], block=2000).plan(0)
    longest = np.array([block.length[a:b].max() for a, b in zip(block.bounds[:-1], block.bounds[1:], strict=True)])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.1


def test_plans_depend_on_the_seed_and_on_nothing_that_was_planned_before() -> None:
    lengths = [lengths_of(3), lengths_of(4)]
    one, other = make(lengths, [1.0, 2.0]), make(lengths, [1.0, 2.0])
    expected = [targets_of(one.plan(k)) for k in range(6)]
    for k in (5, 0, 3, 3, 1):
        assert targets_of(other.plan(k)) == expected[k]
    assert targets_of(make(lengths, [1.0, 2.0], seed=4).plan(0)) != expected[0]


def test_random_windows_differ_between_epochs_and_cover_the_history() -> None:
    lengths = np.full(40, 30)
    stream = make([lengths], cut="random", block=40)
    starts: list[set[int]] = [set() for _ in range(40)]
    for epoch in range(30):
        block = stream.plan(epoch)
        assert sorted(block.example.tolist()) == list(range(40))
        assert set(block.length.tolist()) == {12}
        for example, start in zip(block.example, block.start, strict=True):
            starts[example].add(int(start))
    assert set().union(*starts) == set(range(18))
    assert min(map(len, starts)) > 8


def test_mixtures_share_rows_and_count_epochs() -> None:
    stream = make([lengths_of(5), lengths_of(6, 200)], [1.0, 3.0], block=400)
    block = stream.plan(0)
    assert np.bincount(block.task).tolist() == [100, 300]
    mixed = [len(set(block.task[a:b].tolist())) > 1 for a, b in zip(block.bounds[:-1], block.bounds[1:], strict=True)]
    assert any(mixed)
    assert stream.position(3, stream.plan(3).num_rows) == stream.position(4, 0) == 1600
    assert stream.epochs(1600) == [400 / stream.epoch_windows[0], 1200 / stream.epoch_windows[1]]


def test_the_automatic_block_packs_well() -> None:
    short = np.random.default_rng(0).integers(2, 9, 3000)
    stream = make([short], row_length=2000, history_length=2000, block=0)
    block = stream.plan(0)
    assert block.length.sum() / (block.num_rows * 2000) > 0.95


def test_thinned_windows_do_not_depend_on_those_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    draw, length = rng.integers(0, 2**63, 300).astype(np.uint64), rng.integers(9, 200, 300)
    found = thin(draw, length, 9)
    assert (np.diff(found, axis=1) > 0).all() and (found >= 0).all() and (found < length[:, None]).all()
    for k in (0, 150, 299):
        np.testing.assert_array_equal(thin(draw[k : k + 1], length[k : k + 1], 9)[0], found[k])
    monkeypatch.setattr(stream, "_HASH_BITS", 50)  # so that only some 64 windows of 200 events are sorted at a time
    assert thin(draw, length, 9).shape == (300, 9)
    np.testing.assert_array_equal(thin(draw[::-1], length[::-1], 9)[::-1], found)


def test_a_task_without_windows_is_an_error() -> None:
    with pytest.raises(ExamplesError, match="two events"):
        make([np.array([5, 3]), np.array([1, 0, 1])])
