"""Vectors of items made of facts: sums and layers against numpy, sequences, shared contexts, and what does not fit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Module, Params, Rngs
from recjax.data.fields import FieldShape
from recjax.nn.dense import Pass
from recjax.nn.field_vectors import FieldConfig, FieldVectors
from recjax.nn.item_vectors import ContentVectors, PieceVectors

WIDTH, ROWS = 3, 10
DRAW = np.random.default_rng(0)
# Padding and the unknown item have no pieces; the last item has as many as there can be.
PIECES = np.array([[-1, -1], [-1, -1], [4, -1], [4, 9], [0, 4], [2, 2]], np.int32)
CONTENT = DRAW.normal(size=(6, 5)).astype(np.float32)
ITEM = FieldShape(name="item", kind="item")
LIKED = FieldShape(name="liked", kind="sequence", width=3, of="item")
USER = FieldShape(name="user", kind="categorical", rows=4, offset=2)
BATCH = {
    "field/item": np.array([2, 3, 1, 5], np.int32),
    "field/liked": np.array([[2, 3, 0], [5, 0, 0], [0, 0, 0], [4, 3, 2]], np.int32),
    "field/user": np.array([2, 3, 4, 5], np.int32),
    "item/pieces": PIECES,
    "item/vectors": CONTENT,
}


class Model(Module):
    def __init__(self, config: FieldConfig, *, rngs: Rngs) -> None:
        self.fields = FieldVectors(config, [USER, ITEM, LIKED], first_order=True, rngs=rngs)

    def __call__(self, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array | None]:
        table = jnp.tile(jnp.arange(6.0)[:, None], (1, WIDTH + 1))
        inputs = self.fields(batch, table, Pass(False, None, None, {}))
        return inputs.vectors, inputs.first


def built(items: PieceVectors | ContentVectors) -> tuple[Functional, Params]:
    config, draw = FieldConfig(width=WIDTH, items=items), np.random.default_rng(1)
    model = Functional(lambda rngs: Model(config, rngs=rngs))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda s: jnp.float32(draw.normal(size=s.shape)), shapes)


def expected(items: np.ndarray) -> np.ndarray:
    """Vectors and weights [b, 3, WIDTH + 1] of user, item and what was liked, by those of items."""
    known = np.where(np.arange(len(items))[:, None] > 0, items, 0)
    liked = BATCH["field/liked"]
    pooled = known[liked].sum(1) / np.maximum((liked > 0).sum(1), 1)[:, None]
    user = BATCH["field/user"][:, None] * np.ones(WIDTH + 1)
    return np.stack([user, known[BATCH["field/item"]], pooled], axis=1)


def check(model: Functional, params: Params, items: np.ndarray) -> None:
    vectors, first = model.apply(params, {name: jnp.asarray(x) for name, x in BATCH.items()})
    want = expected(items)
    np.testing.assert_allclose(vectors, want[..., :WIDTH], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first, want[..., WIDTH].sum(1), rtol=1e-5, atol=1e-5)


def test_an_item_is_the_sum_of_its_pieces() -> None:
    model, params = built(PieceVectors(rows=ROWS))
    table = np.asarray(params["fields"]["items"]["table"])
    check(model, params, np.stack([table[row[row >= 0]].sum(0) for row in PIECES]))


def test_content_goes_through_its_layers() -> None:
    model, params = built(ContentVectors(width=5, hidden=(4,)))
    x: Any = CONTENT
    for number in range(2):
        layer = params["fields"]["items"][f"layer{number}"]
        x = np.maximum(x, 0) if number else x
        x = x @ np.asarray(layer["weight"]) + np.asarray(layer["bias"])
    check(model, params, x)


def test_what_candidates_of_a_request_share_may_be_given_once() -> None:
    model, params = built(PieceVectors(rows=ROWS))
    owner = np.array([0, 0, 1, 1], np.int32)
    shared = {name: BATCH[f"field/{name}"][:2] for name in ("liked", "user")}
    rows = {**BATCH, **{f"field/{name}": x[owner] for name, x in shared.items()}}
    once = {name: x for name, x in BATCH.items() if name not in ("field/liked", "field/user")}
    once |= {f"context/{name}": x for name, x in shared.items()} | {"owner": owner}
    got, want = (model.apply(params, {n: jnp.asarray(x) for n, x in batch.items()}) for batch in (once, rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


@pytest.mark.parametrize(
    ("fields", "items"), [([USER, ITEM], None), ([USER], PieceVectors(rows=ROWS))], ids=["no vectors", "no item"]
)
def test_a_field_of_items_and_their_vectors_go_together(fields: list[FieldShape], items: PieceVectors | None) -> None:
    with pytest.raises(ConfigError, match=r"FieldConfig\.items"):
        Functional(lambda rngs: FieldVectors(FieldConfig(items=items), fields, first_order=False, rngs=rngs)).init(
            jax.random.key(0)
        )


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(PieceVectors, {"rows": 0}), (PieceVectors, {"rows": 1, "scale": 0.0}), (ContentVectors, {"width": 0})],
)
def test_sizes_are_checked(kind: type, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        kind(**settings)
