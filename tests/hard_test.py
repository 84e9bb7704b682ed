"""Hard tasks against brute force: the same users, changed histories and slices, ranked one by one."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Module, param
from recjax.data.candidates import share
from recjax.data.examples import Examples, write_examples
from recjax.data.record import Column, Field
from recjax.data.vocab import FIRST_ITEM, ItemVocab
from recjax.evaluation import Evaluation, evaluate
from recjax.metrics.buckets import ITEM_BUCKETS, item_buckets
from recjax.protocol import HARD
from recjax.result_files import save
from recjax.tables import hard_section, hard_tables

ITEMS, USERS, HELD = 40, 23, 4
ROWS = range(FIRST_ITEM, FIRST_ITEM + ITEMS)
FIELDS = {"user_index": ("int64", 0), "items": ("int32", 1), "times": ("int64", 1)}
MORE = {"label": ("int32", 0), "train_events": ("int32", 0), "label_time": ("int64", 0)}
AHEAD = {"future": ("int32", 1), "future_times": ("int64", 1)}


class Nearest(Module):
    """Scores an item by its likeness to the last one."""

    def __init__(self, *, num_rows, rngs):
        self.table = param(rngs, (num_rows, 8), ("items", None), jax.nn.initializers.normal(1.0))

    def __call__(self, batch, *, train, key):
        return {"hidden": self.table[...][batch["history_ids"]] * 0.5, "table": self.table[...]}


def histories():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 2 + ITEMS, int(rng.integers(9, 20))).astype(np.int32) for _ in range(USERS)]


def write(path, *, ahead=True, domain=True) -> Examples:
    """Users whose last `HELD` events are held out for test."""
    events = histories()
    vocab = ItemVocab(tuple(f"item{i}" for i in range(ITEMS)))
    count = np.bincount(np.concatenate([e[:-HELD] for e in events]), minlength=2 + ITEMS)[2 : 2 + ITEMS]
    items = pl.DataFrame({"row": list(ROWS), "item_id": vocab.ids, "train_count": count})
    if domain:
        items = items.with_columns(pl.Series("domain", [None if i == 0 else f"d{i % 5}" for i in range(ITEMS)]))
    users = pl.DataFrame({"user_index": np.arange(USERS), "user_id": np.arange(USERS)})
    with write_examples(path, vocab=vocab, items=items, users=users, facts={"content_hash": "0"}) as writer:
        order = np.random.default_rng(1).permutation(USERS)
        for split in ("train", "valid", "test"):
            wanted = FIELDS | (MORE if split != "train" else {}) | (AHEAD if ahead and split != "train" else {})
            schema = [Field(name=name, dtype=dtype, rank=rank) for name, (dtype, rank) in wanted.items()]
            writer.add(split, schema, {name: column(name, events, order) for name in wanted})
    return Examples.open(path)


def column(name, events, order):
    cut = [e[:-HELD] for e in events]
    lists = {
        "items": cut,
        "times": [np.arange(len(e)) for e in cut],
        "future": [e[-HELD:] for e in events],
        "future_times": [np.arange(HELD) + len(c) for c in cut],
    }
    if name in lists:
        chosen = [lists[name][u] for u in order]
        return Column(np.concatenate(chosen), np.concatenate([[0], np.cumsum([len(c) for c in chosen])]))
    one = {
        "user_index": np.arange(USERS),
        "label": np.array([e[-HELD] for e in events]),
        "train_events": np.array([len(c) for c in cut]),
        "label_time": np.array([len(c) for c in cut]),
    }
    return Column(one[name][order])


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Examples:
    return write(tmp_path_factory.mktemp("hard") / "x")


@pytest.fixture(scope="module")
def model():
    return Functional(lambda rngs: Nearest(num_rows=128, rngs=rngs))


CONFIG = Evaluation(
    k=(5, 10),
    batch_size=8,
    baselines=("popularity",),
    bootstrap_samples=20,
    hard=[name for name in HARD if name not in ("domains",)] + ["domains"],
    recent=3,
    seed=2,
)


@pytest.fixture(scope="module")
def result(examples, model):
    return evaluate(model, model.init(jax.random.key(0)), examples, config=CONFIG, history_length=6)


@pytest.fixture(scope="module")
def table(model):
    return np.asarray(model.init(jax.random.key(0))["table"])


def order_of(scores, seen, label=None):
    removed = set(map(int, seen)) - {label}
    return sorted((r for r in ROWS if r not in removed), key=lambda r: (-scores[r], r))


def rank(table, history, label, seen=None):
    scores = table @ (table[history[-1]] * np.float32(0.5)) if len(history) else np.zeros(len(table))
    return order_of(scores, history if seen is None else seen, int(label)).index(label)


def ndcg10(ranks):
    ranks = np.asarray(ranks)
    return np.where(ranks < 10, 1 / np.log2(ranks + 2.0), 0)


def expect(group, ranks, system="model"):
    np.testing.assert_allclose(group.values[system]["ndcg@10"], ndcg10(ranks))


def test_long_tail_parts_hold_equal_shares_of_events(result, examples):
    groups, count = result.hard["long_tail"].groups, examples.item_count
    order = sorted(ROWS, key=lambda r: (-count[r], r))
    part, before = {}, 0.0
    for row in order:
        part[row] = min(3, int(4 * before / count.sum())) if count[row] else 3
        before += count[row]
    for p in range(4):
        users = [u for u, e in enumerate(histories()) if part[int(e[-HELD])] == p]
        assert groups[f"G{p + 1}"].user_index.tolist() == users
        np.testing.assert_array_equal(
            groups[f"G{p + 1}"].values["model"]["mrr"], 1 / (result.systems["model"].rank[users] + 1.0)
        )


def test_items_are_new_that_nobody_had_in_training(result, examples):
    """And the rare ones are those of the bucket `tail`, which the report shows as well."""
    groups, labels = result.hard["new_items"].groups, np.array([e[-HELD] for e in histories()])
    known = {int(item) for e in histories() for item in e[:-HELD]}
    tail = item_buckets(examples.item_count, examples.vocab.valid)[labels] == ITEM_BUCKETS.index("tail")
    is_known = np.array([int(label) in known for label in labels])
    want = {"in training": is_known, "in training, rare": is_known & tail, "not in training": ~is_known}
    assert list(groups) == list(want) and tail.any() and (~is_known).any()
    for name, chosen in want.items():
        assert groups[name].user_index.tolist() == np.flatnonzero(chosen).tolist()
        expect(groups[name], result.systems["model"].rank[chosen])


def test_the_head_is_one_item_in_a_hundred(result, examples):
    groups, count = result.hard["head_torso"].groups, examples.item_count
    [head] = sorted(ROWS, key=lambda r: (-count[r], r))[:1]
    taken = np.array([int(e[-HELD]) for e in histories()])
    assert groups["head"].user_index.tolist() == np.flatnonzero(taken == head).tolist()
    assert groups["torso"].user_index.tolist() == np.flatnonzero(taken != head).tolist()


def test_cold_users_are_ranked_from_five_events_without_what_they_had(result, table):
    group = result.hard["cold_users"].groups["last 5 events"]
    expect(group, [rank(table, e[:-HELD][-5:], e[-HELD], seen=e[:-HELD]) for e in histories()])
    assert "coverage@10" in group.whole["model"]


def test_domains_seen_and_new(result):
    def domain(row):
        return (row - 2) % 5 if row > 2 else None

    seen = [u for u, e in enumerate(histories()) if e[-HELD] > 2 and domain(e[-HELD]) in map(domain, e[:-HELD])]
    groups = result.hard["domains"].groups
    assert groups["domain seen before"].user_index.tolist() == seen
    assert groups["domain new to the user"].user_index.tolist() == [u for u in range(USERS) if u not in seen]


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_deleted_events(result, table, rate):
    ranks = []
    for user, e in enumerate(histories()):
        history = e[:-HELD]
        place = np.arange(len(history))[::-1]
        kept = history[share(CONFIG.seed, 0, user, place) >= rate]
        ranks.append(rank(table, kept, e[-HELD], seen=history))
    expect(result.hard["robustness"].groups[f"{rate:.0%} deleted"], ranks)


def test_replaced_events_change_about_their_share_and_only_the_input(result, examples):
    from recjax.data.sampled import HeldExamples
    from recjax.data.views import replaced

    records = HeldExamples(examples.path, examples.manifest, None, 0).columns("test")
    for rate in (0.1, 0.5, 1.0):
        changed = replaced(records, rate, slice(2, 2 + ITEMS), 5)
        differs = changed["items"].values != records["items"].values
        assert abs(differs.mean() - rate * (1 - 1 / ITEMS)) < 0.1
        assert set(changed["items"].values.tolist()) <= set(ROWS)
        np.testing.assert_array_equal(changed["seen"].values, records["items"].values)
    assert set(result.hard["robustness"].groups) >= {"untouched", "30% replaced"}


def test_trajectories_after_true_events_and_after_own_choices(result, table):
    groups, own = result.hard["trajectory"].groups, [[] for _ in range(USERS)]
    for step in range(HELD):
        told, made, hits = [], [], []
        for user, e in enumerate(histories()):
            history, label = e[: len(e) - HELD + step], e[len(e) - HELD + step]
            told.append(rank(table, history, label))
            mine = np.concatenate([e[:-HELD], np.array(own[user], np.int32)]).astype(int)
            made.append(rank(table, mine, label))
            first = order_of(table @ (table[mine[-1]] * np.float32(0.5)), mine, int(label))[0]
            own[user].append(first)
            hits.append(first in e[-HELD:])
        expect(groups[f"step {step + 1}, true events before"], told)
        expect(groups[f"step {step + 1}, own choices before"], made)
        np.testing.assert_array_equal(groups[f"step {step + 1}, own choices before"].values["model"]["in_period"], hits)


def test_older_positions_lie_before_the_recent_events(result, table, examples):
    group = result.hard["older"].groups["older position"]
    by_user = dict(zip(group.user_index.tolist(), group.values["model"]["mrr"].tolist(), strict=True))
    for user, e in enumerate(histories()):
        train = e[:-HELD]
        if len(train) - CONFIG.recent - 1 < 1:
            assert user not in by_user
            continue
        possible = [1 / (1 + rank(table, train[:at], train[at])) for at in range(1, len(train) - CONFIG.recent)]
        assert any(by_user[user] == pytest.approx(p) for p in possible)
    assert "part of the training log" in result.hard["older"].about


def test_the_future_is_recommended_from_states_and_from_mean_vectors(result, table, examples):
    group = result.hard["future"].groups["held-out period"]
    expected = {name: [] for name in ("model", "mean of item vectors", "popularity")}
    users = []
    for user, e in enumerate(histories()):
        history, wanted = e[:-HELD], set(e[-HELD:].tolist()) - set(e[:-HELD].tolist())
        if not wanted:
            continue
        users.append(user)
        vectors = {"model": table[history[-1]] * np.float32(0.5), "mean of item vectors": table[history[-6:]].mean(0)}
        scores = {name: table @ vector for name, vector in vectors.items()} | {"popularity": examples.item_count}
        for name, values in scores.items():
            best = order_of(values, history)
            hits = np.array([r in wanted for r in best])
            precision = (np.cumsum(hits) / np.arange(1, len(best) + 1) * hits).sum() / len(wanted)
            expected[name].append(precision)
            assert hits.sum() == len(wanted)
    assert group.user_index.tolist() == users
    for name, values in expected.items():
        np.testing.assert_allclose(group.values[name][f"map@{ITEMS}"], values, rtol=1e-6)
        np.testing.assert_array_equal(group.values[name][f"recall@{ITEMS}"], 1)


def test_item_quality_parts_by_the_age_of_training_events(result):
    train = [e[:-HELD] for e in histories()]
    old = {r: sum((e[:-3] == r).sum() for e in train) for r in ROWS}
    total = {r: sum((e == r).sum() for e in train) for r in ROWS}
    labels = [int(e[-HELD]) for e in histories()]
    groups = result.hard["item_quality"].groups
    mostly = [u for u, r in enumerate(labels) if total[r] and old[r] > total[r] / 2]
    assert groups["mostly old"].user_index.tolist() == mostly
    assert len(groups["mostly recent"].user_index) == sum(total[r] > 0 for r in labels) - len(mostly)


def test_results_are_saved_and_shown(result, tmp_path):
    metrics = json.loads(save(result, tmp_path).read_text())
    assert list(metrics["hard"]) == list(CONFIG.hard)
    for task, found in metrics["hard"].items():
        for group in found["groups"].values():
            for system, row in group["rows"].items():
                assert all(
                    group["intervals"][system][m][0] <= row[m] <= group["intervals"][system][m][1] + 1e-12
                    for m in group["intervals"][system]
                ), task
    tables = hard_tables(metrics)
    assert [t.title for t in tables] == [name.replace("_", " ") for name in CONFIG.hard]
    section = hard_section(metrics)
    assert section.startswith("## Hard tasks") and "part of the training log" in section
    with np.load(tmp_path / "per_user.npz") as arrays:
        assert len(arrays["hard/older/older position/model/mrr"]) == len(arrays["hard/older/older position/user_index"])


def test_what_the_data_cannot_give_is_told(model, tmp_path):
    params = model.init(jax.random.key(0))
    bare = write(tmp_path / "bare", ahead=False, domain=False)
    for name, message in (("domains", "domain of each item"), ("future", "hold out a period")):
        config = dataclasses.replace(CONFIG, hard=(name,))
        with pytest.raises(ConfigError, match=message):
            evaluate(model, params, bare, config=config, history_length=6)
    with pytest.raises(ConfigError, match="there is no 'medium'"):
        Evaluation(hard=("medium",))
