"""Evaluation of a model beside the baselines: every user of a split, every item of the catalogue, one protocol.

A model's query is its `hidden` at the last event of a user's history, scored against the model's own `table` by the
exact search of `recjax.index.exact`; the jitted step (`recjax.ranking`) is compiled once per batch shape. A user
without any history has a zero query, so all items score alike and come in row order, which is by popularity.
Baselines see the same users, remove the same seen items and are ranked by the same rule. The candidates are the whole
catalogue; a ranking among sampled candidates comes beside it when asked for. Results do not depend on batch size,
mesh or number of processes.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from recjax.baselines.fit import BASELINES, BY_TEXT, Ground
from recjax.baselines.harness import Ranked, Scorer, rank_batches
from recjax.baselines.records import Records
from recjax.core.errors import ConfigError, ExamplesError
from recjax.core.module import Functional, Params
from recjax.core.sharding import Mesh
from recjax.data.candidates import draw_candidates
from recjax.data.examples import Examples
from recjax.data.heldout_packed import packed_batches
from recjax.data.pipeline import eval_batches
from recjax.data.sampled import HeldExamples, View
from recjax.data.spelling import Prompts
from recjax.data.vocab import FIRST_ITEM
from recjax.metrics.buckets import item_buckets, popularity_percentile, user_buckets
from recjax.metrics.topk import Coverage
from recjax.protocol import Evaluation, protocol_of, shown_users
from recjax.ranking import make_spelled_step, make_step, read, run_late
from recjax.results import Result, System, per_user_values
from recjax.retrieve import Spelled
from recjax.slices import Task

__all__ = ["MODEL", "Evaluation", "Evaluator", "assess", "evaluate", "fit_baselines", "rank_baselines", "result_of"]

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
        prompts: Prompts | None = None,
        catalogue: Spelled | None = None,
        history_length: int = 0,
        times: str = "none",
        temperature: float = 1.0,
        mesh: Mesh | None = None,
    ) -> None:
        """`temperature` is what the training objective divides scores by, for the likelihood of a target; `prompts`
        is how a model of tokens is asked, and `catalogue` how items of several tokens are found.

        Raises `ConfigError` when a cut-off exceeds the catalogue, `ExamplesError` for a split without users.
        """
        vocab = examples.vocab
        if config.k[-1] > vocab.num_items:
            raise ConfigError(
                f"a cut-off of {config.k[-1]} in a catalogue of {vocab.num_items} items",
                where="Evaluation.k",
                expected=f"at most {vocab.num_items}",
            )
        self.split, self.config, self.mesh = split, config, mesh
        self.examples = HeldExamples(examples.path, examples.manifest, config.max_users, config.seed)
        self.valid, self.prompts = vocab.valid, prompts
        self.history_length, self.model, self.times, self.temperature = history_length, model, times, temperature
        self._percentile = popularity_percentile(examples.item_count, vocab.valid)
        self._step, self._packs = None, False
        if model is not None:
            module = model.bind(jax.eval_shape(model.init, jax.random.key(0)))
            k, block = config.k[-1], config.block
            if catalogue is not None:
                self._step = make_spelled_step(model, catalogue, k=k, num_items=vocab.num_items)
            else:
                packs = self._packs = getattr(module, "packs", False)
                self._step = make_step(model, k=k, block=block, temperature=temperature, in_parts=packs)
        self._look()

    def _look(self) -> None:
        """What follows from the users of the split."""
        self.records = Records.of(self.examples, self.split)
        prompts, length = self.prompts, self.history_length
        self._asked, self._slots = self.examples, length
        if prompts is not None:
            self._asked = self.examples.through(self.split, lambda records: prompts.spell(records, length))
            self._slots = prompts.slots(length)
        if not len(self.records):
            raise ExamplesError(f"the split {self.split!r} has no users to rank", where=str(self.examples.path))
        users = self.records.user_index
        self.shown = np.random.default_rng(self.config.seed).permutation(users)[: self.config.samples]
        self.candidates: np.ndarray | None = None
        if self.config.candidates:
            seen, offsets = self.records.seen_items()
            rows = slice(FIRST_ITEM, FIRST_ITEM + self.examples.vocab.num_items)
            self.candidates = draw_candidates(
                seen, offsets, self.records.label, users, rows, self.config.candidates, self.config.seed
            )
        self._by_number = np.argsort(users, kind="stable")

    def through(self, view: View) -> Evaluator:
        """The same evaluation of records changed by a view (`recjax.data.views`); what is compiled is shared."""
        other = copy.copy(self)
        other.examples = self.examples.through(self.split, view)
        other._look()
        return other

    def __call__(self, params: Params) -> System:
        """Rank every user with the model; `TrainingError` when the model's output is not a number."""
        started = time.perf_counter()
        with self.on_devices():
            return self.collect(self._model_batches(params), started)

    def on_devices(self) -> contextlib.AbstractContextManager[None]:
        """Where the model is called: under the mesh, if there is one."""
        return self.mesh.activate() if self.mesh else contextlib.nullcontext()

    def rank_with(self, scorer: Scorer, started: float | None = None) -> System:
        """Rank every user with a baseline; its time counts from `started`."""
        batches = rank_batches(
            scorer,
            self.records,
            self.valid,
            self.config.k[-1],
            remove_seen=self.config.seen == "removed",
            candidates=self.candidates,
        )
        return self.collect(batches, time.perf_counter() if started is None else started, scorer.settings)

    def collect(self, batches: Iterable[Ranked], started: float, settings: Mapping[str, Any] | None = None) -> System:
        """Metrics over batches of ranked users."""
        ks = self.config.k
        coverage = Coverage(len(self.valid), ks)
        popular = {k: np.zeros(2) for k in ks}
        recommended: dict[int, list[int]] = {}
        found: list[Ranked] = []
        for part in batches:
            coverage.add(part.rows)
            for k in ks:
                rows = part.rows[:, :k][part.rows[:, :k] > 0]
                popular[k] += self._percentile[rows].sum(), len(rows)
            for at in np.flatnonzero(np.isin(part.user_index, self.shown)):
                recommended[int(part.user_index[at])] = part.rows[at].tolist()
            found.append(part._replace(rows=part.rows[:, 0]))
        order = np.argsort(np.concatenate([f.user_index for f in found]), kind="stable")
        rank, best = (np.concatenate([getattr(f, name) for f in found])[order] for name in ("rank", "rows"))
        more: dict[str, Any] = {
            name: None if found[0]._asdict()[name] is None else np.concatenate([getattr(f, name) for f in found])[order]
            for name in ("nll", "sampled_rank")
        }
        means = {name: float(values.mean()) for name, values in per_user_values(rank, ks, **more).items()}
        means |= {f"popularity@{k}": float(total / max(count, 1)) for k, (total, count) in popular.items()}
        return System(
            rank=rank,
            values=means | coverage.values(self.valid),
            best=best,
            recommended=recommended,
            settings=settings or {},
            seconds=time.perf_counter() - started,
            **more,
        )

    def batches(self, *, packed: bool = True) -> Iterator[dict[str, np.ndarray]]:
        """This process's batches of the split.

        Several users share a row where the model can tell them apart (`packs`) and `packed` allows it. Batch sizes
        are rounded up to what mesh and processes divide; shapes are few, because each is compiled.
        """
        parts = int(np.lcm(self.mesh.size_of("batch") if self.mesh else 1, jax.process_count()))
        place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        if packed and self._packs:
            source, size = self._asked.source(self.split), self.config.batch_size
            batches = packed_batches(source, users=size, row_length=self._slots, times=self.times, parts=parts, **place)
        else:
            batches = self._padded(parts, place)
        return map(self._completed, batches)

    def _padded(self, parts: int, place: Mapping[str, int]) -> Iterator[dict[str, np.ndarray]]:
        """A row for each user, cut to a few widths, without slots that are padding in all rows of all processes."""
        size, length = -(-self.config.batch_size // parts) * parts, self._slots
        batches = eval_batches(
            self._asked, self.split, batch_size=size, history_length=length, times=self.times, **place
        )
        lengths = np.sort(self._asked.source(self.split).lengths)[::-1]
        for batch, longest in zip(batches, lengths[::size].tolist(), strict=True):
            width = min(max(_SMALLEST_WIDTH, 1 << (longest - 1).bit_length()), length)
            if batch["segment_ids"][:, width:].any():
                raise ValueError("evaluation batches are not in order of length")
            batch = {k: v[:, :width] if k in _BY_SLOT else v for k, v in batch.items()}
            batch["query_at"] = (batch["segment_ids"] > 0).sum(axis=1, dtype=np.int32)[:, None] - 1
            yield batch

    def _completed(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the protocol adds to a batch or takes away."""
        if self.config.seen == "kept":
            batch["seen_ids"] = np.zeros_like(batch["seen_ids"][:, :1])
        if self.candidates is not None:
            users = self.records.user_index[self._by_number]
            at = np.searchsorted(users, np.maximum(batch["user_index"], users[0]))
            drawn = self.candidates[self._by_number[at]]
            batch["candidate_ids"] = np.where((batch["row_weight"] > 0)[:, None], drawn, 0)
        return batch

    def place(self, batch: dict[str, np.ndarray]) -> Mapping[str, Any]:
        """A batch where the mesh wants it."""
        return self.mesh.put_batch(batch) if self.mesh else batch

    def _model_batches(self, params: Params) -> Iterator[Ranked]:
        step = self._step
        if step is None:
            raise ValueError("this evaluator was made without a model")
        valid = self.valid if self.prompts is None else self.prompts.tokens.valid
        for batch, outputs in run_late(lambda b: step(params, b, valid), map(self.place, self.batches())):
            yield read(batch, outputs)


def evaluate(
    model: Functional,
    params: Params,
    examples: Examples,
    *,
    split: str = "test",
    config: Evaluation | None = None,
    history_length: int,
    times: str = "none",
    temperature: float = 1.0,
    mesh: Mesh | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> Result:
    """The model and the baselines of `config` on one split; `protocol` adds to the protocol block (seeds, recipe)."""
    config = config or Evaluation()
    evaluator = Evaluator(
        examples,
        split=split,
        config=config,
        model=model,
        history_length=history_length,
        times=times,
        mesh=mesh,
        temperature=temperature,
    )
    return assess(evaluator, params, {"history_length": history_length, **(protocol or {})})


def assess(evaluator: Evaluator, params: Params, protocol: Mapping[str, Any]) -> Result:
    """The model beside the baselines and, where the config names any, the hard tasks."""
    from recjax.hard import hard_tasks  # which is made of evaluations itself

    fitted = fit_baselines(evaluator)
    systems = {MODEL: evaluator(params), **rank_baselines(evaluator, fitted)}
    return result_of(evaluator, systems, protocol, hard_tasks(evaluator, params, systems, fitted))


def fit_baselines(evaluator: Evaluator) -> dict[str, tuple[Scorer, float]]:
    """Every baseline of the config, and the seconds that fitting took."""
    config, examples = evaluator.config, evaluator.examples
    if not config.baselines:
        return {}
    ground = Ground(
        train=Records.of(examples, "train"),
        tuning=Records.of(examples, "valid"),
        item_count=examples.item_count,
        valid=evaluator.valid,
        remove_seen=config.seen == "removed",
        seed=config.seed,
        asked=evaluator.records,
        target_time=evaluator.times == "target",
        now=_period_start(evaluator),
        titles=examples.titles(),
    )
    fitted = {}
    for name in config.baselines:
        if name in BY_TEXT and ground.train.text is None:
            continue
        started = time.perf_counter()
        scorer = BASELINES[name](ground)
        fitted[name] = scorer, time.perf_counter() - started
    return fitted


def _period_start(evaluator: Evaluator) -> int | None:
    """When the held-out period of a split by time begins; None where users are split each by their own events."""
    times = evaluator.records.times
    if times is None or not str(evaluator.examples.manifest.get("split_rule", "")).startswith("global time"):
        return None
    return int(times.max()) + 1


def rank_baselines(evaluator: Evaluator, fitted: Mapping[str, tuple[Scorer, float]] | None = None) -> dict[str, System]:
    """Every baseline of the config over the evaluator's users; empty when there is none."""
    fitted = fit_baselines(evaluator) if fitted is None else fitted
    return {n: evaluator.rank_with(scorer, time.perf_counter() - took) for n, (scorer, took) in fitted.items()}


def result_of(
    evaluator: Evaluator,
    systems: Mapping[str, System],
    protocol: Mapping[str, Any],
    hard: Mapping[str, Task] | None = None,
) -> Result:
    """Systems ranked by one evaluator, side by side; `protocol` adds to the protocol block, its seeds to the seeds."""
    config, examples = evaluator.config, evaluator.examples
    records = evaluator.records.take(np.argsort(evaluator.records.user_index, kind="stable"))
    stated = protocol_of(
        config,
        examples,
        evaluator.split,
        len(records),
        times=evaluator.times,
        temperature=evaluator.temperature,
        resampled="users" if records.text is None else "queries",
    )
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
        hard=hard or {},
        # answers to one query stand and fall together
        cluster=None if records.text is None else np.unique(records.text.astype(str), return_inverse=True)[1],
    )
