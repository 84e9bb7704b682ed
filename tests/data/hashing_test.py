import numpy as np

from recjax.data.hashing import hashed_with, hashes, permutation, uniform


def test_hashes_are_fixed_for_ever() -> None:
    # SplitMix64 started at 0 gives these numbers in its published reference.
    assert hashes(3).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert len({int(hashes(1, *key)[0]) for key in [(), (0,), (1,), (0, 1), (1, 0), (-1,), (2**64 - 2,)]}) == 7


def test_permutations_are_even() -> None:
    found = np.array([permutation(5, 7, epoch) for epoch in range(6000)])
    assert all(sorted(row) == [0, 1, 2, 3, 4] for row in found[:20].tolist())
    for place in range(5):  # each number is in each place a fifth of the time
        assert np.abs(np.bincount(found[:, place]) / 6000 - 0.2).max() < 0.02


def test_hashes_with_a_number_are_those_of_the_sequence() -> None:
    state = hashes(1, 4, 2)
    assert hashed_with(state, np.arange(5)).tolist() != hashes(5, 4, 2).tolist()
    pairs = hashed_with(np.repeat(hashes(50, 1), 40), np.tile(np.arange(40), 50))
    assert len(set(pairs.tolist())) == 2000
    share = uniform(pairs)
    assert 0 <= share.min() and share.max() < 1
    # Kolmogorov-Smirnov distance to the uniform distribution, 1.63 / sqrt(n) at the 1% level
    assert np.abs(np.sort(share) - np.arange(2000) / 2000).max() < 1.63 / 2000**0.5


def test_the_ends_of_the_uniform_range_are_exact() -> None:
    assert uniform(np.array([0, 2**64 - 1, 2**63], np.uint64)).tolist() == [0.0, 1 - 2.0**-53, 0.5]
