import numpy as np
import pytest

from recjax.data.windows import random_ends, tiles, window_start, windows


@pytest.mark.parametrize("seed", range(5))
def test_chunks_hold_every_target_once_and_the_newest_are_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths, limit = rng.integers(0, 40, 30), int(rng.integers(1, 12))
    found = windows(lengths, limit, cut="chunk")
    seen: dict[int, list[int]] = {}
    for example, end in zip(found.example.tolist(), found.end.tolist(), strict=True):
        start = int(window_start(np.array([end]), limit)[0])
        assert 1 <= end - start - 1 <= limit
        seen.setdefault(example, []).extend(range(start + 1, end))
        if end < lengths[example]:  # cut from the newest backwards: windows end where a newer one begins to predict
            assert (lengths[example] - end) % limit == 0
    for example, length in enumerate(lengths.tolist()):
        assert sorted(seen.get(example, [])) == list(range(1, length))


@pytest.mark.parametrize("seed", range(5))
def test_tiles_hold_every_target_once_wherever_they_are_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths, limit = rng.integers(0, 40, 30), int(rng.integers(1, 12))
    kept = windows(lengths, limit, cut="tile")
    cuts = set()
    for _ in range(40):
        draws = rng.integers(0, 2**63, len(lengths)).astype(np.uint64)
        start, end = tiles(lengths[kept.example], kept.end, limit, draws[kept.example])
        seen: dict[int, list[int]] = {}
        for example, first, last in zip(kept.example.tolist(), start.tolist(), end.tolist(), strict=True):
            assert 1 <= last - first - 1 <= limit
            seen.setdefault(example, []).extend(range(first + 1, last))
        for example, length in enumerate(lengths.tolist()):
            assert sorted(seen.get(example, [])) == list(range(1, length))
        cuts.add((tuple(start.tolist()), tuple(end.tolist())))
    assert limit == 1 or len(cuts) > 10


def test_last_is_the_newest_window_and_short_examples_have_none() -> None:
    found = windows(np.array([0, 1, 2, 9]), 5, cut="last")
    assert (found.example.tolist(), found.end.tolist()) == ([2, 3], [2, 9])
    assert window_start(found.end, 5).tolist() == [0, 3]


def test_random_ends_are_all_reached_and_windows_stay_full() -> None:
    draws = np.random.default_rng(0).integers(0, 2**63, 4000).astype(np.uint64)
    ends = random_ends(np.full(4000, 9), 5, draws)
    assert set(ends.tolist()) == {6, 7, 8, 9}
    assert np.bincount(ends)[6:].min() > 800
    assert set(random_ends(np.full(4000, 4), 5, draws).tolist()) == {4}
