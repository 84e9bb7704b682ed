"""Snapshots of a vector made one: against numpy, what is not known, order, and what can be computed beforehand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Module, Params, Rngs
from recjax.nn.dense import Pass
from recjax.nn.field_vectors import FieldConfig, FieldVectors
from recjax.nn.past_vectors import PastVectors

B, INNER, WIDTH = 6, 3, 4
DRAW = np.random.default_rng(0)
PAST = np.float32(DRAW.normal(size=(B, 3, INNER)))
KNOWN = np.asarray([[1, 1, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1]], bool)


class Model(Module):
    def __init__(self, ages: tuple[int, ...], *, rngs: Rngs) -> None:
        self.inside = PastVectors(name="user", fields=("a", "b", "c"), ages=ages).make(INNER, WIDTH, rngs=rngs)

    def __call__(self, batch: dict[str, Any]) -> jax.Array:
        return self.inside(batch["past"], batch["known"])


def built(ages: tuple[int, ...] = (1, 2, 3)) -> tuple[Functional, Params]:
    model, draw = Functional(lambda rngs: Model(ages, rngs=rngs)), np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda s: jnp.float32(draw.normal(size=s.shape)), shapes)


def answer(model: Functional, params: Params, past: np.ndarray = PAST, known: np.ndarray = KNOWN) -> np.ndarray:
    return np.asarray(model.apply(params, {"past": jnp.asarray(past), "known": jnp.asarray(known)}))


def test_it_is_its_formula() -> None:
    model, params = built()
    p = {name: np.float64(x) for name, x in params["inside"].items()}
    for row, got in enumerate(answer(model, params)):
        at = np.flatnonzero(KNOWN[row])
        if not len(at):
            np.testing.assert_allclose(got, p["default"], rtol=1e-5)  # nobody knows the id
            continue
        x = np.float64(PAST[row, at]) + p["age"][1 + at]
        scores = (x @ p["query"]) @ (x @ p["key"]).T / 2
        weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        np.testing.assert_allclose(got, (weights @ x @ p["value"]).mean(0), rtol=1e-4, atol=1e-5)


def test_what_is_not_known_has_no_weight() -> None:
    model, params = built()
    other = np.where(KNOWN[..., None], PAST, np.float32(1e3))
    np.testing.assert_array_equal(answer(model, params), answer(model, params, other))

    def loss(past: jax.Array) -> jax.Array:
        return jnp.square(model.apply(params, {"past": past, "known": jnp.asarray(KNOWN)})).sum()

    gradient = np.asarray(jax.grad(loss)(jnp.asarray(PAST)))
    np.testing.assert_array_equal(gradient[~KNOWN], 0)
    assert np.all(gradient[KNOWN].any(1))


def test_snapshots_may_come_in_any_order_with_their_ages() -> None:
    (model, params), order = built(), [2, 0, 1]
    moved, _ = built((3, 1, 2))
    got = answer(moved, params, PAST[:, order], KNOWN[:, order])
    np.testing.assert_allclose(got, answer(model, params), rtol=1e-4, atol=1e-5)


class Field:
    def __init__(self, name: str, kind: str, width: int = 0) -> None:
        self.name, self.kind, self.width, self.of = name, kind, width, ""


FIELDS = [Field("a", "vector", INNER), Field("b", "vector", INNER)]
FIELDS += [Field("a.present", "numeric"), Field("b.present", "numeric")]


def vectors_of(past: PastVectors) -> Functional:
    class Fields(Module):
        def __init__(self, *, rngs: Rngs) -> None:
            self.inside = FieldVectors(FieldConfig(width=WIDTH, past=(past,)), FIELDS, first_order=False, rngs=rngs)

        def __call__(self, batch: dict[str, Any]) -> jax.Array:
            return self.inside(batch, jnp.zeros((2, WIDTH)), Pass(False, None, None, {})).vectors

    return Functional(lambda rngs: Fields(rngs=rngs))


def test_a_ranker_reads_it_as_one_field_that_can_be_computed_beforehand() -> None:
    model = vectors_of(PastVectors(name="user", fields=("a", "b")))
    params = model.init(jax.random.key(0))
    batch = {"field/a": PAST[:, 0], "field/b": PAST[:, 1]}
    batch |= {f"field/{n}.present": np.float32(KNOWN[:, i]) for i, n in enumerate("ab")}
    in_graph = model.apply(params, jax.tree.map(jnp.asarray, batch))
    assert in_graph.shape == (B, 1, WIDTH)
    inside: Any = model.bind(params)
    table = inside.inside.past0(jnp.asarray(PAST[:, :2]), jnp.asarray(KNOWN[:, :2]))  # one row for each id
    np.testing.assert_allclose(in_graph[:, 0], table, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fields", [("a", "nobody"), ("a.present",), ()])
def test_what_cannot_be_says_so(fields: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        vectors_of(PastVectors(name="user", fields=fields))
