"""The feed of rows: every row once an epoch, the same stream for any batch size and number of processes, resumable."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recjax.core.errors import ArtifactError, CheckpointError, ConfigError, ExamplesError
from recjax.data.counters import History
from recjax.data.examples import Examples
from recjax.data.fields import Categorical, Numeric, SequenceOf
from recjax.data.label_noise import HiddenPositives, MissingPeriod, Totals
from recjax.data.label_store import LabelStore, write_labels
from recjax.data.rated_world import RatedWorld
from recjax.data.rows_feed import RowReader, RowsBatches, RowsFeed, held_rows
from recjax.data.shards import DiskSource
from recjax.data.sources import DataDir, World
from recjax.tasks.cache import place_of
from recjax.tasks.impressions import Impressions
from recjax.tasks.next_item import NextItem

TASK = Impressions(
    data=DataDir(simulate=RatedWorld(rows=700, users=30, items=20)),
    fields=(
        Categorical(columns=("user_id", "item_id", "device")),
        SequenceOf(columns=("history",), of="item_id", limit=3),
        Numeric(columns=("price",)),
    ),
    labels={"click": "click", "like": "rating >= 4"},
    histories=(History(limit=3),),
    domain="domain",
)


@pytest.fixture(scope="module")
def examples(prepare_here: Callable[..., None]) -> Examples:
    prepare_here(TASK)
    return Examples.open(place_of(TASK).path)


def feed(examples: Examples, *, seed: int = 0, place: tuple[int, int] = (0, 1), **settings: Any) -> RowsBatches:
    told = {"batch_size": 32, **settings}
    return RowsBatches([examples], RowsFeed(**told), seed=seed, process_index=place[0], process_count=place[1])


def drawn(batches: RowsBatches, count: int) -> dict[str, np.ndarray]:
    parts = [next(batches) for _ in range(count)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert list(one) == list(other)
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


SETTINGS: list[dict[str, Any]] = [{}, {"order": "time"}, {"balance": 1.0}, {"balance": 0.5, "domain_weight": 1.0}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_batch_is_the_rows_that_its_numbers_say(examples: Examples, settings: dict[str, Any]) -> None:
    batches, reader = feed(examples, **settings), RowReader(examples, "train")
    numbers = batches.numbers(np.arange(320))
    found, rows = drawn(batches, 10), reader.read(numbers)
    weight = found.pop("weight")
    assert rows.pop("weight").min() == 1 and (settings.get("domain_weight") or (weight == 1).all())
    same(found, rows)
    one = examples.source("train")[int(numbers[7])]
    assert found["label/like"][7] == one["labels"][1] and found["user_index"][7] == one["user_index"]
    assert found["field/user_id"][7] == one["codes"][0] and found["field/price"][7] == one["numbers"][0]
    assert found["field/history"][7].tolist() == one["codes"][3:].tolist()


@pytest.mark.parametrize("order", ["shuffled", "time"])
def test_every_row_comes_once_an_epoch(examples: Examples, order: str) -> None:
    batches, rows = feed(examples, order=order), examples.count("train")
    first, second = (batches.numbers(np.arange(e * rows, (e + 1) * rows)) for e in (0, 1))
    assert np.array_equal(np.sort(first), np.arange(rows)) and np.array_equal(np.sort(second), np.arange(rows))
    assert np.array_equal(first, second) == (order == "time")
    assert np.array_equal(first, np.arange(rows)) == (order == "time")
    drawn(batches, 10)
    assert batches.epochs == [320 / rows] and batches.epoch_targets == [rows]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_stream_does_not_depend_on_batches_or_processes(examples: Examples, settings: dict[str, Any]) -> None:
    whole = drawn(feed(examples, **settings), 30)
    same(drawn(feed(examples, **settings, batch_size=96), 10), whole)
    parts = [drawn(feed(examples, **settings, place=(k, 2)), 30) for k in range(2)]
    for name, values in whole.items():
        halves = [part[name].reshape(30, 16, *values.shape[1:]) for part in parts]
        np.testing.assert_array_equal(np.concatenate(halves, axis=1).reshape(values.shape), values)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_resumed_stream_is_the_uninterrupted_one(examples: Examples, settings: dict[str, Any]) -> None:
    whole = feed(examples, **settings)
    drawn(whole, 13)
    state = whole.get_state()
    again = feed(examples, **settings, batch_size=64)
    again.set_state(state)
    same(drawn(again, 10), drawn(whole, 20))
    for other in (feed(examples, **settings, seed=1), feed(examples, **{**settings, "order": "time", "balance": 0.25})):
        with pytest.raises(CheckpointError, match="other examples"):
            other.set_state(state)


def test_another_draw_is_another_order_of_the_same_rows(examples: Examples) -> None:
    rows = examples.count("train")
    plain, one, two = (feed(examples, **more) for more in ({}, {"draw": 1}, {"draw": 2}))
    orders = [batches.numbers(np.arange(rows)) for batches in (plain, one, two)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(rows))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (orders[a] == orders[b]).mean() < 0.02
    with pytest.raises(CheckpointError):
        one.set_state(two.get_state())


def test_domains_come_as_often_as_balance_says(examples: Examples) -> None:
    sizes = np.bincount(RowReader(examples, "train").column("domain"))
    assert len(sizes) == 3 and sizes[0] > 3 * sizes[2]
    for balance in (0.5, 1.0):
        batches = feed(examples, balance=balance)
        counts = np.bincount(drawn(batches, 40)["domain"])
        shares = sizes ** (1 - balance) / (sizes ** (1 - balance)).sum()
        np.testing.assert_allclose(counts / counts.sum(), shares, atol=3 / 1280)
        numbers = batches.numbers(np.arange(1280))
        small = numbers[np.isin(numbers, np.flatnonzero(RowReader(examples, "train").column("domain") == 2))]
        assert np.array_equal(np.sort(small[: sizes[2]]), np.unique(small))
    weighted = drawn(feed(examples, domain_weight=1.0), 200)
    sums = np.bincount(weighted["domain"], weighted["weight"])
    np.testing.assert_allclose(sums / sums.sum(), 1 / 3, atol=0.05)


@pytest.mark.parametrize("more", [{}, {"balance": 1.0, "domain_weight": 1.0}, {"order": "time"}])
def test_some_domains_alone_are_their_rows_once_an_epoch(examples: Examples, more: dict[str, Any]) -> None:
    names, domain = list(examples.manifest["domains"]), RowReader(examples, "train").column("domain")
    wanted = [names[2], names[0]]
    batches = feed(examples, domains=wanted, **more)
    mine = np.flatnonzero(domain != 1)
    assert batches.epoch_targets == [len(mine)]
    numbers = batches.numbers(np.arange(len(mine)))
    assert set(domain[numbers]) == {0, 2}
    if not more.get("balance"):
        assert sorted(numbers.tolist()) == mine.tolist()
    with pytest.raises(ConfigError, match="no domain elsewhere"):
        feed(examples, domains=["elsewhere"])


def test_held_rows_come_once_and_in_order(examples: Examples) -> None:
    reader = RowReader(examples, "test")
    for count in (1, 2):
        parts = [list(held_rows(reader, batch_size=32, process_index=k, process_count=count)) for k in range(count)]
        assert len({len(part) for part in parts}) == 1
        numbers = np.concatenate([n for step in zip(*parts, strict=True) for n, _ in step])
        weights = np.concatenate([b["row_weight"] for step in zip(*parts, strict=True) for _, b in step])
        assert numbers[numbers >= 0].tolist() == list(range(len(reader))) and ((numbers >= 0) == weights).all()
    _, first = next(held_rows(reader, batch_size=20))
    assert first.pop("row_weight").all()
    same(reader.read(np.arange(20)), first)


def test_rows_read_from_disk_are_those_in_memory(examples: Examples) -> None:
    source = examples.source("train", memory_bytes=0)
    assert isinstance(source, DiskSource)
    rows = np.array([5, 3, 99, 3])
    same(RowReader(examples, "train", source=source).read(rows), RowReader(examples, "train").read(rows))


def test_labels_of_a_teacher_go_with_their_rows(examples: Examples, tmp_path: Path) -> None:
    count = examples.count("train")
    said = {"click": np.arange(count, dtype=np.float32), "like": -np.arange(count, dtype=np.float32)}
    write_labels(tmp_path / "store", examples, said, recipe="teacher")
    batches = feed(examples, labels=LabelStore(path=str(tmp_path / "store")))
    numbers, found = batches.numbers(np.arange(320)), drawn(batches, 10)
    np.testing.assert_array_equal(found["teacher/click"], numbers)
    np.testing.assert_array_equal(found["teacher/like"], -numbers)
    only = feed(examples, labels=LabelStore(path=str(tmp_path / "store"), names=("like",)))
    assert "teacher/click" not in next(only)
    with pytest.raises(ArtifactError, match="no labels 'buy'"):
        feed(examples, labels=LabelStore(path=str(tmp_path / "store"), names=("buy",)))
    told_less = dataclasses.replace(TASK, fields=TASK.fields[:1])
    assert told_less.work().facts["rows_hash"] == examples.manifest["rows_hash"]
    fewer = dataclasses.replace(TASK, keep_negatives=0.5)
    assert fewer.work().facts["rows_hash"] != examples.manifest["rows_hash"]
    other = dataclasses.replace(examples, manifest={**examples.manifest, "rows_hash": {"train": "another"}})
    with pytest.raises(ArtifactError, match="labels are of the rows"):
        feed(other, labels=LabelStore(path=str(tmp_path / "store")))
    with pytest.raises(ValueError, match=f"not {count} labels"):
        write_labels(tmp_path / "more", examples, {"click": np.zeros(3, np.float32)})


def test_a_run_does_not_go_on_with_what_another_teacher_said(examples: Examples, tmp_path: Path) -> None:
    said = np.zeros(examples.count("train"), np.float32)
    for name, value in (("one", 0.0), ("other", 1.0)):
        write_labels(tmp_path / name, examples, {"click": said + value}, step=7)
    one, again, other = (feed(examples, labels=LabelStore(path=str(tmp_path / n))) for n in ("one", "one", "other"))
    next(one)
    again.set_state(one.get_state())
    same(next(one), next(again))
    with pytest.raises(CheckpointError, match="another teacher"):
        other.set_state(one.get_state())


def test_hidden_positives_leave_the_totals_alone_and_missing_rows_without_weight(examples: Examples) -> None:
    noise = {"hidden": HiddenPositives(head="click", share=1.0), "totals": Totals(head="click")}
    batches, reader = feed(examples, missing=MissingPeriod(share=0.5), **noise), RowReader(examples, "train")
    numbers, found = batches.numbers(np.arange(320)), drawn(batches, 10)
    assert (found["label/click"] == 0).all() and found["label/like"].any()
    label, domain = reader.column("labels")[:, 0], reader.column("domain")
    rate = np.array([label[domain == d].mean() for d in range(domain.max() + 1)])
    np.testing.assert_allclose(found["label/total"], rate[domain[numbers]], rtol=1e-6)
    np.testing.assert_array_equal(found["weight"], numbers < len(reader) / 2)
    with pytest.raises(ConfigError, match="no head 'buy'"):
        feed(examples, totals=Totals(head="buy"))


def test_what_cannot_be_fed_is_refused(examples: Examples, prepare_here: Callable[..., None]) -> None:
    for settings in ({"batch_size": 0}, {"batch_size": 8, "order": "random"}, {"batch_size": 8, "balance": 2.0}):
        with pytest.raises(ConfigError):
            RowsFeed(**settings)
    with pytest.raises(ConfigError, match="cannot be divided"):
        feed(examples, place=(0, 3))
    with pytest.raises(ConfigError, match="2 tasks"):
        RowsBatches([examples, examples], RowsFeed(batch_size=8), seed=0)
    plain = dataclasses.replace(examples, manifest={**examples.manifest, "domains": []})
    with pytest.raises(ConfigError, match="need domains"):
        feed(plain, balance=0.5)
    log = NextItem(data=DataDir(simulate=World(num_events=400)))
    prepare_here(log)
    with pytest.raises(ExamplesError, match="no rows with labels"):
        feed(Examples.open(place_of(log).path))
