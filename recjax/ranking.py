"""Users ranked by a model: the step that is compiled, and its results on the host.

A model's query is its `hidden` at the slot after which the next item is asked for (`query_at`), scored against the
model's own `table`. A model that can compute just those slots cheaply answers with `query` [b, q, d] instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from recjax.baselines.harness import Ranked
from recjax.core import sharding
from recjax.core.errors import TrainingError
from recjax.core.module import Functional, Params
from recjax.core.rows import take_rows
from recjax.index.exact import rank_among, rank_and_top_k, top_k
from recjax.index.scoring import LOWEST, log_partition
from recjax.retrieve import Spelled

# Slots of a batch that go through a model together, on a CPU.
SLOTS = 3200
_BY_ROW = ("history_ids", "history_time", "query_time", "positions", "segment_ids", "query_at")


class Outputs(NamedTuple):
    """What a step finds for every query: see `Ranked`; `is_finite` [b] says that query and target score are numbers."""

    rank: jax.Array
    rows: jax.Array
    is_finite: jax.Array
    nll: jax.Array | None
    sampled_rank: jax.Array | None


Step = Callable[[Params, Mapping[str, Any], Any], Outputs]


def queries_of(out: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
    """float32 [b * q, d]: the model's output at the slots `query_at` [b, q], zero where a slot is below 0."""
    at = batch["query_at"]
    if "query" in out:
        query = out["query"]
    else:
        query = jnp.take_along_axis(out["hidden"], jnp.maximum(at, 0)[..., None], axis=1)
    query = jnp.where((at >= 0)[..., None], query.astype(jnp.float32), 0.0)
    return query.reshape(-1, query.shape[-1])


