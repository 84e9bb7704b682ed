"""Optimisers for tables with a row per item, which leave a row alone as long as it has no gradient.

A row without gradient keeps its value and its state to the last bit, so a step may be told only the rows of a batch
(`core.sparse_rows`) or the whole table, and does the same. This is where they differ from Adam, whose moments push a
row for many steps after it was last seen. The state is small: one number a row for AdaGrad, and for Adam the first
moment, one second moment and one count of updates a row.

Weight decay has no place here: it would move every row. What takes its place is paid when a row is updated, for the
steps since it last was (`decay_since`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

KINDS = ("rowwise_adagrad", "rowwise_adam")


class AdagradState(NamedTuple):
    """`accumulator` [v]: sum over the updates of the mean square of a row's gradient."""

    accumulator: Any


class AdamState(NamedTuple):
    """`mu` [v, d]: first moment; `nu` [v]: second moment, of a whole row; `count` [v]: updates of this row so far."""

    mu: Any
    nu: Any
    count: Any


def adagrad(initial_accumulator: float, *, eps: float) -> optax.GradientTransformation:
    """g / (sqrt(a) + eps), a being a sum of mean squares of the row (Gupta et al. 2014; FBGEMM's rowwise AdaGrad)."""

    def init(params: Any) -> AdagradState:
        return AdagradState(jax.tree.map(lambda p: jnp.full(p.shape[:1], initial_accumulator, jnp.float32), params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdagradState]:
        accumulator = jax.tree.map(lambda g, a: a + _mean_square(g), updates, state.accumulator)
        scaled = jax.tree.map(lambda g, a: g / (_wide(jnp.sqrt(a), g) + eps), updates, accumulator)
        return scaled, AdagradState(accumulator)

    return optax.GradientTransformation(init, update)


def adam(b1: float, b2: float, *, eps: float) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015) on the rows that have a gradient, with one second moment for a row.

    The correction for the start counts the updates of the row, not of the run: a row first seen late in the run
    takes its first step as if the run had just begun.
    """

    def init(params: Any) -> AdamState:
        return AdamState(
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(lambda p: jnp.zeros(p.shape[:1], jnp.float32), params),
            count=jax.tree.map(lambda p: jnp.zeros(p.shape[:1], jnp.int32), params),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamState]:
        def of(g: jax.Array, mu: jax.Array, nu: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
            square = _mean_square(g)
            seen = square > 0
            count = count + seen
            mu = jnp.where(_wide(seen, g), b1 * mu + (1 - b1) * g, mu)
            nu = jnp.where(seen, b2 * nu + (1 - b2) * square, nu)
            n = jnp.maximum(count, 1).astype(jnp.float32)
            mean, variance = mu / _wide(1 - b1**n, g), nu / (1 - b2**n)
            step = mean / (_wide(jnp.sqrt(variance), g) + eps)
            return jnp.where(_wide(seen, g), step, 0), mu, nu, count

        leaves, tree = jax.tree.flatten(updates)
        found = [of(*x) for x in zip(leaves, *(tree.flatten_up_to(s) for s in state), strict=True)]
        scaled, *parts = (jax.tree.unflatten(tree, [f[i] for f in found]) for i in range(4))
        return scaled, AdamState(*parts)

    return optax.GradientTransformation(init, update)


class SinceState(NamedTuple):
    """`count` []: steps so far; `last` [v]: the step of each row's last update, from 1 on, 0 where there was none."""

    count: Any
    last: Any


def decay_since(rate: float) -> optax.GradientTransformation:
    """Takes min(1, `rate` n) of a row off when it is updated n steps after it last was; nothing the first time.

    Rows that are rarely seen forget, those that are always seen hardly do (AdamAR: adaptive regularisation of sparse
    embeddings, ICLR 2026, as the spec card has it). Comes after the learning rate, which has no part in it.
    """

    def init(params: Any) -> SinceState:
        return SinceState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: jnp.zeros(p.shape[:1], jnp.int32), params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, SinceState]:
        now = state.count + 1

        def of(u: jax.Array, p: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
            moved = (u != 0).any(axis=tuple(range(1, u.ndim)))
            share = jnp.where(moved & (last > 0), jnp.minimum(rate * (now - last), 1.0), 0.0)
            return u - _wide(share, u) * p, jnp.where(moved, now, last)

        leaves, tree = jax.tree.flatten(updates)
        parts = (tree.flatten_up_to(params), tree.flatten_up_to(state.last))
        found = [of(u, p, last) for u, p, last in zip(leaves, *parts, strict=True)]
        scaled, last = (jax.tree.unflatten(tree, [f[i] for f in found]) for i in range(2))
        return scaled, SinceState(now, last)

    return optax.GradientTransformation(init, update)


def _mean_square(g: jax.Array) -> jax.Array:
    """Mean over all but the first dimension."""
    return jnp.square(g.astype(jnp.float32)).mean(axis=tuple(range(1, g.ndim)))


def _wide(per_row: jax.Array, like: jax.Array) -> jax.Array:
    return per_row.reshape(-1, *(1,) * (like.ndim - 1))
