"""Item vectors out of content: nothing at eta 0, one plain table in the end, and no item by name without the offset."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional, with_facts
from recjax.models.content import ContentSequence
from recjax.models.folded import fold
from recjax.models.sequence import Sequence
from recjax.nn.recurrent import RecurrentConfig
from recjax.nn.transformer import TransformerConfig

V, L, C = 128, 6, 5
VECTORS = jnp.float32(np.random.default_rng(0).normal(size=(V, C)))


def encoder_of(kind: str) -> Any:
    if kind == "gru":
        return RecurrentConfig(num_layers=1, width=8)
    return TransformerConfig(num_layers=1, width=8, num_heads=2)


def model_of(kind: str = "transformer", **more: Any) -> Functional:
    given = {"num_rows": V, "encoder": encoder_of(kind), "max_length": L, "content_width": C, **more}
    return Functional(functools.partial(ContentSequence, **given))


def batch_of() -> dict[str, jax.Array]:
    ids = jnp.asarray([[5, 9, 5, 0, 0, 0], [3, 4, 7, 8, 9, 2]], jnp.int32)
    real = ids != 0
    places = jnp.where(real, jnp.arange(L)[None], 0)
    return {"history_ids": ids, "positions": places, "segment_ids": real.astype(jnp.int32)}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("transformer", {"content_hidden": 7, "learn_eta": True}),
        ("transformer", {"normalize": True, "offset": False}),
        ("gru", {"eta": 0.5}),
    ],
)
def test_folded_equals_unfolded(kind: str, more: dict[str, Any]) -> None:
    model = model_of(kind, **more)
    params = with_facts(model.init(jax.random.key(1)), {"item/vectors": VECTORS})
    want = model.apply(params, batch_of(), train=False, key=None)
    plain, folded = fold(model, params)
    got = plain.apply(folded, batch_of(), train=False, key=None)
    assert set(got) == {"hidden", "table"} and jax.tree.structure(folded) == jax.tree.structure(
        plain.init(jax.random.key(0))
    )
    scores, expected = (jnp.einsum("bld,vd->blv", o["hidden"], o["table"]) for o in (got, want))
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)


def test_eta_zero_is_the_plain_model_to_the_bit() -> None:
    model, plain = model_of(eta=0.0), Functional(
        functools.partial(Sequence, num_rows=V, encoder=encoder_of("transformer"), max_length=L)
    )  # fmt: skip
    params = plain.init(jax.random.key(0))
    fresh = model.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, {k: fresh[k] for k in params}, params)
    got = model.apply(with_facts(fresh, {"item/vectors": VECTORS}), batch_of(), train=False, key=None)
    want = plain.apply(params, batch_of(), train=False, key=None)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_without_an_offset_items_are_their_content() -> None:
    """Items of the same content have the same vector, and no parameter has a row for an item."""
    model = model_of(offset=False)
    params = model.init(jax.random.key(0))
    assert "table" not in params
    vectors = VECTORS.at[9].set(VECTORS[5])
    table = model.apply(with_facts(params, {"item/vectors": vectors}), batch_of(), train=False, key=None)["table"]
    np.testing.assert_array_equal(table[9], table[5])
    assert not np.allclose(table[8], table[5])


def test_content_is_trained_through_both_its_uses() -> None:
    model = model_of(content_hidden=4, learn_eta=True)
    params = model.init(jax.random.key(2))

    def total(params: Any) -> jax.Array:
        out = model.apply(with_facts(params, {"item/vectors": VECTORS}), batch_of(), train=True, key=None)
        return jnp.square(jnp.einsum("bld,vd->blv", out["hidden"], out["table"])).sum()

    gradient = jax.grad(total)(params)
    for name in ("content", "content_inner", "content_bias", "content_inner_bias", "eta", "table"):
        assert np.abs(gradient[name]).max() > 0


@pytest.mark.parametrize("more", [{"content_width": 0}, {"eta": -1.0}, {"content_hidden": 0}])
def test_what_cannot_be_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        model_of(**more)


def test_a_plain_model_is_not_folded() -> None:
    plain = Functional(functools.partial(Sequence, num_rows=V, encoder=encoder_of("transformer"), max_length=L))
    params = plain.init(jax.random.key(0))
    assert fold(plain, params) == (plain, params)
