"""Decay that a row pays when it is updated, for the steps since it last was."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recjax.core import optim
from recjax.core.errors import ConfigError
from recjax.core.optim import Group, Optimizer

ROWS, WIDTH, STEPS = 6, 3, 5
# Which rows have a gradient in each step.
SEEN = np.asarray([[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0]])
DRAW = np.random.default_rng(0)
GRADIENTS = np.float32(DRAW.normal(size=(STEPS, ROWS, WIDTH)) * SEEN[..., None])
TABLE = jnp.float32(DRAW.normal(size=(ROWS, WIDTH)))


def trained(decay: float) -> tuple[list[np.ndarray], optax.GradientTransformation]:
    group = Group(kind="rowwise_adam", decay_since=decay)
    config = Optimizer(kind="adam", learning_rate=0.1, groups=(("^table$", group),))
    params = {"table": TABLE}
    optimizer = optim.make(config, params, STEPS)
    state, found = optimizer.init(params), [np.asarray(TABLE)]
    for gradient in GRADIENTS:
        updates, state = optimizer.update({"table": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        found.append(np.asarray(params["table"]))
    return found, optimizer


def test_without_it_is_adam_to_the_last_bit() -> None:
    config = Optimizer(kind="adam", learning_rate=0.1, groups=(("^table$", Group(kind="rowwise_adam")),))
    params = {"table": TABLE}
    optimizer = optim.make(config, params, STEPS)
    state = optimizer.init(params)
    for gradient in GRADIENTS:
        updates, state = optimizer.update({"table": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(trained(0.0)[0][-1], params["table"])


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_it_takes_its_share_by_the_steps_since_the_last_update(rate: float) -> None:
    plain, found = trained(0.0)[0], trained(rate)[0]
    last = np.zeros(ROWS, int)
    want = np.asarray(TABLE, np.float64)
    for step in range(STEPS):
        moved = plain[step + 1] - plain[step]  # Adam's step knows gradients alone
        since = np.where((last > 0) & (SEEN[step] > 0), step + 1 - last, 0)
        want = want + moved - np.minimum(rate * since, 1)[:, None] * want
        last = np.where(SEEN[step] > 0, step + 1, last)
        np.testing.assert_allclose(found[step + 1], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[-1][[3, 5]], np.asarray(TABLE)[[3, 5]])  # never seen: not moved by a bit


def test_it_is_for_rows_alone() -> None:
    for kind in ("adam", None):
        with pytest.raises(ConfigError, match="decay_since"):
            Optimizer(groups=(("^table$", Group(kind=kind, decay_since=0.1)),))
    shapes = jax.eval_shape(lambda: {"table": TABLE})
    state = optim.make(Optimizer(groups=(("^table$", Group(kind="rowwise_adam", decay_since=0.1)),)), shapes, 1)
    sizes = sorted(x.shape for x in jax.tree.leaves(jax.eval_shape(state.init, shapes)))
    assert sizes.count((ROWS,)) == 3  # second moment, count of updates, step of the last one
