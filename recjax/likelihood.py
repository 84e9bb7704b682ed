"""How likely a model finds held-out text: nats for each token that is predicted."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recjax.core.errors import TrainingError
from recjax.core.module import Functional, Params
from recjax.core.sharding import Mesh
from recjax.data.heldout_text import Told, text_batches
from recjax.data.record import Columns
from recjax.index.scoring import log_partition, scores_of
from recjax.ranking import fetch, run_late

_BLOCK = 2048  # rows of the vocabulary scored at a time, for all slots of a batch


class Likelihood(NamedTuple):
    """Of each document, [n]: the sum of -log p over its predicted tokens, in nats, and how many these are."""

    nll: np.ndarray
    tokens: np.ndarray


class TextScorer:
    """Reads documents with any parameters of one model; every batch has the same shape."""

    def __init__(
        self,
        model: Functional,
        *,
        valid: np.ndarray,
        row_length: int,
        slots: int,
        temperature: float = 1.0,
        mesh: Mesh | None = None,
    ) -> None:
        """`valid` bool [v] are the rows of the table that are tokens; scores are divided by `temperature`."""
        self._valid, self._length, self._slots, self._mesh = valid, row_length, slots, mesh

        def step(params: Params, batch: Mapping[str, Any], valid: jax.Array) -> jax.Array:
            out = model.apply(params, batch, train=False, key=None)
            table = out["table"]
            queries = out["hidden"].reshape(-1, table.shape[-1]).astype(jnp.float32) / temperature
            scores = scores_of(queries, table, batch["target_ids"].reshape(-1, 1))[:, 0]
            nll = log_partition(queries, table, valid=valid, block=_BLOCK) - scores
            return jnp.where(batch["weight"].reshape(-1) > 0, nll, 0.0)

        self._step = jax.jit(step)

    def __call__(self, params: Params, columns: Columns) -> Likelihood:
        """Raises `TrainingError` when an output is not a number."""
        count = len(columns["items"])
        nll, tokens = np.zeros(count), np.zeros(count)
        parts = int(np.lcm(self._mesh.size_of("batch") if self._mesh else 1, jax.process_count()))
        place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        batches = text_batches(columns, row_length=self._length, slots=self._slots, parts=parts, **place)

        def run(told: Told) -> tuple[Any, Any]:
            batch = self._mesh.put_batch(told.batch) if self._mesh else told.batch
            return self._step(params, batch, self._valid), batch["weight"]

        with self._mesh.activate() if self._mesh else contextlib.nullcontext():
            for told, (found, weight) in run_late(run, batches):
                real = (told.document >= 0) & (fetch(weight).reshape(-1) > 0)
                nll += np.bincount(told.document[real], fetch(found)[real].astype(np.float64), minlength=count)
                tokens += np.bincount(told.document[real], minlength=count)
        if not np.isfinite(nll).all():
            raise TrainingError(
                f"the likelihood of {int((~np.isfinite(nll)).sum())} of {count} documents is not a number",
                mend="evaluate an earlier checkpoint, or lower the learning rate and train again",
            )
        return Likelihood(nll, tokens)