def encode(
    model: Functional, params: Params, batch: Mapping[str, jax.Array], *, in_parts: bool
) -> tuple[jax.Array, jax.Array]:
    """The queries of the batch, as `queries_of`, and the table they are scored against.

    `in_parts` runs a model that treats every row by itself over a few rows at a time where that is faster: on a CPU,
    whose caches then hold what one block of the model hands to the next.
    """
    inputs = {name: batch[name] for name in _BY_ROW if name in batch}
    rows, length = batch["history_ids"].shape
    mesh = sharding.active()
    devices = mesh.size_of("batch") if mesh else 1
    size = _rows_at_once(rows // devices, length) if in_parts and sharding.platform() == "cpu" else rows // devices
    steps = rows // devices // size
    if steps == 1:
        out = model.apply(params, batch, train=False, key=None)
        return queries_of(out, batch), out["table"]

    def cut(x: jax.Array) -> jax.Array:  # [steps, rows of a step, ...], a step having as many rows of every device
        x = x.reshape(devices, steps, size, *x.shape[1:]).swapaxes(0, 1).reshape(steps, -1, *x.shape[1:])
        return sharding.constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    def part(inputs: dict[str, jax.Array]) -> jax.Array:
        return queries_of(model.apply(params, inputs, train=False, key=None), inputs)

    cuts = {name: cut(x) for name, x in inputs.items()}
    queries = jax.lax.map(part, cuts)
    width = queries.shape[-1]
    queries = queries.reshape(steps, devices, -1, width).swapaxes(0, 1).reshape(-1, width)
    first = {name: x[0] for name, x in cuts.items()}
    table = model.apply(params, first, train=False, key=None)["table"]  # all else of this call is never computed
    return sharding.constrain(queries, "batch", None), table


def _rows_at_once(rows: int, length: int) -> int:
    """The largest part of `rows` with few enough slots."""
    return max(size for size in range(1, rows + 1) if rows % size == 0 and (size == 1 or size * length <= SLOTS))


def make_step(model: Functional, *, k: int, block: int, temperature: float, in_parts: bool) -> Step:
    """(params, batch, valid) -> `Outputs` for the queries of the batch; see `encode` for `in_parts`.

    The likelihood is that of a softmax over all valid items, none removed, of scores divided by `temperature`.
    """

    def step(params: Params, batch: Mapping[str, jax.Array], valid: jax.Array) -> Outputs:
        query, table = encode(model, params, batch, in_parts=in_parts)
        label = batch["label_ids"]
        found = rank_and_top_k(query, table, label, k, valid=valid, exclude_ids=batch["seen_ids"], block=block)
        partition = log_partition(query / temperature, table, valid=valid, block=block)
        among = batch.get("candidate_ids")
        return Outputs(
            found.rank,
            found.rows,
            jnp.all(jnp.isfinite(query), axis=1) & (found.label_scores != LOWEST),
            partition - found.label_scores / temperature,
            None if among is None else rank_among(query, table, label, among),
        )

    return jax.jit(step)


def make_spelled_step(model: Functional, catalogue: Spelled, *, k: int, num_items: int) -> Step:
    """(params, batch, valid) -> `Outputs` for models that name items in several tokens.

    A target that is not among the best `k` has rank `num_items`, which no cut-off reaches; neither likelihood nor
    sampled candidates are given.
    """

    def step(params: Params, batch: Mapping[str, Any], valid: jax.Array) -> Outputs:
        label = batch["label_ids"]
        seen = jnp.where(batch["seen_ids"] == label[:, None], 0, batch["seen_ids"])
        found = catalogue(model, params, batch, k, exclude=seen)
        is_label = found.rows == label[:, None]
        rank = jnp.where(is_label.any(axis=1), jnp.argmax(is_label, axis=1), num_items)
        return Outputs(rank.astype(jnp.int32), found.rows, ~jnp.isnan(found.scores).any(axis=1), None, None)

    return jax.jit(step)


def make_recommend(model: Functional, *, k: int, block: int, mean_of_items: bool) -> Callable[..., jax.Array]:
    """(params, batch, valid) -> the best `k` rows [b, k]; the query is the mean of the history's item vectors if asked.

    That mean asks the item vectors alone, without the encoder, what they know of tastes.
    """

    def recommend(params: Params, batch: Mapping[str, jax.Array], valid: jax.Array) -> jax.Array:
        out = model.apply(params, batch, train=False, key=None)
        table, query = out["table"], queries_of(out, batch)
        if mean_of_items:
            ids = batch["history_ids"]
            held = valid[ids] & (batch["segment_ids"] > 0)
            rows = take_rows(table, ids)[0] if table.ndim == 2 else jnp.take_along_axis(table, ids[..., None], axis=1)
            total = jnp.sum(jnp.where(held[..., None], rows.astype(jnp.float32), 0.0), axis=1)
            query = total / jnp.maximum(held.sum(axis=1, keepdims=True), 1)
        return top_k(query, table, k, valid=valid, exclude_ids=batch["seen_ids"], block=block)[1]

    return jax.jit(recommend)


def run_late(run: Callable[[Any], Any], batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """(batch, run(batch)) one behind, so that the next batch is made while the device works on the last."""
    waiting = None
    for batch in batches:
        started = batch, run(batch)
        if waiting is not None:
            yield waiting
        waiting = started
    if waiting is not None:
        yield waiting


def read(batch: Mapping[str, Any], outputs: Outputs) -> Ranked:
    """The results of a batch on the host, from all processes, without the rows that fill it.

    Raises `TrainingError` when the model's output is not a number.
    """
    rank, rows, is_finite = (fetch(x) for x in outputs[:3])
    nll = None if outputs.nll is None else fetch(outputs.nll)
    real = fetch(batch["row_weight"]) > 0
    if not is_finite[real].all():
        raise TrainingError(
            f"the model's output is not a number for {int((~is_finite[real]).sum())} of {int(real.sum())} users",
            mend="evaluate an earlier checkpoint, or lower the learning rate and train again",
        )
    user_index, label = fetch(batch["user_index"]).astype(np.int64), fetch(batch["label_ids"])
    among = None if outputs.sampled_rank is None else fetch(outputs.sampled_rank)[real]
    return Ranked(user_index[real], label[real], rank[real], rows[real], among, None if nll is None else nll[real])


def fetch(x: Any) -> np.ndarray:
    """An array of all processes as numpy."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
