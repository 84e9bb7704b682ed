"""A SavedModel answers as the bundle it was made of, for any batch; without TensorFlow it says how to get it."""

import json
from pathlib import Path

import numpy as np
import pytest

from recjax import export_saved_model
from recjax.core.errors import BundleError
from recjax.serve.bundle import Bundle

# The bundle of an earlier release will do: what was exported once can be converted later.
BUNDLE = Path(__file__).parent / "serve" / "releases" / "0.1.0.dev0" / "items"


@pytest.mark.tensorflow
def test_the_saved_model_gives_the_numbers_of_the_bundle(tmp_path):
    import tensorflow as tf

    path = export_saved_model.export_saved_model(BUNDLE, tmp_path / "1")
    loaded, bundle = tf.saved_model.load(str(path)), Bundle(BUNDLE)
    rng, last = np.random.default_rng(3), 2 + bundle.vocab.num_items
    for rows, seen in ((1, 3), (7, 20)):
        history = rng.integers(0, last, (rows, bundle.prompt_length)).astype(np.int32)
        seen_ids = rng.integers(0, last, (rows, seen)).astype(np.int32)
        allowed = rng.random((rows, bundle.vocab.num_rows)) < 0.5
        for name, more in (("serving_default", {}), ("filtered", {"allowed": allowed})):
            found = loaded.signatures[name](history_ids=history, seen_ids=seen_ids, **more)
            scores, best = bundle.recommend(history, seen_ids, **more)
            np.testing.assert_allclose(found["scores"].numpy(), scores, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(found["rows"].numpy(), best)
    extra = {file.name for file in (path / "assets.extra").iterdir()}
    assert extra == {"manifest.json", "vocabulary.json", "titles.json", "facets.json", "users.json"}
    assert json.loads((path / "assets.extra" / "manifest.json").read_text()) == bundle.manifest
    with pytest.raises(BundleError, match="overwrite"):
        export_saved_model.export_saved_model(BUNDLE, path)


def test_without_tensorflow_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export_saved_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BundleError, match="saved_model"):
        export_saved_model.export_saved_model(BUNDLE, tmp_path / "1")
    assert not (tmp_path / "1").exists()
