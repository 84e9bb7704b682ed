"""The one train step: outputs -> objectives -> gradients -> update.

This is the only place that calls `value_and_grad`. It knows nothing of models or losses beyond their contracts: a
model is a pure function of parameters and batch, an objective turns its outputs into a sum and a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from recjax.core import sparse_rows
from recjax.core.module import SEEN, Functional, Params
from recjax.core.state import TrainState, joined, split

Tree = dict[str, Any]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Tree, Tree], tuple[TrainState, Metrics]]

_MAINTENANCE = 0x6D61696E  # what a draw is for


def make_train_step(
    model: Functional,
    objectives: Sequence[Any],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    accumulate: int = 1,
    row_wise: Sequence[str] = (),
    frozen: Sequence[str] = (),
    held: frozenset[str] = frozenset(),
) -> TrainStep:
    """A pure function (state, batch, const) -> (state, metrics), to be jitted with the state donated.

    The loss is the sum over objectives of `scale * total / weight`, `weight` being that of the whole batch, so that
    cutting the batch into `accumulate` micro-batches or over devices changes nothing but rounding. Randomness is a
    function of (`seed`, step, micro-batch) alone: a restart needs no random state. The model finds the `item/` arrays
    of `const` in its batch. Metrics are scalars: `loss`, one entry per objective and per metric of an objective,
    `grad_norm`, and `tokens`, the slots that are read (those that are not padding), or, of what has no slots, the
    weight of the first objective.

    A model that maintains parameters itself (`core.module.Functional`) does so after the optimiser, from what it saw
    of the whole batch.

    Of the parameters `row_wise` (paths) only the rows that a batch touches are read, differentiated and written
    (`core.sparse_rows`), and a model that knows items by their facts is shown no other items, where that is fewer;
    `frozen` are the parameters that the optimiser never moves. Those `held` get no gradient either, and the optimiser
    does not know them (`core.state.split`). Raises `ConfigError` where an objective needs the other rows.
    """
    sparse = sparse_rows.plan(model, row_wise, frozen, objectives)

    def keys_of(key: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        model_key, *keys = jax.random.split(key, 1 + len(objectives))
        return model_key, keys

    def with_draws(batch: Tree, const: Tree, key: jax.Array) -> Tree:
        out = dict(batch)
        for objective, objective_key in zip(objectives, keys_of(key)[1], strict=True):
            out |= objective.draw(batch, const, objective_key)
        return out

    def loss_of(
        trained: Params, rest: Params, batch: Tree, const: Tree, weights: Tree, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        params = joined(trained, rest)
        model_key, keys = keys_of(key)
        facts = {name: value for name, value in const.items() if name.startswith("item/")}
        out = model.apply(params, {**batch, **facts}, train=True, key=model_key)
        loss, sums = jnp.float32(0), {}
        for objective, objective_key in zip(objectives, keys, strict=True):
            total, weight, metrics = objective(out, batch, const, objective_key)
            loss += objective.scale * total / weights[objective.name]
            sums[objective.name] = (total, weight)
            sums.update({f"{objective.name}/{name}": value for name, value in metrics.items()})
        seen = {name.removeprefix(SEEN): value for name, value in out.items() if name.startswith(SEEN)}
        return loss, (sums, seen)

    gradients_of = jax.value_and_grad(loss_of, has_aux=True)

    def step(state: TrainState, batch: Tree, const: Tree) -> tuple[TrainState, Metrics]:
        step_key = keys = jax.random.fold_in(jax.random.key(seed), state.step)
        weights = {o.name: jnp.maximum(o.total_weight(batch), 1e-9) for o in objectives}
        has_slots = "segment_ids" in batch
        tokens = (batch["segment_ids"] > 0).sum(dtype=jnp.float32) if has_slots else weights[objectives[0].name]
        const = {**const, "step": state.step}
        if accumulate == 1:
            batch = with_draws(batch, const, keys)
        else:
            batch, keys = _micro_batches(batch, accumulate), jax.random.split(keys, accumulate)
            batch = jax.lax.map(lambda xs: with_draws(xs[0], const, xs[1]), (batch, keys))
        params, opt_state, rows, num_rows = state.params, state.opt_state, None, 0
        if sparse is not None:
            num_rows = sparse_rows.rows_of(params, const, sparse)
        if sparse is not None and (sparse.tables or sparse.is_shorter(batch, num_rows)):
            rows, batch = sparse.touched(batch, num_rows)
            params, opt_state = (sparse.compact(tree, rows, num_rows) for tree in (params, opt_state))
            const = sparse.compact_facts(const, rows, num_rows)
        trained, rest = split(params, held)
        if accumulate == 1:
            (loss, (sums, seen)), gradients = gradients_of(trained, rest, batch, const, weights, keys)
            seen = jax.tree.map(lambda x: x[None], seen)
        else:
            micro_gradients = functools.partial(gradients_of, trained, rest)
            loss, sums, seen, gradients = _accumulated(micro_gradients, batch, const, weights, keys)
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        moved: Any = optax.apply_updates(trained, updates)
        new_params = joined(moved, rest)
        if sparse is not None and rows is not None:
            new_params = sparse.put(state.params, new_params, rows, num_rows)
            opt_state = sparse.put(state.opt_state, opt_state, rows, num_rows)
        if model.maintains:
            new_params = model.maintain(new_params, seen, jax.random.fold_in(step_key, _MAINTENANCE))
        metrics = {name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in sums.items()}
        metrics |= {"loss": loss, "grad_norm": _norm(gradients), "tokens": tokens}
        return TrainState(step=state.step + 1, params=new_params, opt_state=opt_state), metrics

    return step


def _norm(tree: Params) -> jax.Array:
    """Euclidean norm of all leaves together.

    The squares are spelled so that the compiler does not see they are the ones Adam takes: to share them it would
    write a whole array of them to memory.
    """
    return jnp.sqrt(sum((x * jax.lax.optimization_barrier(x)).sum() for x in jax.tree.leaves(tree)))


def _micro_batches(batch: Tree, parts: int) -> Tree:
    """[parts, b / parts, ...]: row i goes to micro-batch i % parts, so that every device keeps its own rows."""
    return {k: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}


def _accumulated(
    gradients_of: Callable[..., Any], batch: Tree, const: Tree, weights: Tree, keys: jax.Array
) -> tuple[jax.Array, Tree, Tree, Params]:
    """Loss, sums and gradients added up over micro-batches, one in memory at a time; what was seen, side by side."""

    def body(carry: Any, xs: Any) -> tuple[Any, Tree]:
        micro_batch, micro_key = xs
        (loss, (sums, seen)), gradients = gradients_of(micro_batch, const, weights, micro_key)
        return jax.tree.map(jnp.add, carry, (loss, sums, gradients)), seen

    xs = (batch, keys)
    first = jax.tree.map(lambda x: x[0], xs)
    shapes = jax.eval_shape(lambda b, k: gradients_of(b, const, weights, k), *first)
    (loss, (sums, _)), gradients = shapes
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss, sums, gradients))
    (loss, sums, gradients), seen = jax.lax.scan(body, zeros, xs)
    return loss, sums, seen, gradients
