"""Candidates scored by the label words of a question: one reading of the model, no token is generated.

The score of a candidate is the logits of the label words at the slot of the answer, [n, c]. Only that slot goes
through the head, and only c rows of it. Three layouts (`recjax.data.ranked`) make the same logits: every candidate
alone, all candidates of a prompt in one row, or beside the keys and values of a prompt that is read once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from recjax.core.errors import ConfigError, TrainingError
from recjax.core.module import FACTS, Functional, Params
from recjax.core.rows import take_rows
from recjax.core.sharding import Mesh
from recjax.data.ranked import LAYOUTS, ranked_batches
from recjax.data.ranking_records import Cost, RankingRecords
from recjax.ranking import fetch, queries_of, run_late

SLOTS = 16384
Rows = Sequence[int] | ArrayLike


class Scores(NamedTuple):
    """Logits float32 [n, c] of the label words for candidates 0 to n - 1, and what they cost."""

    logits: np.ndarray
    cost: Cost


def label_logits(
    model: Functional,
    params: Params,
    batch: Mapping[str, Any],
    label_rows: Rows,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """float32 [answers, c]: the logits of the label words, rows `label_rows` of the head, for each answer asked for.

    The layout is what the batch says: with `suffix_ids` answers are [b, m], else `query_at` [b, q]; both flat.
    Logits are divided by `temperature`, as the training objective does.
    """
    if "suffix_ids" in batch:
        bound: Any = model.bind(params)
        _, memory = bound.prefill({**batch, **params.get(FACTS, {})})
        hidden = bound.branch(memory, batch["suffix_ids"], jnp.maximum(batch["suffix_at"], 0))
        table, queries = memory.table, hidden.reshape(-1, hidden.shape[-1])
    else:
        out = model.apply(params, batch, train=False, key=None)
        table, queries = out["table"], queries_of(out, batch)
    return logits_of(queries, table, label_rows, temperature)


def logits_of(queries: ArrayLike, table: jax.Array, label_rows: Rows, temperature: float) -> jax.Array:
    """float32 [q, c]: the scores of `queries` [q, d] with some rows of the table, divided by `temperature`."""
    words, _ = take_rows(table, jnp.asarray(label_rows, jnp.int32), by_batch=False)
    queries = jnp.asarray(queries, jnp.float32)
    return jnp.einsum("qd,cd->qc", queries, words.astype(jnp.float32), precision="highest") / temperature


@functools.lru_cache(maxsize=2)  # the tasks of a run are many, their shapes of batches few
def _step(model: Functional, temperature: float, mesh: Mesh | None) -> Callable[..., jax.Array]:
    """`label_logits` of a model, compiled; `mesh` is the one that is active when it is called."""
    return jax.jit(lambda params, batch, rows: label_logits(model, params, batch, rows, temperature=temperature))


class Scorer:
    """Scores ranking records with any parameters of one model; compiled once for each shape of batch, whatever the
    task and its label words."""

    def __init__(
        self,
        model: Functional,
        *,
        label_rows: Sequence[int],
        layout: str = "cached",
        slots: int = SLOTS,
        temperature: float = 1.0,
        mesh: Mesh | None = None,
    ) -> None:
        """A batch has about `slots` slots, padding included. Raises `ConfigError` for a layout that there is not."""
        if layout not in LAYOUTS:
            raise ConfigError(f"there is no layout {layout!r}", expected=" or ".join(map(repr, LAYOUTS)))
        self.layout, self.slots, self.mesh = layout, slots, mesh
        self.label_rows = tuple(int(row) for row in label_rows)
        base = model.base
        bound: Any = base.bind(jax.eval_shape(base.init, jax.random.key(0)))
        self._longest: int | None = getattr(bound, "max_length", None)
        self._step = _step(model, temperature, mesh)

    def __call__(self, params: Params, records: RankingRecords) -> Scores:
        """Score every candidate.

        Raises `ConfigError` when a prompt is longer than the model's positions, `TrainingError` when an output is not
        a number.
        """
        if self._longest is not None and records.longest > self._longest:
            raise ConfigError(
                f"a prompt of {records.longest} tokens, candidate and all, and a model with {self._longest} positions",
                expected=f"at most {self._longest} tokens",
                mend="raise the max_length of the model, or lower the budget of the template",
            )
        rows = np.array(self.label_rows, np.int32)
        logits = np.full((records.candidates, len(self.label_rows)), np.nan, np.float32)
        cost = Cost()
        parts = int(np.lcm(self.mesh.size_of("batch") if self.mesh else 1, jax.process_count()))
        place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        with self.mesh.activate() if self.mesh else contextlib.nullcontext():
            batches = ranked_batches(records, layout=self.layout, slots=self.slots, parts=parts, **place)
            for asked, found in run_late(lambda asked: self._step(params, self._placed(asked.batch), rows), batches):
                real = asked.candidate >= 0
                logits[asked.candidate[real]] = fetch(found)[real]
                cost += asked.cost
        bad = int((~np.isfinite(logits)).any(axis=1).sum())
        if bad:
            raise TrainingError(
                f"the model's output is not a number for {bad} of {len(logits)} candidates",
                mend="evaluate an earlier checkpoint, or lower the learning rate and train again",
            )
        return Scores(logits, cost)

    def _placed(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
        return self.mesh.put_batch(dict(batch)) if self.mesh else batch
