"""The model that fills gaps: both sides count, and the item after the last event is a gap that it adds itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.models.masked import MaskedSequence
from recjax.models.sequence import Sequence, count_parameters
from recjax.nn.transformer import TransformerConfig

CONFIG = TransformerConfig(num_layers=2, width=16, num_heads=2, causal=False)
LONGEST = 6


@functools.cache
def _model(position: str = "learned") -> tuple[Functional, dict]:
    config = dataclasses.replace(CONFIG, position=position)
    model = Functional(functools.partial(MaskedSequence, num_rows=128, encoder=config, max_length=LONGEST))
    params, draw = model.init(jax.random.key(0)), np.random.default_rng(0)
    return model, jax.tree.map(lambda p: p + draw.normal(scale=0.3, size=p.shape).astype(np.float32), params)


def _hidden(batch: dict[str, np.ndarray], position: str = "learned") -> np.ndarray:
    model, params = _model(position)
    out = jax.jit(lambda b: model.apply(params, b, train=False, key=None))(jax.tree.map(jnp.asarray, batch))
    return np.asarray(out["hidden"])


def _batch(*histories: list[int], slots: int) -> dict[str, np.ndarray]:
    """Rows of one history each; 0 stands for a hidden item where `_masked` says so."""
    ids, positions, segments = np.zeros((3, len(histories), slots), np.int32)
    for i, items in enumerate(histories):
        ids[i, : len(items)], positions[i, : len(items)], segments[i, : len(items)] = items, np.arange(len(items)), 1
    return {"history_ids": ids, "positions": positions, "segment_ids": segments}


def _masked(*histories: list[int], slots: int) -> dict[str, np.ndarray]:
    batch = _batch(*histories, slots=slots)
    return {**batch, "masked": ((batch["history_ids"] == 0) & (batch["segment_ids"] > 0)).astype(np.int32)}


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_the_last_event_speaks_for_a_gap_after_it(position: str) -> None:
    got = _hidden(_batch([5, 6, 7], [8], [], slots=4), position)
    want = _hidden(_masked([5, 6, 7, 0], [8, 0], [0], slots=5), position)
    assert got.shape == (3, 4, 16)
    np.testing.assert_allclose(got[0, 2], want[0, 3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1, 0], want[1, 1], rtol=1e-4, atol=1e-5)


def test_a_full_history_gives_its_oldest_event_for_the_gap() -> None:
    got = _hidden(_batch([5, 6, 7, 8, 9, 10], slots=LONGEST))
    want = _hidden(_masked([6, 7, 8, 9, 10, 0], slots=LONGEST))
    np.testing.assert_allclose(got[0, -1], want[0, -1], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing() -> None:
    short, long = (_hidden(_batch([5, 6, 7], slots=n))[0, 2] for n in (3, 6))
    np.testing.assert_allclose(short, long, rtol=1e-4, atol=1e-5)


def test_a_gap_sees_both_sides_of_its_own_example_and_nothing_of_the_hidden_item() -> None:
    """Two examples in a row, a gap in the middle of the first."""
    model, params = _model()
    batch = {k: jnp.asarray(v) for k, v in _masked([5, 0, 7, 8, 9], slots=6).items()}
    batch["segment_ids"] = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    batch["positions"] = jnp.asarray([[0, 1, 2, 0, 1, 0]])

    def hidden_of(table: jax.Array) -> jax.Array:
        return model.apply({**params, "table": table}, batch, train=False, key=None)["hidden"][0, 1, :5].sum()

    reach = np.abs(jax.jit(jax.grad(hidden_of))(params["table"])).sum(-1) > 0
    assert np.flatnonzero(reach).tolist() == [5, 7]


def test_the_mask_is_a_parameter_that_is_learned() -> None:
    model, params = _model()
    batch = jax.tree.map(jnp.asarray, _masked([5, 0, 7], slots=3))
    loss = lambda p: model.apply(p, batch, train=False, key=None)["hidden"][0, 1, :5].sum()  # noqa: E731
    assert float(jnp.abs(jax.jit(jax.grad(loss))(params)["mask"]).max()) > 0
    assert count_parameters(params)["embedding"] == 128 * 16 + 16


def test_each_model_asks_for_the_encoder_it_can_be_trained_with() -> None:
    for model, causal in ((Sequence, False), (MaskedSequence, True)):
        with pytest.raises(ConfigError, match="causal"):
            Functional(functools.partial(model, num_rows=128, encoder=dataclasses.replace(CONFIG, causal=causal)))
