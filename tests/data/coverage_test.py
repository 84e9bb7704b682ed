from typing import Any

import numpy as np
import pytest

from recjax.data.coverage import coverage
from recjax.data.stream import Stream
from recjax.data.windows import Alternate, Cycle

LENGTHS = np.random.default_rng(0).integers(0, 70, 60)


def make(history: Any, lengths: np.ndarray = LENGTHS, **more: Any) -> Stream:
    settings = {"row_length": 10, "history_length": 10, "packed": False, "block": 16, "seed": 3}
    return Stream([lengths], [1.0], cut=history, **{**settings, **more})


def targets_seen(stream: Stream, epochs: int) -> set[tuple[int, int]]:
    """(example, event) of the targets of the planned windows, one by one."""
    total = stream.epoch_windows[0] * epochs
    found: set[tuple[int, int]] = set()
    for number in range(-(-total // 16)):
        block = stream.plan(number)
        for k in range(min(16, total - number * 16)):
            assert not block.thinned[k]
            start = int(block.start[k])
            found |= {
                (int(block.example[k]), event)
                for event in range(start + 1 + int(block.skip[k]), start + 1 + int(block.length[k]))
            }
    return found


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("history", ["last", "tile", "random", Alternate(modes=("last", "random"))], ids=repr)
def test_shares_are_those_of_the_planned_windows(history: Any, context: int) -> None:
    stream = make(history, context=context)
    found = coverage(stream, 0, (1, 4))
    assert found.upto == (10, 20, 40, 68)
    for shares, epochs in zip(found.share, found.epochs, strict=True):
        seen = targets_seen(stream, epochs)
        for i, most in enumerate(found.upto):
            fewer = found.upto[i - 1] if i else 0
            for j, before in enumerate(found.upto):
                since = found.upto[j - 1] if j else 0
                cell = [
                    (u, k)
                    for u, n in enumerate(LENGTHS.tolist())
                    for k in range(1, n)
                    if fewer < n - 1 <= most and since <= n - 1 - k < before
                ]
                assert found.targets[i, j] == len(cell)
                if cell:
                    assert shares[i, j] == pytest.approx(len(seen & set(cell)) / len(cell))
        assert found.total[found.epochs.index(epochs)] == pytest.approx(
            len(seen) / int(np.maximum(LENGTHS - 1, 0).sum())
        )


def test_a_cycle_covers_everything_and_the_newest_window_never_does() -> None:
    cycle = coverage(make(Cycle(phase=4)), 0, range(1, 9))
    assert cycle.total == sorted(cycle.total) and cycle.total[-1] == 1.0 > cycle.total[-3]
    last = coverage(make("last"), 0, (1, 8))
    assert last.total[0] == last.total[1] < 0.5
    old = last.share[1][:, 1:]
    assert np.nanmax(old) == 0.0 and (last.share[1][last.targets[:, 0] > 0, 0] == 1.0).all()


def test_subsamples_reach_all_ages_alike() -> None:
    found = coverage(make("subsample", np.full(800, 41)), 0, (1,))
    shares = found.share[0][2][found.targets[2] > 0]
    # of 41 events 11 are chosen, and the first chosen is no target: rarer among the oldest
    assert shares[:2] == pytest.approx([11 / 41] * 2, abs=0.02) and shares[2] < 0.25
    assert found.total[0] == pytest.approx(10 / 40)


def test_the_table_has_a_row_for_each_group_of_users() -> None:
    lines = coverage(make("last"), 0, (2,)).lines()
    assert len(lines) == 2 + 4
    assert lines[2].startswith("| at most 10 | 1.000 |") and lines[-1].endswith("|")
    assert len({line.count("|") for line in lines}) == 1
