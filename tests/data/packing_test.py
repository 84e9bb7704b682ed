import numpy as np
import pytest

from recjax.data.packing import one_per_row, pack


def best_fit_decreasing(lengths: list[int], row_length: int) -> list[list[int]]:
    """Rows of lengths, straight from the definition."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in rows if sum(r) + length <= row_length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_no_window_is_split_lost_or_overlapped(seed: int) -> None:
    rng = np.random.default_rng(seed)
    row_length = int(rng.integers(1, 40))
    lengths = rng.integers(1, row_length + 1, int(rng.integers(0, 200)))
    packing = pack(lengths, row_length)
    filled = np.zeros((packing.num_rows, row_length), int)
    for row, offset, length in zip(packing.row, packing.offset, lengths, strict=True):
        assert offset + length <= row_length
        filled[row, offset : offset + length] += 1
    assert filled.max(initial=0) <= 1
    assert filled.sum() == lengths.sum()
    assert set(packing.row.tolist()) == set(range(packing.num_rows))
    for row in range(packing.num_rows):  # no gaps, and segments counted from the left
        here = np.flatnonzero(packing.row == row)
        here = here[np.argsort(packing.offset[here])]
        assert packing.segment[here].tolist() == list(range(1, len(here) + 1))
        np.testing.assert_array_equal(packing.offset[here], np.cumsum(lengths[here]) - lengths[here])


@pytest.mark.parametrize("seed", range(8))
def test_it_is_best_fit_decreasing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 31, 150)
    packing = pack(lengths, 30)
    expected = best_fit_decreasing(lengths.tolist(), 30)
    found = np.bincount(packing.row, weights=lengths)
    assert sorted(found.tolist()) == sorted(map(sum, expected))


def test_histories_like_those_of_movielens_fill_rows_to_95_percent() -> None:
    # 54 % of the slots are filled without packing, as in MovieLens-1M with histories of 200.
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(4.5, 1.0, 2048)), 17, 200).astype(int)
    assert lengths.mean() / 200 < 0.6
    assert lengths.sum() / (pack(lengths, 200).num_rows * 200) > 0.95


def test_lengths_that_do_not_fit_are_refused() -> None:
    for lengths in ([5, 11], [0, 5]):
        with pytest.raises(ValueError, match="rows of 10"):
            pack(np.array(lengths), 10)


def test_one_per_row() -> None:
    packing = one_per_row(3)
    assert (packing.row.tolist(), packing.offset.tolist(), packing.segment.tolist()) == ([0, 1, 2], [0] * 3, [1] * 3)
    assert packing.num_rows == 3
