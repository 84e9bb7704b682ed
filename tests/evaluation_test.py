"""The evaluator against a brute-force evaluation of the same model, user by user, whatever the batch and the mesh."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from recjax.baselines.records import Records
from recjax.core.errors import ConfigError, ExamplesError, TrainingError
from recjax.core.module import Functional, Module, param
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.data.examples import Examples, write_examples
from recjax.data.record import Column, Field
from recjax.data.vocab import FIRST_ITEM, ItemVocab
from recjax.evaluation import Evaluation, Evaluator, evaluate, rank_baselines, result_of
from recjax.metrics.topk import per_user
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.result_files import compare, save

ITEMS, USERS, LENGTH = 60, 37, 4
TRAIN = [Field(name="user_index", dtype="int64", rank=0), Field(name="items", dtype="int32", rank=1)]
HELD = [*TRAIN, Field(name="label", dtype="int32", rank=0), Field(name="train_events", dtype="int32", rank=0)]
CONFIG = Evaluation(k=(1, 5, 10), batch_size=8, bootstrap_samples=200, cold_events=3, samples=2)


class Nearest(Module):
    """Scores an item by its likeness to the last one, plus a bias."""

    def __init__(self, *, num_rows, rngs):
        self.table = param(rngs, (num_rows, 8), ("items", None), jax.nn.initializers.normal(1.0))

    def __call__(self, batch, *, train, key):
        return {"hidden": self.table[...][batch["history_ids"]] * 0.5, "table": self.table[...]}


def histories(seed=0):
    rng = np.random.default_rng(seed)
    out = [rng.integers(2, 2 + ITEMS, int(rng.integers(3, 12))).astype(np.int32) for _ in range(USERS)]
    out[3][-1] = out[3][0]  # a target that the user had before
    return out


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Examples:
    events = histories()
    vocab = ItemVocab(tuple(f"item{i}" for i in range(ITEMS)))
    count = np.bincount(np.concatenate([e[:-2] for e in events]), minlength=2 + ITEMS)[2 : 2 + ITEMS]
    row = np.arange(FIRST_ITEM, FIRST_ITEM + ITEMS)
    items = pl.DataFrame(
        {"row": row, "item_id": vocab.ids, "train_count": count, "title": [f"Title {i}" for i in range(ITEMS)]}
    )
    users = pl.DataFrame({"user_index": np.arange(USERS), "user_id": np.arange(USERS)})
    path = tmp_path_factory.mktemp("examples") / "next_item"
    facts = {"task": "next_item", "content_hash": "0123456789ab", "split_rule": "leave one out", "simulated": True}
    with write_examples(path, vocab=vocab, items=items, users=users, facts=facts) as writer:
        writer.add("train", TRAIN, columns([e[:-2] for e in events]))
        writer.add("valid", HELD, columns([e[:-2] for e in events], [e[-2] for e in events]))
        writer.add("test", HELD, columns([e[:-1] for e in events], [e[-1] for e in events]))
        writer.add("empty", HELD, columns([], []))
    return Examples.open(path)


def columns(items, label=None):
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in items])]).astype(np.int64)
    out = {"user_index": Column(np.arange(len(items))), "items": Column(np.concatenate([*items, np.zeros(0)]), offsets)}
    if label is not None:
        out |= {"label": Column(np.array(label)), "train_events": Column(np.array([len(i) for i in items]))}
    return out


@pytest.fixture(scope="module")
def model(examples):
    return Functional(lambda rngs: Nearest(num_rows=examples.vocab.num_rows, rngs=rngs))


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def brute_force(params, seen, counted=range(USERS)):
    table = np.asarray(params["table"])
    ranks, top = [], []
    for user in counted:
        events = histories()[user]
        label, history = int(events[-1]), events[:-1].tolist()
        scores = table @ (table[history[-1]] * np.float32(0.5))
        removed = set(history) - {label} if seen == "removed" else set()
        order = sorted((r for r in range(2, 2 + ITEMS) if r not in removed), key=lambda r, s=scores: (-s[r], r))
        ranks.append(order.index(label))
        top.append(order[:10])
    return np.array(ranks), top


def evaluator_of(examples, model, config=CONFIG, mesh=None):
    return Evaluator(examples, split="test", config=config, model=model, history_length=LENGTH, mesh=mesh)


@pytest.mark.parametrize("seen", ["removed", "kept"])
def test_equals_brute_force(examples, model, params, seen):
    config = Evaluation(k=(1, 5, 10), batch_size=8, seen=seen)
    found = evaluator_of(examples, model, config)(params)
    ranks, top = brute_force(params, seen)
    np.testing.assert_array_equal(found.rank, ranks)
    for name, value in per_user(ranks, (1, 5, 10)).items():
        assert found.values[name] == pytest.approx(value.mean())
    assert found.values["coverage@10"] == len({r for rows in top for r in rows}) / ITEMS
    for user, rows in found.recommended.items():
        assert rows == top[user]
    assert len(found.recommended) == 3


def test_likelihood_is_that_of_a_softmax_over_the_whole_catalogue(examples, model, params):
    evaluator = Evaluator(examples, split="test", config=CONFIG, model=model, history_length=LENGTH, temperature=0.5)
    found, table = evaluator(params), np.asarray(params["table"], np.float64)
    expected = []
    for events in histories():
        logits = table @ (table[events[-2]] * 0.5) / 0.5
        expected.append(np.log(np.exp(logits[2 : 2 + ITEMS]).sum()) - logits[events[-1]])
    np.testing.assert_allclose(found.nll, expected, rtol=1e-5)
    assert found.values["nll"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert found.values["mrr"] == pytest.approx(np.mean(1 / (found.rank + 1.0)))


def test_a_rank_among_sampled_candidates_comes_beside_the_full_one(examples, model, params):
    config = Evaluation(k=(1, 5), batch_size=8, candidates=20, baselines=("popularity",), seed=4)
    result = evaluate(model, params, examples, config=config, history_length=LENGTH)
    full = evaluate(model, params, examples, config=dataclasses.replace(config, candidates=0), history_length=LENGTH)
    evaluator = evaluator_of(examples, model, config)
    table, count = np.asarray(params["table"]), examples.item_count
    assert evaluator.candidates is not None
    for user, events in enumerate(histories()):
        drawn = evaluator.candidates[evaluator.records.user_index == user][0].tolist()
        assert len(set(drawn)) == 20 and not set(drawn) & set(events.tolist())
        for name, scores in (("model", table @ (table[events[-2]] * np.float32(0.5))), ("popularity", count)):
            order = sorted([*drawn, events[-1]], key=lambda r, s=scores: (-s[r], r))
            sampled = result.systems[name].sampled_rank
            assert sampled is not None and sampled[user] == order.index(events[-1])
            assert result.systems[name].rank[user] == full.systems[name].rank[user]
    metrics = result.metrics()
    assert {"sampled_recall@5", "sampled_ndcg@5", "sampled_mrr", "recall@5"} <= set(metrics["intervals"]["popularity"])
    assert metrics["rows"]["model"].keys() == set(config.metrics)
    assert metrics["protocol"]["sampled_candidates"] == 20 and full.metrics()["protocol"]["sampled_candidates"] == 0


@pytest.mark.parametrize(("shape", "preset"), [("data=8", "data"), ("data=4,model=2", "fsdp_model")])
def test_batch_and_mesh_do_not_matter(examples, model, params, shape, preset):
    expected = evaluator_of(examples, model, Evaluation(k=(1, 5, 10), batch_size=64, candidates=9))(params)
    mesh = make_mesh(MeshConfig(shape=shape, preset=preset))
    placed = jax.tree.map(jax.device_put, params, mesh.shardings(model.axes))
    found = evaluator_of(examples, model, Evaluation(k=(1, 5, 10), batch_size=13, block=50, candidates=9), mesh)(placed)
    np.testing.assert_array_equal(found.rank, expected.rank)
    assert found.values["nll"] == pytest.approx(expected.values["nll"], rel=1e-6)
    one, other = ({k: v for k, v in s.values.items() if k != "nll"} for s in (found, expected))
    assert one == pytest.approx(other, rel=1e-12)
    assert found.recommended == expected.recommended


def test_one_compilation_per_shape(examples, model, params):
    evaluator = evaluator_of(examples, model)
    evaluator(params)
    evaluator(params)
    shapes = {(batch["seen_ids"].shape, batch["history_ids"].shape) for batch in evaluator.batches()}
    assert evaluator._step._cache_size() == len(shapes)


def test_padding_of_a_whole_batch_is_cut_off(examples, model, params, monkeypatch):
    monkeypatch.setattr("recjax.evaluation._SMALLEST_WIDTH", 2)
    evaluator = Evaluator(examples, split="test", config=CONFIG, model=model, history_length=8)
    widths = [batch["history_ids"].shape[1] for batch in evaluator.batches()]
    assert widths == sorted(widths, reverse=True) and widths[0] == 8 and widths[-1] in (2, 4)
    np.testing.assert_array_equal(evaluator(params).rank, brute_force(params, "removed")[0])


def test_users_packed_into_rows_are_ranked_as_in_rows_of_their_own(examples, monkeypatch):
    monkeypatch.setattr("recjax.ranking.SLOTS", 16)  # a batch goes through the model two rows at a time
    encoder = TransformerConfig(width=16, num_heads=2, num_layers=2)
    model = Functional(
        lambda rngs: Sequence(num_rows=examples.vocab.num_rows, max_length=8, encoder=encoder, rngs=rngs)
    )
    params = jax.tree.map(lambda x: x * 3, model.init(jax.random.key(1)))
    evaluator = Evaluator(examples, split="test", config=CONFIG, model=model, history_length=8)
    assert all(batch["query_at"].shape[1] <= 4 for batch in evaluator.batches())
    assert any((batch["segment_ids"] > 1).any() for batch in evaluator.batches())
    alone = Evaluator(examples, split="test", config=CONFIG, model=model, history_length=8)
    alone._packs = False
    found, expected = evaluator(params), alone(params)
    np.testing.assert_array_equal(found.rank, expected.rank)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-5)
    assert found.recommended == expected.recommended
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    placed = jax.tree.map(jax.device_put, params, mesh.shardings(model.axes))
    sharded = Evaluator(examples, split="test", config=CONFIG, model=model, history_length=8, mesh=mesh)(placed)
    np.testing.assert_array_equal(sharded.rank, expected.rank)


def test_a_sample_of_users_is_the_same_each_time_and_has_their_ranks(examples, model, params):
    config = Evaluation(k=(1, 5, 10), batch_size=8, max_users=11, seed=5)
    evaluator = evaluator_of(examples, model, config)
    users = Records.of(evaluator.examples, "test").user_index
    assert len(users) == 11 and users.tolist() != list(range(11))
    np.testing.assert_array_equal(evaluator(params).rank, brute_force(params, "removed", users.tolist())[0])
    again = evaluator_of(examples, model, config)
    np.testing.assert_array_equal(Records.of(again.examples, "test").user_index, users)


def test_baselines_share_users_and_protocol(examples, model, params, tmp_path):
    result = evaluate(model, params, examples, config=CONFIG, history_length=LENGTH, protocol={"seeds": {"train": 7}})
    assert list(result.systems) == ["model", "popularity", "item_graph", "item_knn"]
    count = examples.item_count
    for user, events in enumerate(histories()):
        removed = set(events[:-1].tolist()) - {int(events[-1])}
        order = sorted((r for r in range(2, 2 + ITEMS) if r not in removed), key=lambda r: (-count[r], r))
        assert result.systems["popularity"].rank[user] == order.index(events[-1])
    metrics = json.loads(save(result, tmp_path / "run").read_text())
    assert metrics["protocol"]["users"] == USERS
    assert metrics["protocol"]["catalogue_size"] == ITEMS
    assert metrics["protocol"]["seeds"] == {"train": 7, "evaluation": 0}
    assert set(metrics["rows"]["model"]) >= {"recall@10", "ndcg@10", "mrr@10", "coverage@10", "popularity@10"}
    for name, system in result.systems.items():
        for metric, (low, high) in metrics["intervals"][name].items():
            assert low <= system.values[metric] <= high
    difference = metrics["differences"]["popularity"]["recall@5"]
    means = metrics["rows"]["model"]["recall@5"] - metrics["rows"]["popularity"]["recall@5"]
    assert difference["mean"] == pytest.approx(means) and difference["low"] <= means <= difference["high"]
    buckets = metrics["buckets"]
    for kind in ("item", "user"):
        parts = [b for name, b in buckets.items() if name.startswith(kind)]
        assert sum(b["users"] for b in parts) == USERS
        whole = sum(b["users"] * b["rows"]["model"]["ndcg@10"] for b in parts) / USERS
        assert whole == pytest.approx(metrics["rows"]["model"]["ndcg@10"])
    shown = metrics["samples"][0]
    assert shown["target"].startswith("Title ") and len(shown["recommended"]["model"]) == 5
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["metrics.json", "per_user.npz"]


def test_two_runs_are_compared_user_by_user(examples, model, params, tmp_path):
    config = Evaluation(k=(1, 5, 10), batch_size=8, baselines=(), bootstrap_samples=200)
    for name, weights in (("a", params), ("b", model.init(jax.random.key(1)))):
        save(evaluate(model, weights, examples, config=config, history_length=LENGTH), tmp_path / name)
    found = compare(tmp_path / "a", tmp_path / "b", samples=200)
    ranks = brute_force(params, "removed")[0]
    assert found.users == USERS and found.ours["recall@10"] == pytest.approx((ranks < 10).mean())
    assert found.difference["recall@10"].mean == pytest.approx(found.ours["recall@10"] - found.theirs["recall@10"])
    same = compare(tmp_path / "a", tmp_path / "a").difference["ndcg@10"]
    assert (same.low, same.mean, same.high) == (0, 0, 0)

    kept = Evaluation(k=(1, 5, 10), batch_size=8, seen="kept", baselines=(), bootstrap_samples=50)
    save(evaluate(model, params, examples, config=kept, history_length=LENGTH), tmp_path / "kept")
    with pytest.raises(ConfigError, match="differ in seen"):
        compare(tmp_path / "a", tmp_path / "kept")
    timed = evaluate(model, params, examples, config=config, history_length=LENGTH, protocol={"target_time_used": True})
    save(timed, tmp_path / "timed")
    with pytest.raises(ConfigError, match="differ in target_time_used"):
        compare(tmp_path / "a", tmp_path / "timed")
    fewer = Evaluation(k=(1, 5, 10), batch_size=8, max_users=9, baselines=(), bootstrap_samples=50)
    save(evaluate(model, params, examples, config=fewer, history_length=LENGTH), tmp_path / "fewer")
    with pytest.raises(ConfigError, match="different users"):
        compare(tmp_path / "a", tmp_path / "fewer")
    with pytest.raises(ConfigError, match="no evaluation here"):
        compare(tmp_path / "a", tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no system 'item_knn'"):
        compare(tmp_path / "a", tmp_path / "b", system="item_knn")
    (tmp_path / "b" / "per_user.npz").write_bytes(b"PK rubbish")
    with pytest.raises(ConfigError, match="cannot be read"):
        compare(tmp_path / "a", tmp_path / "b")


def test_a_user_without_history_gets_the_catalogue_by_popularity(examples, model, params):
    evaluator = evaluator_of(examples, model)
    batch = next(evaluator.batches())
    batch = {**batch, "history_ids": batch["history_ids"] * 0, "query_at": batch["query_at"] * 0 - 1}
    found = evaluator._step(params, {**batch, "seen_ids": batch["seen_ids"] * 0}, evaluator.valid)
    np.testing.assert_array_equal(found.rank, batch["label_ids"] - FIRST_ITEM)


def test_an_output_that_is_not_a_number_is_an_error(examples, model, params):
    last, label = histories()[0][-2:].tolist()
    for row in (last, label):
        broken = {"table": params["table"].at[row].set(jnp.nan)}
        with pytest.raises(TrainingError, match="not a number"):
            evaluator_of(examples, model)(broken)


def test_mistakes_are_named(examples, model):
    for wrong in ({"k": ()}, {"k": (0,)}, {"seen": "hidden"}, {"baselines": ("oracle",)}, {"max_users": 0}):
        with pytest.raises(ConfigError):
            Evaluation(**wrong)
    with pytest.raises(ConfigError, match="catalogue of 60 items"):
        evaluator_of(examples, model, Evaluation(k=(10, 61)))
    for split in ("empty", "nothing"):
        with pytest.raises(ExamplesError):
            Evaluator(examples, split=split, config=CONFIG)


def test_baselines_alone_need_no_model(examples):
    evaluator = Evaluator(examples, split="valid", config=Evaluation(k=(5,), baselines=("popularity",)))
    result = result_of(evaluator, rank_baselines(evaluator), {})
    assert list(result.metrics()["rows"]) == ["popularity"] and result.metrics()["differences"] == {}


_PROCESS = """
import json, sys
import jax
from recjax.launch import cluster
from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.data.examples import Examples
from recjax.evaluation import Evaluation, Evaluator
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig

