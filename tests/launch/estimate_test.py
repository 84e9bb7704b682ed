"""Bounds are the longest of what has to be done, and advice follows from the numbers."""

from __future__ import annotations

import collections

import pytest

from recjax.launch.chips import CHIPS, GIB
from recjax.launch.cost import Cost
from recjax.launch.estimate import Memory, Setting, advice, mfu_bound, times

V5P = CHIPS["v5p"]


def setting(**changed) -> Setting:
    told = {"preset": "fsdp", "mesh": "data=-1", "accumulate": 1, "rows": 8, "remats": True, "devices": 16}
    return Setting(**{**told, **changed})


def test_the_bound_is_the_longest_part() -> None:
    sent = collections.Counter({"all-gather": 6 * 10**9, "all-reduce": 6 * 10**9, "all-reduce between slices": 10**9})
    found = times(Cost(flops=459e12, memory=2 * 2765e9, sent=sent), V5P, 2765e9 / 2)
    assert (found.products, found.memory, found.traffic) == (1, 0.5, 2)
    assert found.links == pytest.approx(12 / 600)
    assert found.network == pytest.approx(1 / 6.25)
    # traffic, which is estimated from above, bounds nothing
    assert (found.bound, found.bounded_by) == (1, "products")
    assert found.serial == pytest.approx(1 + 2 + 12 / 600 + 1 / 6.25)
    # three quarters of what is done are the model's own: the rest is made again in the backward pass
    assert mfu_bound(0.75 * 459e12, found, V5P) == pytest.approx(0.75)


def test_what_fits_needs_no_advice() -> None:
    assert advice(Memory(state=GIB, arguments=GIB, temporaries=GIB), V5P, setting()) == []


def test_a_state_that_is_too_large_is_split_first() -> None:
    memory = Memory(state=200 * GIB, arguments=201 * GIB, needed=300 * GIB, room=95 * GIB)
    first, *_ = advice(memory, V5P, setting(preset="data"))
    assert "fsdp" in first and "12.5 GiB when split over 16" in first
    first, *others = advice(memory, V5P, setting())
    assert "3 times as many chips" in first and any("adapters" in line for line in others)


def test_temporaries_are_cut_into_as_few_parts_as_fit() -> None:
    memory = Memory(state=35 * GIB, arguments=35 * GIB, needed=235 * GIB, room=95 * GIB)
    found = advice(memory, V5P, setting(accumulate=2))
    assert len(found) == 1 and "Recipe.accumulate = 8" in found[0]  # 200 / 4 into 60
    assert "remat" in advice(memory, V5P, setting(remats=False))[0]
    assert not any("remat" in line for line in advice(memory, V5P, setting(remats=None)))


def test_one_row_that_does_not_fit_is_split_or_shortened() -> None:
    memory = Memory(state=35 * GIB, arguments=35 * GIB, needed=235 * GIB, room=95 * GIB)
    found = advice(memory, V5P, setting(rows=1))
    assert len(found) == 1 and "row_length" in found[0] and "fsdp_model" in found[0]


def test_few_rows_and_many_vectors_are_split_by_columns() -> None:
    memory = Memory(state=35 * GIB, arguments=35 * GIB, needed=235 * GIB, room=95 * GIB)
    first, *_ = advice(memory, V5P, setting(table=32_000, slots=1_048_576))
    assert "fsdp_text" in first and "1,048,576" in first and "32,000" in first
    for other in ({"table": 2**20, "slots": 2**20}, {"preset": "fsdp_text", "table": 32_000, "slots": 2**20}):
        assert not any("fsdp_text" in line for line in advice(memory, V5P, setting(**other)))
