"""Evaluation of a model beside the baselines: every user of a split, every item of the catalogue, one protocol.

A model's query is its `hidden` at the last real position of a user's history, scored against the model's own
`table` by the exact search of `recjax.index.exact`; the jitted step is compiled once per batch shape. A user without
any history has a zero query, so all items score alike and come in row order, which is by popularity. Baselines see
the same users, remove the same seen items and are ranked by the same rule. Nothing is sampled: the candidates are
the whole catalogue. Results do not depend on batch size, mesh or number of processes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from recjax.baselines.fit import BASELINES, Ground
from recjax.baselines.harness import Ranked, rank_batches
from recjax.baselines.records import Records
from recjax.core.errors import ConfigError, ExamplesError, TrainingError
from recjax.core.module import Functional, Params
from recjax.core.sharding import Mesh
from recjax.data.examples import Examples
from recjax.data.pipeline import eval_batches
from recjax.data.sampled import HeldExamples
from recjax.index.exact import rank_and_top_k
from recjax.index.scoring import LOWEST
from recjax.metrics.buckets import item_buckets, popularity_percentile, user_buckets
from recjax.metrics.topk import Coverage, Mean, merge, topk_state, values
from recjax.protocol import Evaluation, protocol_of, shown_users
from recjax.results import Result, System

__all__ = ["MODEL", "Evaluation", "Evaluator", "evaluate", "rank_baselines", "result_of"]

MODEL = "model"
_BY_SLOT = ("history_ids", "history_time", "query_time", "positions", "segment_ids")
_SMALLEST_WIDTH = 16


class Evaluator:
    """Ranks the users of one split, with any parameters of one model or with a baseline."""

    def __init__(
        self,
        examples: Examples,
        *,
        split: str,
        config: Evaluation,
        model: Functional | None = None,
        history_length: int = 0,
        times: str | bool = "none",
        mesh: Mesh | None = None,
    ) -> None:
        """Raises `ConfigError` when a cut-off exceeds the catalogue, `ExamplesError` for a split without users."""
        vocab = examples.vocab
        if config.k[-1] > vocab.num_items:
            raise ConfigError(
                f"a cut-off of {config.k[-1]} in a catalogue of {vocab.num_items} items",
                where="Evaluation.k",
                expected=f"at most {vocab.num_items}",
            )
        self.split, self.config, self.mesh = split, config, mesh
        self.examples = HeldExamples(examples.path, examples.manifest, config.max_users, config.seed)
        self.valid = vocab.valid
        users = Records.of(self.examples, split).user_index
        if not len(users):
            raise ExamplesError(f"the split {split!r} has no users to rank", where=str(examples.path))
        self.shown = np.random.default_rng(config.seed).permutation(users)[: config.samples]
        self._history_length, self._model = history_length, model
        self.times = times or "none"
        self._percentile = popularity_percentile(examples.item_count, vocab.valid)
        self._step = None if model is None else jax.jit(_make_step(model, k=config.k[-1], block=config.block))

    def __call__(self, params: Params) -> System:
        """Rank every user with the model; `TrainingError` when the model's output is not a number."""
        started = time.perf_counter()
        with self.mesh.activate() if self.mesh else contextlib.nullcontext():
            return self.collect(self._model_batches(params), started)

    def collect(self, batches: Iterable[Ranked], started: float, settings: Mapping[str, Any] | None = None) -> System:
        """Metrics over batches of ranked users."""
        ks = self.config.k
        state: dict[str, Mean] = {}
        coverage = Coverage(len(self.valid), ks)
        users, ranks = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        recommended: dict[int, list[int]] = {}
        for found in batches:
            state = merge(state, topk_state(found.rank, ks))
            coverage.add(found.rows)
            for k in ks:
                rows = found.rows[:, :k][found.rows[:, :k] > 0]
                state = merge(state, {f"popularity@{k}": Mean(float(self._percentile[rows].sum()), len(rows))})
            for at in np.flatnonzero(np.isin(found.user_index, self.shown)):
                recommended[int(found.user_index[at])] = found.rows[at].tolist()
            users.append(found.user_index)
            ranks.append(found.rank)
        order = np.argsort(np.concatenate(users), kind="stable")
        return System(
            rank=np.concatenate(ranks)[order],
            values=values(state) | coverage.values(self.valid),
            recommended=recommended,
            settings=settings or {},
            seconds=time.perf_counter() - started,
        )

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """This process's batches of the split, without slots that are padding in every row of every process.

        The batch size is rounded up to what mesh and processes divide. Lengths are cut to a few widths, so that few
        shapes are compiled.
        """
        parts = int(np.lcm(self.mesh.size_of("batch") if self.mesh else 1, jax.process_count()))
        size = -(-self.config.batch_size // parts) * parts
        batches = eval_batches(
            self.examples,
            self.split,
            batch_size=size,
            history_length=self._history_length,
            times=self.times,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        lengths = np.sort(self.examples.source(self.split).lengths)[::-1]
        for batch, longest in zip(batches, lengths[::size].tolist(), strict=True):
            width = min(max(_SMALLEST_WIDTH, 1 << (longest - 1).bit_length()), self._history_length)
            if batch["segment_ids"][:, width:].any():
                raise ValueError("evaluation batches are not in order of length")
            yield {k: v[:, :width] if k in _BY_SLOT else v for k, v in batch.items()}

    def _model_batches(self, params: Params) -> Iterator[Ranked]:
        if self._step is None:
            raise ValueError("this evaluator was made without a model")
        waiting = None
        for batch in self.batches():
            if self.config.seen == "kept":
                batch["seen_ids"] = np.zeros_like(batch["seen_ids"][:, :1])
            placed = self.mesh.put_batch(batch) if self.mesh else batch
            started = self._step(params, placed, self.valid)
            if waiting is not None:
                yield _read(*waiting)
            waiting = placed, started
        if waiting is not None:
            yield _read(*waiting)


def evaluate(
    model: Functional,
    params: Params,
    examples: Examples,
    *,
    split: str = "test",
    config: Evaluation | None = None,
    history_length: int,
    times: str = "none",
    mesh: Mesh | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> Result:
    """The model and the baselines of `config` on one split; `protocol` adds to the protocol block (seeds, recipe)."""
    config = config or Evaluation()
    evaluator = Evaluator(
        examples, split=split, config=config, model=model, history_length=history_length, times=times, mesh=mesh
    )
    return result_of(
        evaluator,
        {MODEL: evaluator(params), **rank_baselines(evaluator)},
        {"history_length": history_length, **(protocol or {})},
    )


def rank_baselines(evaluator: Evaluator) -> dict[str, System]:
    """Every baseline of the config over the evaluator's users; empty when there is none."""
    config, examples = evaluator.config, evaluator.examples
    if not config.baselines:
        return {}
    records, remove_seen = Records.of(examples, evaluator.split), config.seen == "removed"
    ground = Ground(
        train=Records.of(examples, "train"),
        tuning=Records.of(examples, "valid"),
        item_count=examples.item_count,
        valid=evaluator.valid,
        remove_seen=remove_seen,
        seed=config.seed,
    )
    systems = {}
    for name in config.baselines:
        started = time.perf_counter()
        scorer = BASELINES[name](ground)
        batches = rank_batches(scorer, records, ground.valid, config.k[-1], remove_seen=remove_seen)
        systems[name] = evaluator.collect(batches, started, scorer.settings)
    return systems


def result_of(evaluator: Evaluator, systems: Mapping[str, System], protocol: Mapping[str, Any]) -> Result:
    """Systems ranked by one evaluator, side by side; `protocol` adds to the protocol block, its seeds to the seeds."""
    config, examples = evaluator.config, evaluator.examples
    records = Records.of(examples, evaluator.split)
    records = records.take(np.argsort(records.user_index, kind="stable"))
    stated = protocol_of(config, examples, evaluator.split, len(records), times=evaluator.times)
    return Result(
        systems=systems,
        user_index=records.user_index,
        label=records.label,
        item_bucket=item_buckets(examples.item_count, evaluator.valid)[records.label],
        user_bucket=user_buckets(records.train_events, config.cold_events),
        ks=config.k,
        bootstrap_samples=config.bootstrap_samples,
        seed=config.seed,
        protocol={**stated, **protocol, "seeds": {**protocol.get("seeds", {}), **stated["seeds"]}},
        samples=shown_users(evaluator.shown.tolist(), examples, records, systems),
    )


def _make_step(model: Functional, *, k: int, block: int) -> Callable[..., tuple[jax.Array, ...]]:
    """(params, batch, valid) -> rank [b], rows [b, k], whether query and score of the target are numbers [b]."""

    def step(params: Params, batch: Mapping[str, jax.Array], valid: jax.Array) -> tuple[jax.Array, ...]:
        out = model.apply(params, batch, train=False, key=None)
        events = jnp.sum(batch["segment_ids"] > 0, axis=1)
        last = jnp.maximum(events - 1, 0)[:, None, None]
        query = jnp.take_along_axis(out["hidden"], last, axis=1)[:, 0].astype(jnp.float32)
        query = jnp.where((events > 0)[:, None], query, 0.0)
        found = rank_and_top_k(
            query, out["table"], batch["label_ids"], k, valid=valid, exclude_ids=batch["seen_ids"], block=block
        )
        return found.rank, found.rows, jnp.all(jnp.isfinite(query), axis=1) & (found.label_scores != LOWEST)

    return step


def _read(batch: Mapping[str, Any], outputs: tuple[jax.Array, ...]) -> Ranked:
    """The results of a batch on the host, from all processes, without the rows that fill it."""
    rank, rows, is_finite = (_fetch(x) for x in outputs)
    real = _fetch(batch["row_weight"]) > 0
    if not is_finite[real].all():
        raise TrainingError(
            f"the model's output is not a number for {int((~is_finite[real]).sum())} of {int(real.sum())} users",
            mend="evaluate an earlier checkpoint, or lower the learning rate and train again",
        )
    user_index, label = _fetch(batch["user_index"]).astype(np.int64), _fetch(batch["label_ids"])
    return Ranked(user_index[real], label[real], rank[real], rows[real])


def _fetch(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
