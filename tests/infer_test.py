"""What is inferred, what is evaluated and what is served are the same, for every user of the split exactly once."""

import jax
import numpy as np
import polars as pl
import pytest

from recjax.core.artifact import read_artifact
from recjax.core.errors import ArtifactError, ConfigError, ExamplesError
from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.data.examples import Examples, write_examples
from recjax.data.pipeline import eval_batches
from recjax.data.sources import DataDir
from recjax.data.vocab import FIRST_ITEM
from recjax.export import export_bundle
from recjax.infer import infer
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig
from recjax.serve import features
from recjax.serve.bundle import Bundle
from recjax.tasks.next_item import NextItem
from recjax.tasks.work import columns_of, examples_of

LENGTH, USERS, ITEMS = 5, 37, 140


@pytest.fixture(scope="module")
def log():
    """user -> item ids, oldest first; a third of the items are missing from the items table, so they are unknown."""
    rng = np.random.default_rng(0)
    return {user: rng.integers(0, ITEMS, rng.integers(3, 30)).tolist() for user in range(USERS)}


@pytest.fixture(scope="module")
def examples(log, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    events = [(f"u{user}", item, at) for user, items in log.items() for at, item in enumerate(items)]
    pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(
        folder / "interactions.parquet"
    )
    known = [i for i in range(ITEMS) if i % 3]
    pl.DataFrame({"item_id": known, "title": [f"title {i}" for i in known]}).write_parquet(folder / "items.parquet")
    work = NextItem(data=DataDir(path=str(folder)), catalogue="items").work()
    path, facts = folder / "prepared", {"task": work.name, "content_hash": "0", **work.facts}
    with write_examples(path, vocab=work.vocab, items=work.items, users=work.users, facts=facts) as writer:
        for split, schema in work.schemas.items():
            writer.add(split, schema, columns_of(list(examples_of(work, split)), schema))
    return Examples.open(path)


@pytest.fixture(scope="module")
def model(examples):
    config = TransformerConfig(num_layers=1, width=8, num_heads=2)
    rows = examples.vocab.num_rows
    functional = Functional(lambda rngs: Sequence(num_rows=rows, encoder=config, max_length=LENGTH, rngs=rngs))
    rng, shapes = np.random.default_rng(1), jax.eval_shape(functional.init, jax.random.key(0))
    return functional, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)


@pytest.fixture(scope="module")
def recommendations(examples, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("infer") / "recommendations"
    facts = {"k": 20, "batch_size": 16, "recipe": "sasrec/1", "step": 9}
    infer(*model, examples, kind="recommendations", out=out, history_length=LENGTH, split="test", **facts)
    return read_artifact(out, kind="recommendations", vocabulary_hash=examples.vocab.hash)


def raw_history(log, examples, user_index):
    """What a caller would send for a user of the test split: everything before the last event."""
    return log[int(examples.user_ids()[user_index][1:])][:-1]


@pytest.mark.parametrize("length", [1, LENGTH, 40])
def test_feature_code_of_the_server_equals_that_of_evaluation(log, examples, length):
    users = 0
    for batch in eval_batches(examples, "test", batch_size=8, history_length=length):
        for i in np.flatnonzero(batch["row_weight"]):
            raw = raw_history(log, examples, batch["user_index"][i])
            user = features.encode_history(raw, examples.vocab, length)
            np.testing.assert_array_equal(
                features.pad([user.history_ids], count=1, width=length)[0], batch["history_ids"][i]
            )
            assert set(user.seen_ids) == set(batch["seen_ids"][i]) - {0, 1}
            assert user.unknown == sum(item % 3 == 0 for item in raw)
            users += 1
    assert users > USERS / 2


def test_every_user_once_and_no_filling_rows(log, examples, recommendations):
    expected = {i for i in range(USERS) if log[int(examples.user_ids()[i][1:])][-1] % 3}
    found = recommendations["user_index"]
    assert set(found.tolist()) == expected and len(found) == len(expected)
    assert len(found) % 16  # so there were rows to drop
    assert recommendations["rows"].shape == recommendations["scores"].shape == (len(found), 20)
    assert recommendations.manifest["about"]["split"] == "test" and recommendations.manifest["step"] == 9


def test_the_bundle_answers_raw_histories_with_what_was_inferred(log, examples, model, recommendations, tmp_path):
    export_bundle(
        *model, vocab=examples.vocab, titles=examples.titles(), out=tmp_path / "b", history_length=LENGTH, max_k=20
    )
    bundle = Bundle(tmp_path / "b")
    users = [bundle.encode(raw_history(log, examples, i)) for i in recommendations["user_index"]]
    history = features.pad([u.history_ids for u in users], count=len(users), width=LENGTH)
    scores, rows = bundle.recommend(history, features.pad([u.seen_ids for u in users], count=len(users), width=40))
    np.testing.assert_array_equal(rows, recommendations["rows"])
    np.testing.assert_allclose(scores, recommendations["scores"], rtol=1e-5, atol=1e-5)
    row = int(rows[0, 0])
    assert bundle.titles[row] == f"title {bundle.vocab.decode([row])[0]}"


def test_vectors_explain_the_scores(examples, model, recommendations, tmp_path):
    for kind in ("user_vectors", "item_vectors"):
        infer(*model, examples, kind=kind, out=tmp_path / kind, history_length=LENGTH, split="test", batch_size=10)
    users, items = read_artifact(tmp_path / "user_vectors"), read_artifact(tmp_path / "item_vectors")
    np.testing.assert_array_equal(items["rows"], FIRST_ITEM + np.arange(examples.vocab.num_items))
    np.testing.assert_array_equal(users["user_index"], recommendations["user_index"])
    picked = items["vectors"][recommendations["rows"] - FIRST_ITEM]
    scores = np.einsum("nd,nkd->nk", users["vectors"], picked)
    np.testing.assert_allclose(scores, recommendations["scores"], rtol=1e-5, atol=1e-5)


def test_a_mesh_changes_nothing_and_seen_items_may_stay(examples, model, recommendations, tmp_path):
    functional, params = model
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    sharded = jax.device_put(params, mesh.shardings(functional.axes))
    options = {"kind": "recommendations", "history_length": LENGTH, "k": 20, "batch_size": 5}
    infer(functional, sharded, examples, out=tmp_path / "mesh", mesh=mesh, **options)
    found = read_artifact(tmp_path / "mesh")
    np.testing.assert_array_equal(found["rows"], recommendations["rows"])
    np.testing.assert_allclose(found["scores"], recommendations["scores"], rtol=1e-5, atol=1e-5)
    infer(functional, params, examples, out=tmp_path / "all", exclude_seen=False, **options)
    everything = read_artifact(tmp_path / "all")
    assert (everything["scores"][:, 0] >= found["scores"][:, 0] - 1e-4).all()
    assert (everything["rows"] != found["rows"]).any()


def test_refusals_leave_nothing(examples, model, tmp_path):
    cases = [
        ({"kind": "poems"}, ConfigError, "cannot infer"),
        ({"kind": "recommendations", "k": 0}, ConfigError, "k is 0"),
        ({"kind": "user_vectors", "split": "train"}, ExamplesError, "no label"),
        ({"kind": "user_vectors", "split": "nope"}, ExamplesError, "no split"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            infer(*model, examples, out=tmp_path / "out", history_length=LENGTH, **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="overwrite"):
        infer(*model, examples, kind="item_vectors", out=tmp_path / "out", history_length=LENGTH)
