"""What is done a block at a time is what numpy does at once."""

import numpy as np
import pytest

from recjax.data import blocks


@pytest.mark.parametrize("count", [0, 1, 4, 5, 23])
def test_blocks_are_all_of_it_and_change_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_SIZE", 5)
    rng = np.random.default_rng(count)
    numbers, table = rng.integers(0, 7, count).astype(np.int32), rng.normal(size=7)
    assert np.concatenate([np.zeros(0, int), *(np.arange(count)[at] for at in blocks.blocks(count))]).tolist() == [
        *range(count)
    ]
    np.testing.assert_array_equal(blocks.look_up(table, numbers), table[numbers])
    np.testing.assert_array_equal(blocks.look_up(table, numbers + 100, low=100), table[numbers])
    np.testing.assert_array_equal(blocks.tally(numbers, 9), np.bincount(numbers, minlength=9))
