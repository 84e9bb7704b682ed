"""The exported function is the model: same scores for any batch; a bundle is written whole or not at all."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import recjax
from recjax.core.errors import BundleError, RecjaxError, RequestError
from recjax.core.folder import write_manifest
from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.core.state import by_path
from recjax.data.vocab import FIRST_ITEM, ItemVocab
from recjax.export import export_bundle
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig
from recjax.recommend import make_recommend
from recjax.serve.bundle import Bundle

LENGTH, ITEMS = 7, 300
WRITTEN = ("files", "recjax_version", "created", "manifest_hash")  # by write_manifest
VOCAB = ItemVocab(tuple(f"item {i}" for i in range(ITEMS)))
TITLES = [None] * VOCAB.num_rows
CONFIG = TransformerConfig(num_layers=1, width=16, num_heads=2)


def sequence(kind=Sequence, *, num_rows=VOCAB.num_rows, transformer=CONFIG):
    return Functional(lambda rngs: kind(num_rows=num_rows, encoder=transformer, max_length=LENGTH, rngs=rngs))


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)


def own_answer(model, params, history, seen_ids, k):
    """The model's own scores of all rows, ordered by numpy."""
    batch = {
        "history_ids": history,
        "positions": np.where(history > 0, np.arange(LENGTH)[None, :], 0),
        "segment_ids": (history > 0).astype(np.int32),
    }
    out = jax.jit(lambda params, batch: model.apply(params, batch, train=False, key=None))(params, batch)
    hidden = np.asarray(out["hidden"])[np.arange(len(history)), (history > 0).sum(1) - 1]
    scores = hidden @ np.asarray(out["table"]).T
    scores[:, :FIRST_ITEM] = scores[:, FIRST_ITEM + ITEMS :] = -np.inf
    np.put_along_axis(scores, seen_ids, -np.inf, axis=1)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, best, 1), best


def random_batch(rng, rows, seen):
    history = rng.integers(1, FIRST_ITEM + ITEMS, (rows, LENGTH), dtype=np.int32)
    for i, length in enumerate(rng.integers(1, LENGTH + 1, rows)):
        history[i, length:] = 0
    return history, rng.integers(0, FIRST_ITEM + ITEMS, (rows, seen), dtype=np.int32)


@pytest.fixture(scope="module")
def sasrec(tmp_path_factory):
    model = sequence()
    params = random_params(model)
    path = tmp_path_factory.mktemp("export") / "sasrec"
    facts = {"name": "sasrec", "recipe": "sasrec/1", "step": 300, "checkpoint": "run/checkpoints/300"}
    export_bundle(model, params, vocab=VOCAB, titles=TITLES, out=path, history_length=LENGTH, max_k=25, **facts)
    return model, params, path


@pytest.mark.parametrize(("rows", "seen"), [(1, 3), (5, 64)])
def test_scores_equal_those_of_the_model(sasrec, rows, seen):
    model, params, path = sasrec
    history, seen_ids = random_batch(np.random.default_rng(rows), rows, seen)
    scores, found = Bundle(path).recommend(history, seen_ids)
    expected, best = own_answer(model, params, history, seen_ids, 25)
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(found, best)


def test_the_manifest_says_what_it_is(sasrec):
    manifest = json.loads((sasrec[2] / "manifest.json").read_text())
    expected = {
        "name": "sasrec",
        "recipe": "sasrec/1",
        "step": 300,
        "checkpoint": "run/checkpoints/300",
        "max_k": 25,
        "history_length": LENGTH,
        "num_items": ITEMS,
        "vocabulary_hash": VOCAB.hash,
        "jax_version": jax.__version__,
        "recjax_version": recjax.__version__,
        "platforms": ["cpu", "cuda", "tpu"],
        "platforms_refused": {},
    }
    assert {name: manifest[name] for name in expected} == expected
    assert manifest["weights"]["table"] == f"float32 [{VOCAB.num_rows}, 16]"
    assert (sasrec[2] / "weights.safetensors").stat().st_size > 4 * 16 * VOCAB.num_rows
    assert (sasrec[2] / "recommend.jaxexport").stat().st_size < 100_000  # no weights inside


def test_the_answer_depends_on_the_weights_file_alone(sasrec, tmp_path):
    """Nothing of the parameters is part of the program: other weights in the same bundle give the other answer."""
    model, _, path = sasrec
    other = random_params(model, 1)
    copy = shutil.copytree(path, tmp_path / "copy")
    save_file(by_path(other), copy / "weights.safetensors")
    manifest = json.loads((copy / "manifest.json").read_text())
    write_manifest(copy, {name: value for name, value in manifest.items() if name not in WRITTEN})
    history, seen_ids = random_batch(np.random.default_rng(0), 2, 3)
    scores, _ = Bundle(copy).recommend(history, seen_ids)
    np.testing.assert_allclose(scores, own_answer(model, other, history, seen_ids, 25)[0], atol=1e-5, rtol=1e-5)


