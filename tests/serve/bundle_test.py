"""A bundle answers as the model did, for every shape, without the training code; what does not fit is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from fastapi.testclient import TestClient

from recjax.core import folder
from recjax.core.errors import BundleError
from recjax.core.folder import hash_of
from recjax.data.text import TextConfig
from recjax.data.vocab import FIRST_ITEM, ItemVocab
from recjax.serve import bundle as layout
from recjax.serve import features
from recjax.serve.app import create_app
from recjax.serve.bundle import Bundle
from recjax.serve.stored import FORMAT, TEXT_FILE, WEIGHTS_FILE


@pytest.fixture(scope="module")
def bundle(exported):
    return Bundle(exported.path)


@pytest.mark.parametrize(("rows", "seen_width"), [(1, 1), (3, 40), (5, 7)])
def test_scores_and_order_follow_the_formula(exported, bundle, rows, seen_width):
    rng = np.random.default_rng(rows)
    last = FIRST_ITEM + exported.vocab.num_items
    history = [rng.integers(1, last, rng.integers(1, bundle.history_length + 1)) for _ in range(rows)]
    seen = rng.integers(FIRST_ITEM, last, (rows, seen_width)).astype(np.int32)
    seen[0, -1] = 0
    scores, found = bundle.recommend(features.pad(history, count=rows, width=bundle.history_length), seen)
    assert scores.shape == found.shape == (rows, bundle.max_k)
    for i in range(rows):
        expected = exported.oracle(history[i], seen[i])
        best = np.argsort(-expected, kind="stable")[: bundle.max_k]
        np.testing.assert_array_equal(found[i], best)
        np.testing.assert_allclose(scores[i], expected[best], rtol=1e-5, atol=1e-5)


def test_when_nearly_everything_is_seen_the_rest_comes_and_then_nothing(exported, bundle):
    everything = np.arange(FIRST_ITEM, FIRST_ITEM + exported.vocab.num_items, dtype=np.int32)
    history = features.pad([everything[:3]], count=1, width=bundle.history_length)
    scores, rows = bundle.recommend(history, everything[None, 2:])
    assert set(rows[0, :2]) == set(everything[:2]) and np.isfinite(scores[0, :2]).all()
    assert (rows[0, 2:] == 0).all() and np.isneginf(scores[0, 2:]).all()


TRAINING_CODE = ("flax", "optax", "orbax", "gin", "grain", "polars", "tensorflow", "seqio", "jaxtyping")
OURS = ("recjax.models", "recjax.nn", "recjax.tasks", "recjax.losses", "recjax.train", "recjax.core.module")
REFUSE = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        for banned in {TRAINING_CODE + OURS!r}:
            if name == banned or name.startswith(banned + "."):
                raise ImportError("serving must not import " + name)
sys.meta_path.insert(0, Refuse())
"""
ALONE = f"""{REFUSE}
import json
import numpy as np
from recjax.serve.bundle import Bundle
bundle = Bundle(sys.argv[1])
user = bundle.encode(json.loads(sys.argv[2]))
scores, rows = bundle.recommend(user.history_ids[None, :], user.seen_ids[None, :])
print(json.dumps([scores.tolist(), rows.tolist()]))
assert not {{"fastapi", "pydantic", "prometheus_client"}} & set(sys.modules)
import recjax.serve.__main__
import recjax.serve.app
"""


def test_loads_and_answers_without_the_training_code(exported, bundle):
    ids = [1000 + 7 * i for i in (3, 77, 5, 149, 0, 9, 11)]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(exported.path), json.dumps(ids)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    scores, rows = json.loads(done.stdout)
    user = bundle.encode(ids)
    expected = exported.oracle(user.history_ids, user.seen_ids)
    np.testing.assert_allclose(scores[0], expected[rows[0]], rtol=1e-5, atol=1e-5)
    assert rows[0] == np.argsort(-expected, kind="stable")[: bundle.max_k].tolist()


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported.path, tmp_path / "copy")


FILES = (layout.FUNCTION_FILE, layout.FILTERED_FILE, WEIGHTS_FILE, layout.VOCABULARY_FILE, layout.TITLES_FILE)
MORE = (layout.SPELLING_FILE, TEXT_FILE, layout.FACETS_FILE, layout.USERS_FILE)


@pytest.fixture
def searching(searcher, tmp_path):
    """A copy of the bundle of a model of tokens."""
    return shutil.copytree(searcher.path, tmp_path / "searching")


@pytest.mark.parametrize("name", (*FILES, *MORE))
def test_a_missing_cut_or_altered_file_is_refused(copy, searching, name):
    copy = searching if name in MORE else copy
    data = (copy / name).read_bytes()
    for damaged, message in ((data[:-1], "bytes"), (data[:-1] + bytes([data[-1] ^ 1]), "altered"), (None, "missing")):
        if damaged is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(damaged)
        with pytest.raises(BundleError, match=message):
            Bundle(copy)


def remake(copy, **changes):
    """A bundle whose manifest says something else, with checksums that are right: made so, not damaged."""
    manifest = json.loads((copy / "manifest.json").read_text())
    for field in ("files", "recjax_version", "created", "manifest_hash"):
        del manifest[field]
    folder.write_manifest(copy, {**manifest, **changes})


def schema_with(exported, **changes):
    schema = {**Bundle(exported.path).manifest["schema"], **changes}
    return {"schema": schema, "schema_hash": hash_of(schema)}


