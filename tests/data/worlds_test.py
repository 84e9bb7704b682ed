"""The small worlds: the knob has the value that was asked for, counted anew in the tables, and nothing else tells."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError
from recjax.data.check import check
from recjax.data.draws import Stream
from recjax.data.sources import DataDir
from recjax.data.tables import Tables
from recjax.data.world_parts import bell, deck, kl, tilted
from recjax.data.worlds import WORLDS, PopularityShift, SharedHistories, SharedQueries
from recjax.tasks.next_item import NextItem
from recjax.tasks.search import Search
from recjax.tasks.work import examples_of

SHIFT = PopularityShift(items=100, users=1000, held_out=100)


def split(frame: pl.DataFrame | None, name: str) -> pl.DataFrame:
    assert frame is not None
    return frame.filter(pl.col("split") == name)


def trained_answers(tables: Tables) -> dict[int, set[int]]:
    """query -> items of its training pairs."""
    found: dict[int, set[int]] = {}
    for query, item in split(tables.relevance, "train").select("query_id", "item_id").iter_rows():
        found.setdefault(query, set()).add(item)
    return found


def rho_of_next_items(tables: Tables) -> float:
    """S2 by hand: test targets that answer a trained query together with the item before."""
    answers, shared = trained_answers(tables).values(), []
    for _, user in tables.interactions.group_by("user_id"):
        items, marks = user["item_id"].to_list(), user["split"].to_list()
        if marks[-1] == "test":
            shared.append(any({items[-1], items[-2]} <= both for both in answers))
    return float(np.mean(shared))


def rho_of_answers(tables: Tables) -> float:
    """S3 by hand: test answers that are in a training history with a trained answer of the query."""
    log, answers = split(tables.interactions, "train"), trained_answers(tables)
    histories = [set(user["item_id"]) for _, user in log.group_by("user_id")]
    test = split(tables.relevance, "test").select("query_id", "item_id")
    return float(np.mean([any(i in h and h & answers[q] for h in histories) for q, i in test.iter_rows()]))


@pytest.mark.parametrize("agreement", [-1.0, 0.0, 0.7])
@pytest.mark.parametrize("distances", [(0.0, 0.5), (0.2, 0.05), (1.5, 0.8)])
def test_popularity_is_as_far_away_as_asked(distances: tuple[float, float], agreement: float) -> None:
    world = dataclasses.replace(SHIFT, kl_rec=distances[0], kl_search=distances[1], agreement=agreement)
    made = world.make()
    measured = world.measured(made)
    counts = {
        "kl_rec": np.bincount(made.item[made.part == 0], minlength=100),
        "kl_search": np.bincount(made.answer[made.asked == 0], minlength=100),
    }
    assert measured["kl_rec"] == pytest.approx(distances[0], abs=0.003, rel=0.005)
    assert measured["kl_search"] == pytest.approx(distances[1], abs=0.003, rel=0.005)
    test = world.distributions()["test"]
    both = sum(c / c.sum() for c in counts.values()) / 2
    for name, p in {**{n: c / c.sum() for n, c in counts.items()}, "kl_joint": both}.items():
        assert measured[name] == pytest.approx(float((test * np.log(test / p)).sum()), abs=1e-6)
    for task in ("rec", "search"):
        assert measured[f"joint_helps_{task}"] == (measured["kl_joint"] < measured[f"kl_{task}"])
    held = np.bincount(made.item[made.part == 2], minlength=100) + np.bincount(
        made.answer[made.asked == 2], minlength=100
    )
    assert kl(np.where(held > 0, held, 0) / held.sum(), test) < 0.15


def test_errors_that_cancel_are_what_joint_training_gains_from() -> None:
    joint = {
        a: world.measured(world.make())["kl_joint"]
        for a in (-1.0, 0.0, 1.0)
        for world in [dataclasses.replace(SHIFT, kl_rec=0.5, kl_search=0.5, agreement=a)]
    }
    assert joint[-1.0] < joint[0.0] < joint[1.0] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("rho", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("kind", [SharedQueries, SharedHistories])
def test_the_share_that_the_other_task_knows_is_the_one_asked_for(kind: Any, rho: float) -> None:
    world = kind(items=160, rho=rho, seed=3)
    measured = world.measured(world.make())
    assert measured == {"rho": rho, "targets": 40}
    by_hand = rho_of_next_items if kind is SharedQueries else rho_of_answers
    assert by_hand(world.tables()) == pytest.approx(rho)


def test_histories_do_not_show_what_is_asked_of_shared_queries() -> None:
    made, parts = SharedQueries(items=160, rho=0.5).make(), SharedQueries(items=160).parts()
    train = made.part == 0
    follows = (made.user[1:] == made.user[:-1]) & train[1:]
    for before, item in zip(made.item[:-1][follows].tolist(), made.item[1:][follows].tolist(), strict=True):
        assert not parts[before // 2]  # nothing comes after an item of a held-out pair
        assert item == before ^ 1 or parts[item // 2]
    targets = np.flatnonzero(~train)
    assert (made.item[targets] == made.item[targets - 1] ^ 1).all() and parts[made.item[targets] // 2].all()


@pytest.mark.parametrize("kind", [SharedQueries, SharedHistories])
def test_items_are_equally_often_a_target(kind: Any) -> None:
    world = kind(items=160)
    tables = world.tables()
    for frame in (tables.interactions.filter(pl.col("order") > 0), tables.relevance):
        counts = Counter(split(frame, "train")["item_id"])
        assert len(counts) == world.items and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("world", [SHIFT, SharedQueries(items=160), SharedHistories(items=160)])
def test_a_world_is_a_data_directory_whose_splits_the_tasks_keep(world: Any, tmp_path: Path) -> None:
    path = world.write(tmp_path / "world")
    said = json.loads((path / "simulated.json").read_text())
    assert said["kind"] == world.kind and said["measured"] == world.measured(world.make())
    report = check(DataDir(path=str(path)))
    assert report.ok and "this is simulated data" in report.understood
    for data in (DataDir(path=str(path)), DataDir(simulate=world)):
        tables = data.load()
        assert tables.simulated and tables.queries is not None and tables.queries["text"].is_unique().all()
        log = NextItem(data=data, split="given", catalogue="items")
        works = log.work(), Search(log=log, split="given").work()
        assert works[0].vocab == works[1].vocab and works[0].vocab.num_items == world.items
        for name in ("valid", "test"):
            held = split(tables.interactions, name)["item_id"].to_list()
            assert [
                log_label for log_label in works[0].vocab.decode([e["label"] for e in examples_of(works[0], name)])
            ] == held
            answers = Counter(split(tables.relevance, name)["item_id"])
            assert Counter(works[1].vocab.decode([e["label"] for e in examples_of(works[1], name)])) == answers
        trained = works[1].facts["counts"]["train"]["examples"]
        assert trained == split(tables.relevance, "train").height


def test_the_same_settings_give_the_same_world() -> None:
    for name, kind in WORLDS.items():
        world = kind(items=64, seed=1)
        assert world.tables().interactions.equals(world.tables().interactions) and kind.kind == name
        assert world.hash != kind(items=64, seed=2).hash
        assert not world.tables().interactions.equals(kind(items=64, seed=2).tables().interactions)
        if (judged := world.tables().relevance) is not None:
            assert not judged.equals(kind(items=64, seed=2).tables().relevance)
    assert len({kind(items=64).hash for kind in WORLDS.values()}) == len(WORLDS)


def test_a_deck_has_every_item_as_often_as_its_share() -> None:
    p = np.array([0.5, 0.301, 0.199])
    counts = np.bincount(deck(p, 1000, Stream(0, 1)), minlength=3)
    assert counts.tolist() == [500, 301, 199] and np.bincount(deck(p, 7, Stream(0, 1)), minlength=3).sum() == 7


def test_a_tilt_is_as_far_as_asked_or_refused() -> None:
    p = np.full(50, 1 / 50)
    direction = bell(Stream(0, 1), 50)
    assert abs(direction.mean()) < 0.5 and 0.7 < direction.std() < 1.3
    for distance in (0.1, 0.5, 1.5):
        assert kl(p, tilted(p, direction, distance, draws=10**6)) == pytest.approx(distance, abs=1e-4)
    with pytest.raises(ConfigError, match="nats away"):
        tilted(p, direction, 10.0, draws=100)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PopularityShift(agreement=2),
        lambda: PopularityShift(users=10, held_out=6),
        lambda: PopularityShift(items=1000, users=100, events=5, held_out=5).tables(),
        lambda: SharedQueries(rho=1.5),
        lambda: SharedQueries(items=17),
        lambda: SharedHistories(repeats=0),
    ],
)
def test_settings_that_make_no_world_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
