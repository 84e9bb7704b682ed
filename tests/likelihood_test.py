"""The likelihood of held-out text is that of each document alone, whatever row its windows lie in."""

from __future__ import annotations

from functools import cache, partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.errors import TrainingError
from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.data.batch import check_fields
from recjax.data.heldout_text import text_batches
from recjax.data.record import Column
from recjax.likelihood import TextScorer
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig

V, PIECES = 128, 90
VALID = (np.arange(V) >= 2) & (np.arange(V) < PIECES)


def column(values: list[np.ndarray]) -> Column:
    bounds = np.concatenate([[0], np.cumsum([len(v) for v in values])]).astype(np.int64)
    return Column(np.concatenate([np.zeros(0, np.int32), *values]).astype(np.int32), bounds)


def documents(seed: int, lengths: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, PIECES, n) for n in lengths], [rng.integers(0, 2, n) for n in lengths]


@given(st.integers(0, 1000), st.lists(st.integers(0, 23), min_size=1, max_size=12), st.sampled_from([8, 16]))
def test_every_token_but_the_first_is_predicted_once(seed: int, lengths: list[int], row_length: int) -> None:
    texts, loss = documents(seed, lengths)
    columns, found = {"items": column(texts), "loss": column(loss)}, [[] for _ in texts]
    for batch, document in text_batches(columns, row_length=row_length, slots=40, parts=2):
        check_fields(batch)
        assert len(batch["weight"]) % 2 == 0
        flat = {name: x.reshape(-1) for name, x in batch.items()}
        for slot in np.flatnonzero(flat["segment_ids"] > 0):
            found[document[slot]].append((flat["history_ids"][slot], flat["target_ids"][slot], flat["weight"][slot]))
        starts = np.flatnonzero((flat["segment_ids"] > 0) & (flat["positions"] == 0))
        assert (np.diff(flat["segment_ids"], prepend=0)[starts] != 0).all() or (starts % row_length == 0).any()
    for text, counts, pairs in zip(texts, loss, found, strict=True):
        assert sorted(pairs) == sorted(zip(text[:-1], text[1:], counts[1:], strict=True))


@cache
def model_of() -> tuple[Functional, dict]:
    encoder = TransformerConfig(num_layers=1, width=16, num_heads=2, tied_head=False)
    model = Functional(partial(Sequence, num_rows=V, encoder=encoder, max_length=16))
    return model, jax.tree.map(lambda x: x * 3, jax.jit(model.init)(jax.random.key(0)))


def alone(text: np.ndarray, loss: np.ndarray, *, temperature: float) -> float:
    """The document in a row of its own, its softmax written out."""
    model, params = model_of()
    ids, place = np.zeros((1, 16), np.int32), np.arange(16, dtype=np.int32)[None]
    ids[0, : len(text)] = text
    batch = {"history_ids": ids, "positions": place, "segment_ids": (place < len(text)).astype(np.int32)}
    out = jax.jit(partial(model.apply, train=False, key=None))(params, batch)
    logits = np.asarray(out["hidden"])[0].astype(float) @ np.asarray(out["table"]).T.astype(float) / temperature
    logits = np.where(VALID, logits, -np.inf)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -sum(log_p[at, text[at + 1]] for at in range(len(text) - 1) if loss[at + 1])


def test_it_is_that_of_each_document_alone() -> None:
    model, params = model_of()
    texts, loss = documents(0, [5, 1, 9, 16, 2, 0, 12])
    columns = {"items": column(texts), "loss": column(loss)}
    scorer = partial(TextScorer, model, valid=VALID, row_length=16, temperature=0.7)
    found = scorer(slots=32)(params, columns)
    want = [alone(text, counts, temperature=0.7) for text, counts in zip(texts, loss, strict=True)]
    np.testing.assert_allclose(found.nll, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.tokens, [counts[1:].sum() for counts in loss])
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    placed = jax.tree.map(jax.device_put, params, mesh.shardings(model.axes))
    on_mesh = scorer(slots=64, mesh=mesh)(placed, columns)
    np.testing.assert_allclose(on_mesh.nll, want, rtol=1e-5, atol=1e-5)


def test_what_is_not_a_number_says_so() -> None:
    model, params = model_of()
    broken = {**params, "head": params["head"].at[5].set(np.nan)}
    with pytest.raises(TrainingError, match="2 of 3 documents"):
        TextScorer(model, valid=VALID, row_length=16, slots=64)(broken, {"items": column(documents(1, [4, 1, 8])[0])})