def ranked(path, devices):
    examples, config = Examples.open(path), TransformerConfig(width=8, num_heads=1, num_layers=1)
    rows = examples.vocab.num_rows
    model = Functional(lambda rngs: Sequence(num_rows=rows, max_length=4, encoder=config, rngs=rngs))
    mesh = make_mesh(MeshConfig(shape="data=-1", preset="fsdp"), devices)
    with mesh.activate():
        params = jax.jit(model.init, out_shardings=mesh.shardings(model.axes))(jax.random.key(0))
    how = Evaluation(k=(5, 10), batch_size=19)
    return Evaluator(examples, split="test", config=how, model=model, history_length=4, mesh=mesh)(params)

if __name__ == "__main__":
    cluster.initialize()
    found = ranked(sys.argv[1], jax.devices())
    print(json.dumps([found.rank.tolist(), dict(found.values), {str(k): v for k, v in found.recommended.items()}]))
"""


def test_several_processes_find_what_one_finds(examples):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    runs = []
    for number in range(2):
        place = {"RECJAX_COORDINATOR": address, "RECJAX_NUM_PROCESSES": "2", "RECJAX_PROCESS_ID": str(number)}
        env = {**os.environ, **place, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        command = [sys.executable, "-c", _PROCESS, str(examples.path)]
        runs.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE))
    here: dict = {"__name__": "here"}
    exec(_PROCESS, here)
    alone = here["ranked"](examples.path, jax.devices()[:4])
    first, second = (json.loads(run.communicate(timeout=120)[0].splitlines()[-1]) for run in runs)
    assert first == second
    assert first[0] == alone.rank.tolist()
    assert first[1] == pytest.approx(dict(alone.values))
    assert first[2] == {str(k): v for k, v in alone.recommended.items()}