def test_other_versions_and_mixed_parts_are_refused(exported, copy):
    rule = {"name": features.NAME, "version": features.VERSION + 1}
    cases = [
        ({"format": FORMAT + 1}, "format"),
        (schema_with(exported, features=rule), "feature code"),
        (schema_with(exported, arguments={"history_ids": "int32 [b, 99]"}), "feature code"),
        ({"schema_hash": "0" * 16}, "feature code"),
        ({"vocabulary_hash": "0" * 16}, "vocabulary has hash"),
        ({"weights": {"table": "float32 [1, 1]"}}, "weights do not fit"),
    ]
    for change, message in cases:
        fresh = copy.with_name("fresh")
        shutil.copytree(copy, fresh)
        remake(fresh, **change)
        with pytest.raises(BundleError, match=message):
            Bundle(fresh)
        shutil.rmtree(fresh)


def test_the_vocabulary_of_another_model_is_refused(exported, copy):
    ItemVocab(tuple(reversed(exported.vocab.ids)), "int").save(copy / layout.VOCABULARY_FILE)
    remake(copy)
    with pytest.raises(BundleError, match="the vocabulary of the weights"):
        Bundle(copy)


def test_foreign_bytes_with_right_checksums_are_refused(copy):
    for name, message in (
        (layout.FUNCTION_FILE, "cannot read a function"),
        (WEIGHTS_FILE, "cannot read the weights"),
        (layout.TITLES_FILE, "titles"),
        (layout.VOCABULARY_FILE, "vocabulary"),
    ):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(b'{"a": 1}')
        remake(copy)
        with pytest.raises(BundleError, match=message):
            Bundle(copy)
        (copy / name).write_bytes(before)


def test_a_bundle_of_before_there_was_search_is_served(exported, bundle, copy):
    """It has one function, and a manifest that says nothing of prompts, filters and what the model was trained for."""
    (copy / layout.FILTERED_FILE).unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    schema = {name: part for name, part in manifest["schema"].items() if name != "filtered"}
    assert set(schema) == {"features", "arguments", "results"}
    for field in ("files", "recjax_version", "created", "manifest_hash", "recommends"):
        del manifest[field]
    told = {"functions": {"recommend": layout.FUNCTION_FILE}, "schema": schema, "schema_hash": hash_of(schema)}
    folder.write_manifest(copy, {**manifest, **told})
    old = Bundle(copy)
    user = old.encode([1000, 1007])
    padded = (features.pad([user.history_ids], count=1, width=old.prompt_length), user.seen_ids[None])
    for mine, new in zip(old.recommend(*padded), bundle.recommend(*padded), strict=True):
        np.testing.assert_array_equal(mine, new)
    assert old.recommends and not old.searches and not old.filters
    with TestClient(create_app([old], max_batch=1)) as client:
        assert client.post("/v1/recommend", json={"user_history": [1000]}).status_code == 200
        assert client.post("/v1/search", json={"query": "lamp"}).status_code == 422


def test_parts_of_another_model_of_tokens_are_refused(searching):
    spelling = np.load(searching / layout.SPELLING_FILE)
    np.save(searching / layout.SPELLING_FILE, spelling[::-1])
    remake(searching)
    with pytest.raises(BundleError, match="the spelling of the weights"):
        Bundle(searching)
    (searching / layout.SPELLING_FILE).write_bytes(b"no array")
    remake(searching)
    with pytest.raises(BundleError, match="cannot read the spelling"):
        Bundle(searching)
    np.save(searching / layout.SPELLING_FILE, spelling)
    other = TextConfig(size=40).make(["nothing like a lamp or chair"]).model
    for model, message in ((other, "the tokenizer of the weights"), (b"no model", "cannot read the tokenizer")):
        (searching / TEXT_FILE).write_bytes(model)
        remake(searching)
        with pytest.raises(BundleError, match=message):
            Bundle(searching)


ALONE_WITH_TEXT = f"""{REFUSE}
import json
from recjax.serve.bundle import Bundle
from recjax.serve.features import pad
Bundle(sys.argv[1])
assert "sentencepiece" not in sys.modules
bundle = Bundle(sys.argv[2])
query = bundle.encode_query("green lamp")
seen = pad([], count=1, width=1)
scores, rows = bundle.recommend(pad([query.history_ids], count=1, width=bundle.prompt_length), seen)
print(json.dumps(rows.tolist()))
"""


def test_text_is_read_without_the_training_code_and_only_where_there_is_some(exported, searcher):
    command = [sys.executable, "-c", ALONE_WITH_TEXT, str(exported.path), str(searcher.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bundle = Bundle(searcher.path)
    history = features.pad([bundle.encode_query("green lamp").history_ids], count=1, width=bundle.prompt_length)
    allowed = np.ones((1, searcher.vocab.num_rows), bool)
    expected = searcher.answer(history, np.zeros((1, 64), np.int32), allowed)
    np.testing.assert_array_equal(json.loads(done.stdout), expected.rows)


def test_a_program_of_a_newer_jax_is_refused_when_loaded_not_when_called(copy):
    file = copy / layout.FUNCTION_FILE
    function = jax.export.deserialize(bytearray(file.read_bytes()))
    unknown = function.mlir_module_serialized[:-40]
    file.write_bytes(dataclasses.replace(function, mlir_module_serialized=unknown).serialize())
    remake(copy, jax_version="99.0")
    with pytest.raises(BundleError, match="cannot read a function made by jax 99.0"):
        Bundle(copy)


def test_an_edited_manifest_or_no_bundle_at_all_is_refused(copy, tmp_path):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "max_k": 1000}))
    with pytest.raises(BundleError, match="manifest of this bundle was altered"):
        Bundle(copy)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(BundleError, match="no bundle here"):
            Bundle(path)
