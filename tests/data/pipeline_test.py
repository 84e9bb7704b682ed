import dataclasses
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import CheckpointError, ConfigError, ExamplesError
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.data.batch import Batch, check_fields, real_tokens
from recjax.data.examples import Examples, write_examples
from recjax.data.pipeline import Feed, train_batches
from recjax.data.record import Column, Field
from recjax.data.vocab import OOV, ItemVocab

FEED = Feed(batch_size=8, row_length=24, history_length=15, block=32)
VOCAB = ItemVocab.from_counts(list(range(5000)), [1] * 5000)


def write(
    path: Path, lengths: list[int], *, first_row: int = 2, times: bool = True, vocab: ItemVocab = VOCAB
) -> Examples:
    """Train examples whose items are all different rows, so that a batch tells its origin; a time is 10 times a row."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = np.arange(first_row, first_row + offsets[-1], dtype=np.int32)
    schema = [Field(name="user_index", dtype="int64", rank=0), Field(name="items", dtype="int32", rank=1)]
    columns = {"user_index": Column(np.arange(len(lengths))), "items": Column(items, offsets)}
    if times:
        schema.append(Field(name="times", dtype="int64", rank=1))
        columns["times"] = Column(items.astype(np.int64) * 10, offsets)
    frame = pl.DataFrame({"row": [2], "item_id": [0], "train_count": [1]})
    with write_examples(path, vocab=vocab, items=frame, users=frame, facts={"content_hash": path.name}) as writer:
        writer.add("train", schema, columns)
    return Examples.open(path)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    lengths = np.random.default_rng(0).integers(0, 40, 60).tolist()
    return write(tmp_path_factory.mktemp("prepared") / "one", lengths)


@pytest.fixture(scope="module")
def pair(examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> list[Examples]:
    lengths = np.random.default_rng(1).integers(2, 20, 90).tolist()
    return [examples, write(tmp_path_factory.mktemp("prepared") / "two", lengths, first_row=3000)]


def batches(
    examples: list[Examples], feed: Feed = FEED, count: int = 12, rates: Any = None, **more: Any
) -> list[Batch]:
    rates = [1.0] * len(examples) if rates is None else rates
    found = train_batches(examples, rates, feed, **{"seed": 5, **more})
    taken = [next(found) for _ in range(count)]
    found.close()
    return taken


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def segments(batch: Batch) -> list[dict[str, np.ndarray]]:
    """Every example of every row, its fields cut out."""
    found = []
    for row in range(len(batch["segment_ids"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = np.flatnonzero(batch["segment_ids"][row] == segment)
            assert len(at) and (np.diff(at) == 1).all()
            found.append({name: values[row, at] for name, values in batch.items()})
    return found


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("history", ["last", "chunk", "tile", "random"])
def test_segments_are_windows_of_one_example(examples: Examples, pack: bool, history: str) -> None:
    feed = dataclasses.replace(FEED, pack=pack, history=history, times="target")
    events = [r["items"] for r in examples.source("train").__getitems__(range(60))]
    for batch in batches([examples], feed):
        check_fields(batch)
        assert {v.shape for v in batch.values()} == {(8, 24)}
        for part in segments(batch):
            history_ids, target_ids = part["history_ids"], part["target_ids"]
            owner = next(e for e in events if history_ids[0] in e)
            start = owner.tolist().index(history_ids[0])
            end = start + len(history_ids)
            np.testing.assert_array_equal(history_ids, owner[start:end])
            np.testing.assert_array_equal(target_ids, owner[start + 1 : end + 1])
            np.testing.assert_array_equal(part["positions"], np.arange(len(history_ids)))
            np.testing.assert_array_equal(part["history_time"], history_ids.astype(np.int64) * 10)
            np.testing.assert_array_equal(part["query_time"], target_ids.astype(np.int64) * 10)
            assert (part["weight"] == 1).all() and len(history_ids) <= 15
            if history == "last":
                assert end == len(owner) - 1
        empty = batch["segment_ids"] == 0
        assert all((values[empty] == 0).all() for values in batch.values())
        if not pack:
            assert batch["segment_ids"].max() == 1 and (batch["segment_ids"][:, 0] == 1).all()


@pytest.mark.parametrize(
    "times, added", [("none", set()), ("history", {"history_time"}), ("target", {"history_time", "query_time"})]
)
def test_batches_have_the_times_asked_for_and_the_same_rows(examples: Examples, times: str, added: set[str]) -> None:
    timed = batches([examples], dataclasses.replace(FEED, times=times), 2)
    plain = batches([examples], count=2)
    assert set(timed[0]) - set(plain[0]) == added
    assert_same([{k: v for k, v in batch.items() if k not in added} for batch in timed], plain)


def test_differences_of_times_are_right_on_a_device_after_2038(tmp_path: Path) -> None:
    late = write(tmp_path / "late", [9, 7, 9, 9], first_row=(2**31 - 100) // 10)
    mesh = make_mesh(MeshConfig())
    (batch,) = batches([late], dataclasses.replace(FEED, pack=False, times="target", block=8), 1)
    placed = mesh.put_batch(batch)
    real = batch["segment_ids"] > 0
    assert (
        batch["query_time"].dtype == np.int64 and batch["query_time"].max() > 2**31 > batch["history_time"][real].min()
    )
    ahead = np.asarray(placed["query_time"] - placed["history_time"])
    np.testing.assert_array_equal(ahead, batch["query_time"] - batch["history_time"])


@pytest.mark.parametrize("history", ["last", "chunk", "tile"])
@pytest.mark.parametrize("pack", [True, False])
def test_every_target_comes_once_an_epoch(examples: Examples, history: str, pack: bool) -> None:
    feed = dataclasses.replace(FEED, history=history, pack=pack, batch_size=1)
    found = train_batches([examples], [1.0], dataclasses.replace(feed, block=0), seed=0)
    windows, targets = found.epoch_windows[0], found.epoch_targets[0]
    found = train_batches([examples], [1.0], dataclasses.replace(feed, block=windows), seed=0)
    for epoch in range(2):
        seen: Counter[int] = Counter()
        while seen.total() < targets:
            batch = next(found)
            seen.update(batch["target_ids"][batch["weight"] > 0].tolist())
        assert set(seen.values()) == {1}
        lengths = examples.source("train").lengths
        assert targets == sum(min(n - 1, 15) if history == "last" else n - 1 for n in lengths.tolist() if n > 1)
        assert found.epochs == [epoch + 1.0]


def test_rates_may_follow_from_the_windows(pair: list[Examples]) -> None:
    """Rates that are the windows of an epoch go through all tasks equally often, however they are cut."""
    for feed in (FEED, dataclasses.replace(FEED, history="tile", history_length=4)):
        told: list[list[int]] = []

        def every(windows, told=told):
            told.append(list(windows))
            return [float(n) for n in windows]

        found = train_batches(pair, every, feed, seed=5)
        plain = train_batches(pair, [float(n) for n in told[0]], feed, seed=5)
        assert told == [found.epoch_windows] and found.get_state() == plain.get_state()
        for _ in range(30):
            assert_same([next(found)], [next(plain)])
        assert found.epochs[0] == pytest.approx(found.epochs[1])
        found.close()
        plain.close()


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_going_on_from_any_batch_is_never_having_stopped(pair: list[Examples], stop: int, prefetch: int) -> None:
    feed = dataclasses.replace(FEED, history="random", times="target", prefetch=prefetch)
    whole = batches(pair, feed, 20, [2.0, 1.0])
    before = train_batches(pair, [2.0, 1.0], feed, seed=5)
    assert_same([next(before) for _ in range(stop)], whole[:stop])
    state = json.loads(json.dumps(before.get_state()))
    before.close()
    assert len(json.dumps(state)) < 100
    after = train_batches(pair, [2.0, 1.0], feed, seed=5)
    for _ in range(3):
        next(after)
    after.set_state(state)
    assert after.get_state() == state
    assert_same([next(after) for _ in range(20 - stop)], whole[stop:])
    after.close()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("pack", [True, False])
def test_processes_share_one_batch(pair: list[Examples], count: int, pack: bool) -> None:
    feed = dataclasses.replace(FEED, pack=pack)
    whole = batches(pair, feed)
    parts = [batches(pair, feed, process_index=p, process_count=count) for p in range(count)]
    joined = [{k: np.concatenate([p[i][k] for p in parts]) for k in whole[i]} for i in range(len(whole))]
    assert_same(joined, whole)


def test_a_run_goes_on_with_another_number_of_processes_and_another_batch_size(examples: Examples) -> None:
    whole = batches([examples], count=12)
    first = train_batches([examples], [1.0], FEED, seed=5, process_index=1, process_count=4)
    for _ in range(5):
        next(first)
    state = first.get_state()
    first.close()
    rows = {k: np.concatenate([b[k] for b in whole[5:]]) for k in whole[0]}
    for process in range(2):
        second = train_batches([examples], [1.0], FEED, seed=5, process_index=process, process_count=2)
        second.set_state(state)
        for k in range(5, 12):
            half = {name: v[4 * process : 4 * process + 4] for name, v in whole[k].items()}
            assert_same([next(second)], [half])
        second.close()
    third = train_batches([examples], [1.0], dataclasses.replace(FEED, batch_size=14), seed=5)
    third.set_state(state)
    assert_same([next(third)], [{k: v[:14] for k, v in rows.items()}])
    third.close()


def test_runs_are_equal_and_seeds_are_not(examples: Examples) -> None:
    assert_same(batches([examples]), batches([examples]))
    assert not np.array_equal(batches([examples])[0]["history_ids"], batches([examples], seed=6)[0]["history_ids"])


def test_examples_on_disk_give_the_same_batches(pair: list[Examples]) -> None:
    feed = dataclasses.replace(FEED, times="target")
    assert_same(batches(pair, dataclasses.replace(feed, memory_gib=0.0), 4), batches(pair, feed, 4))


def test_mixtures_keep_to_their_rates(pair: list[Examples]) -> None:
    windows = [0, 0]
    for batch in batches(pair, count=100, rates=[1.0, 4.0]):
        for part in segments(batch):
            windows[int(part["history_ids"][0] >= 3000)] += 1
    assert sum(windows) > 1000
    assert abs(windows[0] / sum(windows) - 0.2) < 0.02  # a batch may end inside a block, whose rows are shuffled


def test_what_is_unknown_is_seen_but_not_predicted(tmp_path: Path) -> None:
    examples = write(tmp_path / "x", [6, 5], times=False)
    source = examples.source("train")
    source.columns["items"].values[[2, 8]] = OOV  # type: ignore[attr-defined]
    object.__setattr__(examples, "source", lambda split, memory_bytes=0: source)
    (batch,) = batches([examples], dataclasses.replace(FEED, batch_size=2, pack=False, block=2), 1)
    assert (batch["history_ids"] == OOV).sum() == 2
    assert (batch["target_ids"] == OOV).sum() == 0
    assert real_tokens(batch) == (5 - 1) + (4 - 1)
    assert ((batch["target_ids"] > 0) == (batch["weight"] == 1)).all()


def test_packing_uses_the_rows_well(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(2.3, 1.0, 400)), 3, 40).astype(int).tolist()
    examples = write(tmp_path / "x", lengths)
    feed = Feed(batch_size=8, row_length=20, history_length=20)
    found = train_batches([examples], [1.0], feed, seed=0)
    assert found.row_use > 0.95
    loose = train_batches([examples], [1.0], dataclasses.replace(feed, pack=False), seed=0)
    assert loose.row_use < 0.6


def test_closing_ends_the_thread(examples: Examples) -> None:
    before = threading.active_count()
    found = train_batches([examples], [1.0], FEED, seed=5)
    next(found)
    assert threading.active_count() == before + 1
    found.close()
    assert threading.active_count() == before


def test_a_position_of_other_data_is_refused(pair: list[Examples]) -> None:
    state = train_batches(pair, [1.0, 1.0], FEED, seed=5).get_state()
    others = [
        train_batches(pair, [1.0, 2.0], FEED, seed=5),
        train_batches(pair, [1.0, 1.0], FEED, seed=6),
        train_batches(pair[::-1], [1.0, 1.0], FEED, seed=5),
        train_batches(pair, [1.0, 1.0], dataclasses.replace(FEED, history="chunk"), seed=5),
    ]
    for other in others:
        with pytest.raises(CheckpointError, match="belongs to other examples"):
            other.set_state(state)
    train_batches(pair, [1.0, 1.0], dataclasses.replace(FEED, prefetch=0, batch_size=4), seed=5).set_state(state)


@pytest.mark.parametrize(
    "settings",
    [
        {"history_length": 25},
        {"batch_size": 0},
        {"history": "first"},
        {"block": -1},
        {"times": "all"},
        {"row_length": 0, "history_length": 0},
    ],
)
def test_settings_that_make_no_batches_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Feed|does not fit a row"):
        dataclasses.replace(FEED, **settings)


def test_mistakes_are_told(examples: Examples, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 rows cannot be divided by 3"):
        batches([examples], process_count=3)
    with pytest.raises(ConfigError, match="1 tasks with 2 rates"):
        batches([examples], rates=[1.0, 2.0])
    untimed = write(tmp_path / "untimed", [5, 5], times=False)
    for times in ("history", "target"):
        with pytest.raises(ExamplesError, match=f"no times(.|\n)*{times}"):
            batches([untimed], dataclasses.replace(FEED, times=times))
    foreign = write(tmp_path / "foreign", [5, 5], vocab=ItemVocab.from_counts([1], [1]))
    with pytest.raises(ExamplesError, match="different vocabularies"):
        batches([examples, foreign])
    with pytest.raises(ExamplesError, match="two events"):
        batches([write(tmp_path / "short", [1, 0, 1])])
