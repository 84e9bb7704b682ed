"""The ONNX of a ranker answers as its bundle does, for any batch; what cannot be had is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from recjax import export_onnx
from recjax.core.errors import BundleError
from recjax.core.module import Functional
from recjax.data.vocab import ItemVocab
from recjax.export import export_bundle
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.serve.rank_bundle import RankBundle


def run(file: Path, inputs: dict[str, np.ndarray]) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert {one.name for one in session.get_inputs()} == {*inputs}
    return session.run(None, inputs)


@pytest.mark.onnx
def test_logits_of_a_ranker_are_those_of_the_bundle(export_ranks: Callable[..., Any], tmp_path: Path) -> None:
    made = export_ranks(tmp_path / "bundle", onnx=True)
    bundle, evaluator = RankBundle(made.path), made.assembly.evaluator("test")
    for size in (1, 50):
        batch = evaluator.reader.read(np.arange(size))
        fields = {name: x for name, x in batch.items() if name.startswith("field/")}
        [found] = run(made.path / "rank.onnx", fields)
        np.testing.assert_allclose(found, bundle.logits(fields), rtol=1e-5, atol=1e-6)


@pytest.mark.onnx
def test_what_cannot_be_translated_is_refused_with_the_reason(tmp_path: Path) -> None:
    """A search of the catalogue for any number of prompts and of seen items, with the jax2onnx of today."""
    vocab = ItemVocab(tuple(f"item {i}" for i in range(40)))
    encoder = TransformerConfig(num_layers=1, width=8, num_heads=2)
    model = Functional(partial(Sequence, num_rows=vocab.num_rows, encoder=encoder, max_length=5))
    told: dict[str, Any] = {"vocab": vocab, "titles": [None] * vocab.num_rows, "history_length": 5, "max_k": 8}
    with pytest.raises(BundleError, match="jax2onnx cannot translate this model: InconclusiveDimension"):
        export_bundle(model, model.init(jax.random.key(0)), out=tmp_path / "bundle", onnx=True, **told)
    assert not (tmp_path / "bundle").exists()


def test_without_jax2onnx_it_says_how_to_get_it(
    export_ranks: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BundleError, match="jax2onnx"):
        export_ranks(tmp_path / "bundle", onnx=True)
    assert not (tmp_path / "bundle").exists()
