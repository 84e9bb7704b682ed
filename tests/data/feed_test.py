"""What `Feed` asks for besides the choice of windows: masks, a share of the users, context, and what is counted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.data.batch import Batch, check_fields
from recjax.data.examples import Examples
from recjax.data.pipeline import Feed, train_batches
from recjax.data.vocab import OOV
from recjax.data.windows import Alternate, Chance, Cycle, Then

FEED = Feed(batch_size=8, row_length=24, history_length=12, block=32)
MASKED = dataclasses.replace(FEED, mask_rate=0.3)
LENGTHS = np.random.default_rng(0).integers(0, 60, 80).tolist()
Make = Callable[[list[int]], Examples]


@pytest.fixture(scope="module")
def examples(train_examples: Make) -> Examples:
    return train_examples(LENGTHS)


def batches(examples: Examples, feed: Feed = FEED, count: int = 12, seed: int = 5, **more: Any) -> list[Batch]:
    found = train_batches([examples], [1.0], feed, seed=seed, **more)
    taken = [next(found) for _ in range(count)]
    found.close()
    return taken


def windows(batches: list[Batch]) -> list[dict[str, np.ndarray]]:
    """The windows of batches one by one, in the order of the rows."""
    return [
        {name: values[row, batch["segment_ids"][row] == segment] for name, values in batch.items()}
        for batch in batches
        for row in range(len(batch["segment_ids"]))
        for segment in range(1, int(batch["segment_ids"][row].max()) + 1)
    ]


def owners(items: np.ndarray) -> np.ndarray:
    """Which example each item belongs to."""
    return np.searchsorted(2 + np.cumsum(LENGTHS), items, side="right")


def one_epoch(examples: Examples, feed: Feed, epoch: int = 0, seed: int = 5) -> list[dict[str, np.ndarray]]:
    """The windows of an epoch, without padding rows: one window in a row, one epoch in a block."""
    feed = dataclasses.replace(feed, pack=False, batch_size=1, prefetch=0)
    total = train_batches([examples], [1.0], feed, seed=seed).epoch_windows[0]
    found = train_batches([examples], [1.0], dataclasses.replace(feed, block=total), seed=seed)
    taken = [next(found) for _ in range(total * (epoch + 1))][-total:]
    found.close()
    return windows(taken)


@pytest.mark.parametrize("history", ["last", "tile", "random", "cycle", "subsample"])
def test_masked_windows_hide_their_targets_and_nothing_else(examples: Examples, history: str) -> None:
    feed = dataclasses.replace(MASKED, history=history, times="target")
    for batch in batches(examples, feed):
        check_fields(batch)
        hidden = batch["masked"] == 1
        assert (batch["history_ids"][hidden] == 0).all() and (batch["target_ids"][hidden] > 0).all()
        np.testing.assert_array_equal(batch["weight"], hidden)
        shown = (batch["segment_ids"] > 0) & ~hidden
        assert (batch["history_ids"][shown] > 0).all() and (batch["target_ids"][~hidden] == 0).all()
        # a time tells the item here: a slot has the time of its own event
        item = np.where(hidden, batch["target_ids"], batch["history_ids"])
        np.testing.assert_array_equal(batch["history_time"], item * 10)
        np.testing.assert_array_equal(batch["query_time"], item * 10)
        for row in range(8):  # no item that is to be found is visible anywhere in its row
            assert not set(batch["target_ids"][row][hidden[row]].tolist()) & set(batch["history_ids"][row].tolist())
    for window in windows(batches(examples, feed)):
        item = np.where(window["masked"] == 1, window["target_ids"], window["history_ids"])
        assert window["masked"].any() and len(set(owners(item).tolist())) == 1
        steps = np.diff(item)
        assert (steps > 0).all() if history == "subsample" else (steps == 1).all()


@pytest.mark.parametrize("history", ["chunk", "tile"])
def test_every_event_is_a_slot_of_a_masked_epoch_once(examples: Examples, history: str) -> None:
    found = one_epoch(examples, dataclasses.replace(MASKED, history=history))
    items = np.concatenate([w["history_ids"] + w["target_ids"] for w in found])
    fed = [n for n in LENGTHS if n >= 2]
    assert len(items) == len(set(items.tolist())) == sum(fed)


@pytest.mark.parametrize("rate", [0.15, 0.6])
def test_masks_have_their_rate(train_examples: Make, rate: float) -> None:
    examples = train_examples([40] * 600)
    feed = dataclasses.replace(MASKED, history_length=20, row_length=20, mask_rate=rate)
    masked = np.stack([w["masked"] for e in range(3) for w in one_epoch(examples, feed, e)])
    assert masked.shape == (1800, 20)
    none = (1 - rate) ** 20  # then one slot is hidden all the same
    wanted = rate + none / 20
    assert abs(masked.mean() - wanted) < 3 * (wanted * (1 - wanted) / masked.size) ** 0.5
    by_slot = np.abs(masked.mean(axis=0) - wanted)
    assert by_slot.max() < 4 * (wanted * (1 - wanted) / 1800) ** 0.5
    together = np.corrcoef(masked[:, 3], masked[:, 11])[0, 1]
    assert abs(together) < 4 / 1800**0.5
    assert len({tuple(m) for m in masked.tolist()}) > 1000


def test_masks_belong_to_the_window_however_it_is_fed(examples: Examples) -> None:
    def masks(found: list[Batch]) -> set[tuple[tuple[int, ...], ...]]:
        return {tuple(tuple(w[n].tolist()) for n in ("history_ids", "target_ids", "masked")) for w in windows(found)}

    packed, loose = masks(batches(examples, MASKED, 5)), masks(batches(examples, replaced(MASKED, pack=False), 40))
    assert len(packed) > 80 and packed <= loose
    assert not packed <= masks(batches(examples, replaced(MASKED, pack=False), 40, seed=6))
    drawn = [{w["history_ids"].tobytes() for w in one_epoch(examples, MASKED, e)} for e in (0, 1)]
    assert len(drawn[0] & drawn[1]) < len(drawn[0]) / 2  # short windows may come twice


def replaced(feed: Feed, **more: Any) -> Feed:
    return dataclasses.replace(feed, **more)


HISTORIES: list[Any] = [
    "cycle",
    "subsample",
    Cycle(phase=5),
    Alternate(modes=("last", "random")),
    Then(first="random", epochs=2, then="last"),
    Chance(modes=("last", "subsample")),
]


@pytest.mark.parametrize("mask_rate", [0.0, 0.3])
@pytest.mark.parametrize("history", HISTORIES, ids=repr)
def test_going_on_and_sharing_among_processes_change_nothing(
    examples: Examples, history: Any, mask_rate: float
) -> None:
    feed = replaced(FEED, history=history, mask_rate=mask_rate, times="target")
    whole = batches(examples, feed, 12)
    before = train_batches([examples], [1.0], feed, seed=5)
    for _ in range(5):
        next(before)
    state = before.get_state()
    before.close()
    assert len(str(state)) < 100
    for process in range(2):
        after = train_batches([examples], [1.0], feed, seed=5, process_index=process, process_count=2)
        after.set_state(state)
        for k in range(5, 12):
            found = next(after)
            for name, values in whole[k].items():
                np.testing.assert_array_equal(found[name], values[4 * process : 4 * process + 4])
        after.close()


def test_a_subsample_is_any_part_of_the_events_in_their_order(train_examples: Make) -> None:
    examples = train_examples([20] * 400)
    feed = replaced(FEED, history="subsample", history_length=7)
    chosen = np.zeros((400, 20), int)
    for window in one_epoch(examples, feed):
        events = np.append(window["history_ids"], window["target_ids"][-1]) - 2
        np.testing.assert_array_equal(window["history_ids"][1:], window["target_ids"][:-1])
        assert (np.diff(events) > 0).all() and len(set((events // 20).tolist())) == 1 and len(events) == 8
        chosen[events // 20, events % 20] += 1
    assert chosen.max() == 1
    assert np.abs(chosen.mean(axis=0) - 8 / 20).max() < 3.5 * (0.4 * 0.6 / 400) ** 0.5
    assert abs(np.corrcoef(chosen[:, 4], chosen[:, 5])[0, 1] + 1 / 19) < 4 / 20  # chosen without putting back
    again = np.stack([w["history_ids"] for w in one_epoch(examples, feed, epoch=1)])
    assert not np.array_equal(again, np.stack([w["history_ids"] for w in one_epoch(examples, feed)]))


@pytest.mark.parametrize("history", ["last", "tile", "random"])
def test_context_takes_weight_from_cut_windows_alone(examples: Examples, history: str) -> None:
    feed = replaced(FEED, history=history, pack=False)
    plain, spared = batches(examples, feed, 30), batches(examples, replaced(feed, context=4), 30)
    first = set((2 + np.cumsum([0, *LENGTHS])).tolist())
    cut = 0
    for one, other in zip(windows(plain), windows(spared), strict=True):
        np.testing.assert_array_equal(one["history_ids"], other["history_ids"])
        is_cut = int(one["history_ids"][0]) not in first
        cut += is_cut
        wanted = np.where(np.arange(len(one["weight"])) < 4 * is_cut, 0, 1)
        np.testing.assert_array_equal(other["weight"], wanted)
        np.testing.assert_array_equal(other["target_ids"], one["target_ids"] * wanted)
    assert cut > 40


def test_epochs_of_a_number_of_batches_are_foretold(examples: Examples) -> None:
    found = train_batches([examples], [1.0], FEED, seed=5)
    foretold = found.epochs_of(60, FEED.batch_size)
    for _ in range(60):
        next(found)
    assert found.epochs[0] == pytest.approx(foretold[0], rel=0.1)
    assert [c.epochs for c in found.coverage([1, 2])] == [(1, 2)]
    found.close()


def users_fed(examples: Examples, fraction: float, seed: int) -> set[int]:
    found = one_epoch(examples, replaced(FEED, user_fraction=fraction), seed=seed)
    return {int(owners(w["history_ids"])[0]) for w in found}


def test_fractions_of_the_users_are_nested_and_fixed(examples: Examples, train_examples: Make) -> None:
    everyone = {k for k, n in enumerate(LENGTHS) if n >= 2}
    found = [users_fed(examples, f, 5) for f in (0.1, 0.3, 0.5, 0.9, 1.0)]
    assert found[-1] == everyone
    assert all(few < more for few, more in zip(found[:-1], found[1:], strict=True))
    assert users_fed(examples, 0.3, 99) == found[1]
    many = train_examples([3] * 5000)
    for fraction in (0.05, 0.4):
        stream = train_batches([many], [1.0], replaced(FEED, user_fraction=fraction), seed=0)
        assert abs(stream.epoch_windows[0] / 5000 - fraction) < 3 * (fraction * (1 - fraction) / 5000) ** 0.5
    on_disk = batches(examples, replaced(FEED, user_fraction=0.3, memory_gib=0.0), 4)
    for one, other in zip(on_disk, batches(examples, replaced(FEED, user_fraction=0.3), 4), strict=True):
        np.testing.assert_array_equal(one["history_ids"], other["history_ids"])


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("history", ["last", "chunk", "tile", "random", "subsample", *HISTORIES], ids=repr)
def test_targets_are_counted_exactly(examples: Examples, history: Any, context: int) -> None:
    if context and ("cycle" in repr(history).lower() or history == "chunk"):
        return  # refused: see the tests of windows
    feed = replaced(FEED, history=history, context=context, user_fraction=0.7)
    found, seen, different = train_batches([examples], [1.0], feed, seed=5), 0, set()
    for k in range(60):
        batch = next(found)
        targets = batch["target_ids"][batch["weight"] > 0].tolist()
        seen += len(targets)
        different.update(targets)
        if k % 7 == 0:
            assert found.targets == [seen]
    assert found.passes == [seen / found.unique_targets[0]]
    assert found.epochs[0] > 5
    if history in ("last", "chunk", Cycle(phase=5)) or (history == "tile" and not context):
        assert found.unique_targets == [len(different)]  # others need more epochs to meet every target
    assert len(different) <= found.unique_targets[0]
    found.close()


def test_targets_of_mixtures_are_counted_by_task(examples: Examples) -> None:
    feed = replaced(FEED, history="random", batch_size=3)
    found = train_batches([examples, examples], [1.0, 2.5], feed, seed=1)
    seen = 0
    for _ in range(90):
        seen += int(next(found)["weight"].sum())
    assert sum(found.targets) == seen
    assert abs(found.targets[1] / found.targets[0] - 2.5) < 0.3
    found.close()


def test_an_unknown_item_is_hidden_at_times_but_never_a_target(train_examples: Make) -> None:
    examples = train_examples([8] * 40)
    source = examples.source("train")
    source.columns["items"].values[::3] = OOV  # type: ignore[attr-defined]
    object.__setattr__(examples, "source", lambda split, memory_bytes=0: source)
    found = windows(batches(examples, replaced(MASKED, pack=False), 5))
    assert not any((w["target_ids"] == OOV).any() for w in found)
    assert all(((w["target_ids"] > 0) == (w["weight"] == 1)).all() for w in found)
    hidden = np.concatenate([w["masked"] for w in found])
    weight = np.concatenate([w["weight"] for w in found])
    assert hidden.sum() > weight.sum() > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_rate": 1.0},
        {"mask_rate": -0.1},
        {"mask_rate": 0.2, "context": 2},
        {"user_fraction": 0.0},
        {"user_fraction": 1.5},
        {"context": 12},
        {"context": -1},
        {"history": Cycle(phase=12)},
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"Feed\.|Cycle\.phase"):
        replaced(FEED, **settings)