def test_sharded_parameters_of_an_untied_model_in_half_precision(tmp_path):
    """Parameters that lie on eight devices under a mesh give the bundle that they would give on one."""
    half = dataclasses.replace(CONFIG, dtype="bfloat16", tied_head=False, position="rotary")
    model = sequence(transformer=half)
    params = random_params(model)
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    sharded = jax.device_put(params, mesh.shardings(model.axes))
    export_bundle(model, sharded, vocab=VOCAB, titles=TITLES, out=tmp_path / "b", history_length=LENGTH)
    history, seen = random_batch(np.random.default_rng(0), 3, 2)
    scores, _ = Bundle(tmp_path / "b").recommend(history, seen)
    expected, _ = jax.jit(make_recommend(model, num_items=ITEMS, k=100))(params, history, seen)
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-5)


class NeedsTime(Sequence):
    def __call__(self, batch, *, train, key):
        return super().__call__({**batch, "segment_ids": batch["history_time"]}, train=train, key=key)


class Lately(Sequence):
    """Events long before the question count for less; without times in the batch it cannot be called."""

    def __call__(self, batch, *, train, key):
        out = super().__call__({k: v for k, v in batch.items() if k != "query_at"}, train=train, key=key)
        age = (batch["query_time"] - batch["history_time"])[..., None]
        return {**out, "hidden": out["hidden"] * jnp.exp2(-age / 100.0)}


def test_times_of_events_and_of_the_question_reach_the_model(tmp_path):
    model = sequence(Lately)
    params = random_params(model)
    facts = {"vocab": VOCAB, "titles": TITLES, "history_length": LENGTH, "times": "target"}
    bundle = Bundle(export_bundle(model, params, out=tmp_path / "b", **facts))
    history, seen = random_batch(np.random.default_rng(0), 3, 2)
    times = np.arange(LENGTH, dtype=np.int32)[None] * 10 + np.zeros((3, 1), np.int32)
    last = times[np.arange(3), (history > 0).sum(1) - 1]
    soon, _ = bundle.recommend(history, seen, times, last)
    later, _ = bundle.recommend(history, seen, times, last + 100)
    plain, _ = jax.jit(make_recommend(sequence(), num_items=ITEMS, k=100))(params, history, seen)
    np.testing.assert_allclose(soon, plain, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(later, soon / 2, atol=1e-5, rtol=1e-5)
    user = bundle.encode([f"item {i}" for i in range(3)], [2**33, 2**33 + 5, 2**33 + 9], 2**33 + 10)
    assert (user.query_time - user.history_time).tolist() == [10, 5, 1]  # beyond int32, differences are right
    with pytest.raises(RequestError, match="history_time is missing"):
        bundle.encode(["item 0"])


def refused(tmp_path, match, error=BundleError, model=None, change=lambda params: params, **options):
    model = model or sequence()
    params = change(random_params(model))
    options = {"vocab": VOCAB, "titles": TITLES, "history_length": LENGTH, "out": tmp_path / "new", **options}
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error, match=match):
        export_bundle(model, params, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_what_cannot_be_exported_leaves_nothing_behind(tmp_path, sasrec, monkeypatch):
    refused(tmp_path, "overwrite", out=sasrec[2])
    refused(tmp_path, "not finite", change=lambda p: {**p, "position": p["position"] * np.nan})
    refused(tmp_path, "history_time", error=RecjaxError, model=sequence(NeedsTime))
    (tmp_path / "file").write_text("")
    refused(tmp_path, "cannot write", out=tmp_path / "file" / "below")
    answer = Bundle.recommend
    monkeypatch.setattr(Bundle, "recommend", lambda *args: tuple(x + 1 for x in answer(*args)))
    refused(tmp_path, "answers differently")


def test_a_platform_that_refuses_is_left_out_and_named(tmp_path, monkeypatch):
    real = jax.export.export

    def export(function, *, platforms):
        if "tpu" in platforms:
            raise NotImplementedError("no such kernel\nin many lines")
        return real(function, platforms=platforms)

    monkeypatch.setattr("jax.export.export", export)
    few = ItemVocab(("a", "b", "c"))
    model = sequence(num_rows=few.num_rows)
    options = {"vocab": few, "titles": [None] * few.num_rows, "out": tmp_path / "b", "history_length": LENGTH}
    manifest = Bundle(export_bundle(model, random_params(model), **options)).manifest
    assert manifest["platforms"] == ["cpu", "cuda"]
    assert manifest["platforms_refused"] == {"tpu": "NotImplementedError: no such kernel"}
    assert manifest["max_k"] == 3  # no more than there are items
