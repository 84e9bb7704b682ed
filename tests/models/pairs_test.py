"""Training tables of pairs: only rows of the batch and drawn ones move, and that is all there is to it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core import optim, state
from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.core.optim import Group, Optimizer
from recjax.core.step import make_train_step
from recjax.data.fields import FieldShape
from recjax.losses.contrast import PairSoftmax
from recjax.models.pairs import PairTables

B, USERS, ITEMS, ROWS, STEPS = 6, 60, 120, 256, 3
FIRST = 4 + USERS
FIELDS = (
    FieldShape(name="user_id", kind="categorical", rows=USERS + 2, offset=2),
    FieldShape(name="item_id", kind="categorical", rows=ITEMS + 2, offset=FIRST),
)
COUNT = np.zeros(ROWS, np.float32)
COUNT[FIRST + 2 : FIRST + 2 + ITEMS] = np.random.default_rng(0).integers(1, 9, ITEMS)
MODEL = Functional(lambda rngs: PairTables(num_rows=ROWS, fields=FIELDS, width=4, rngs=rngs))
LOSS = PairSoftmax(num_negatives=5)
TABLE = Optimizer(kind="adam", learning_rate=0.1, groups=(("^table$", Group(kind="rowwise_adam")),))


def batch(seed: int) -> dict[str, jax.Array]:
    draw = np.random.default_rng(seed)
    return {
        "field/user_id": jnp.asarray(draw.integers(4, 4 + USERS, B), jnp.int32),
        "field/item_id": jnp.asarray(draw.integers(FIRST + 2, FIRST + 2 + ITEMS, B), jnp.int32),
        "label/click": jnp.asarray([1, 1, 0, 1, 1, 1], jnp.float32),
        "weight": jnp.ones(B),
    }


def trained(row_wise: tuple[str, ...]) -> tuple[Any, list[dict[str, Any]]]:
    params = MODEL.init(jax.random.key(0))
    optimizer = optim.make(TABLE, params, STEPS)
    step = jax.jit(make_train_step(MODEL, (LOSS,), optimizer, seed=0, row_wise=row_wise))
    now, said = state.create(params, optimizer), []
    for number in range(STEPS):
        now, metrics = step(now, batch(number), {"item/count": jnp.asarray(COUNT)})
        said.append(metrics)
    return now, said


def test_a_step_by_rows_is_a_step_with_the_whole_table_and_leaves_the_rest_alone() -> None:
    (some, said), (whole, also) = trained(("table",)), trained(())
    np.testing.assert_allclose(some.params["table"], whole.params["table"], rtol=1e-4, atol=1e-5)
    for a, b in zip(said, also, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
    touched = set()
    for number in range(STEPS):
        key = jax.random.split(jax.random.fold_in(jax.random.key(0), number), 2)[1]
        drawn = LOSS.draw(batch(number), {"item/count": jnp.asarray(COUNT)}, key)
        for ids in (*(batch(number)[f"field/{f.name}"] for f in FIELDS), drawn["drawn/pairs/rows"]):
            touched |= set(np.asarray(ids).tolist())
    before = np.asarray(MODEL.init(jax.random.key(0))["table"])
    for table in (some.params["table"], whole.params["table"]):
        moved = set(np.flatnonzero((np.asarray(table) != before).any(1)).tolist())
        assert moved <= touched and len(moved) > 15
        untouched = sorted(set(range(ROWS)) - touched)
        np.testing.assert_array_equal(np.asarray(table)[untouched], before[untouched])


def test_it_wants_its_two_fields() -> None:
    with pytest.raises(ConfigError, match="no field user_id"):
        Functional(lambda rngs: PairTables(num_rows=ROWS, fields=FIELDS[1:], rngs=rngs))
