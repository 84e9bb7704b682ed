"""Evaluation of a language model on held-out prompts: ranking tasks by their label words, documents by likelihood.

Which of the two a task gets is decided by its records. A ranking task is judged by auc, grouped auc and log loss, each
with its interval over users, by how many events a user had, and by whether its probabilities can be believed. One
temperature and bias for each task, fitted on the validation split, make a second system; they are never fitted on what
is reported. The plainest baseline stands beside them: how often each answer is right, or each token occurs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from recjax.core.errors import ConfigError, ExamplesError
from recjax.core.module import Functional, Params
from recjax.core.sharding import Mesh
from recjax.data.answers import Answers
from recjax.data.examples import Examples
from recjax.data.ranked import LAYOUTS
from recjax.data.ranking_records import RankingRecords, has_candidates
from recjax.data.sampled import HeldExamples
from recjax.label_metrics import METRICS, history_groups, judged
from recjax.likelihood import Likelihood, TextScorer
from recjax.metrics.auc import ratio_by_user
from recjax.metrics.calibration import Calibration, fit_calibration
from recjax.results import Result, System
from recjax.scoring import SLOTS, Scorer, Scores
from recjax.slices import Task

MODEL, CALIBRATED, PRIOR, UNIGRAM = "model", "calibrated", "prior", "unigram"
_VALID = "valid"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelEvaluation:
    """How to evaluate.

    `layout` says how candidates share their prompt ("cached", "shared", "naive": the same scores at other cost), and
    a batch has about `slots` slots. `max_users` evaluates a fixed sample of the records, drawn by `seed` (None: all).
    Users are told apart by how many events they had when asked: up to each of the numbers of `history`, and more.
    Intervals are from `bootstrap_samples` resamples of users. `main` is the metric that runs are compared by:
    "auc" where they rank, "nll" where they read. `others` are what other models answered, which stand in the tables
    of the tasks that they answer.
    """

    layout: str = "cached"
    slots: int = SLOTS
    max_users: int | None = None
    history: Sequence[int] = (5, 20, 100)
    bootstrap_samples: int = 1000
    main: str = "auc"
    others: Sequence[Answers] = ()
    seed: int = 0

    k: ClassVar[tuple[int, ...]] = ()
    metrics: ClassVar[tuple[str, ...]] = (*METRICS, "nll")

    def __post_init__(self) -> None:
        object.__setattr__(self, "history", tuple(self.history))
        object.__setattr__(self, "others", tuple(self.others))
        if self.layout not in LAYOUTS:
            raise ConfigError(f"LabelEvaluation.layout = {self.layout!r}", expected=" or ".join(map(repr, LAYOUTS)))
        for name in ("slots", "bootstrap_samples", "max_users"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"LabelEvaluation.{name} = {getattr(self, name)}", expected="at least 1")
        if not self.history or list(self.history) != sorted(set(self.history)) or self.history[0] < 0:
            raise ConfigError(f"LabelEvaluation.history = {self.history}", expected="rising numbers of events")
        if self.main not in self.metrics:
            raise ConfigError(f"LabelEvaluation.main = {self.main!r}", expected=" or ".join(map(repr, self.metrics)))

    def shown(self) -> tuple[str, ...]:
        """The metrics that a line of progress shows, where a task has them."""
        return ("auc", "log_loss", "nll")


class LabelEvaluator:
    """Judges one split of one task, with any parameters of one model."""

    def __init__(
        self,
        examples: Examples,
        *,
        split: str,
        config: LabelEvaluation,
        model: Functional,
        row_length: int,
        temperature: float = 1.0,
        mesh: Mesh | None = None,
    ) -> None:
        """Documents are read in rows of `row_length`; `temperature` is what the training objective divides by.

        Raises `ExamplesError` for a split without records.
        """
        self.config, self.split, self.temperature = config, split, temperature
        self.examples = HeldExamples(examples.path, examples.manifest, config.max_users, config.seed)
        if not len(self.examples.source(split)):
            raise ExamplesError(f"the split {split!r} has no records to judge", where=str(examples.path))
        self.ranks = has_candidates(tuple(field.name for field in self.examples.schema(split)))
        more: dict[str, Any] = {"slots": config.slots, "temperature": temperature, "mesh": mesh}
        if self.ranks:
            rows = examples.manifest["label_rows"]
            self._score = Scorer(model, label_rows=rows, layout=config.layout, **more)
        else:
            self._read = TextScorer(model, valid=examples.vocab.valid, row_length=row_length, **more)

    def records(self, split: str) -> RankingRecords:
        """The ranking records of a split; raises `ExamplesError` where their parts do not fit together."""
        return RankingRecords.of(self.examples.columns(split), where=str(self.examples.path))

    def scores(self, params: Params, split: str = "") -> Scores:
        """Label logits of every candidate of a split (that of the evaluation when not told)."""
        return self._score(params, self.records(split or self.split))

    def __call__(self, params: Params) -> System:
        """The model alone, without calibration: what training looks at."""
        started = time.perf_counter()
        if not self.ranks:
            return self._told(MODEL, self._likelihood(params), time.perf_counter() - started)
        records = self.records(self.split)
        scores = self._score(params, records)
        took = time.perf_counter() - started
        return judged(scores.logits, records.label, _users(records), settings=scores.cost.report(), seconds=took)

    def assess(self, params: Params, protocol: Mapping[str, Any]) -> Result:
        """The model, the model calibrated, and the plainest baseline; `protocol` adds to the protocol block."""
        if not self.ranks:
            started = time.perf_counter()
            found = self._likelihood(params)
            took = time.perf_counter() - started
            systems = {MODEL: self._told(MODEL, found, took), UNIGRAM: self._told(UNIGRAM, self._unigram(), 0.0)}
            documents = self.examples.columns(self.split)["user_index"].values
            return self._result(systems, np.unique(documents), found.tokens, protocol, self._text_protocol())
        records = self.records(self.split)
        logits, systems, fitted = self._systems(params, records)
        user = _users(records)
        users, which = np.unique(user, return_inverse=True)
        events = records.total_events[records.record]
        history = Task(
            about="By how many events the user had when asked; each metric over the answers of the group alone",
            groups=history_groups(logits, records.label, user, events, self.config.history),
            shown=METRICS[:3],
        )
        told = self._rank_protocol(records, fitted)
        label = np.bincount(which, records.label, minlength=len(users))
        return self._result(systems, users, label, protocol, told, hard={"history": history})

    def judge(self, logits: np.ndarray, *, settings: Mapping[str, float] | None = None, seconds: float = 0.0) -> System:
        """Label logits [n, c] for the candidates of the split, from whatever other system, judged in the same way."""
        records = self.records(self.split)
        return judged(logits, records.label, _users(records), settings=settings, seconds=seconds)

    def _systems(
        self, params: Params, records: RankingRecords
    ) -> tuple[dict[str, np.ndarray], dict[str, System], Calibration | None]:
        """Logits by system, the systems, and the calibration if there is anything to fit it on."""
        started = time.perf_counter()
        scores = self._score(params, records)
        took = {MODEL: time.perf_counter() - started}
        logits = {MODEL: scores.logits}
        settings: dict[str, dict[str, float]] = {MODEL: scores.cost.report()}
        fitted = None
        if self.split != _VALID and len(self.examples.source(_VALID)):
            held = self.records(_VALID)
            fitted = fit_calibration(self._score(params, held).logits, held.label)
            logits[CALIBRATED] = fitted(scores.logits)
            took[CALIBRATED] = time.perf_counter() - started
            settings[CALIBRATED] = {"temperature": fitted.temperature}
            settings[CALIBRATED] |= {f"bias_{c}": bias for c, bias in enumerate(fitted.bias) if c}
            share = np.bincount(held.label, minlength=scores.logits.shape[1]) + 1.0
            logits[PRIOR] = np.tile(np.log(share / share.sum()), (records.candidates, 1))
        user = _users(records)
        logits |= self._others(records)
        systems = {
            name: judged(z, records.label, user, settings=settings.get(name), seconds=took.get(name, 0.0))
            for name, z in logits.items()
        }
        return logits, systems, fitted

    def _others(self, records: RankingRecords) -> dict[str, np.ndarray]:
        """Label logits of the other models that answer this task, by name."""
        if not self.config.others:
            return {}
        ids = self.examples.user_ids()
        users = [ids[user] for user in _users(records).tolist()]
        task = self.examples.manifest["task"]
        found = {one.name: one.read(task, self.split, users, records.label) for one in self.config.others}
        return {name: logits for name, logits in found.items() if logits is not None}

    def _likelihood(self, params: Params) -> Likelihood:
        return self._read(params, self.examples.columns(self.split))

    def _unigram(self) -> Likelihood:
        """What a model finds that knows how often each token occurs in training, and nothing else."""
        columns = self.examples.columns(self.split)
        items, vocab = columns["items"], self.examples.vocab
        count = self.examples.item_count + vocab.valid
        cost = -np.log(np.maximum(count, 1) / count.sum())[items.values]
        counts = np.ones(len(items.values)) if "loss" not in columns else columns["loss"].values > 0
        counts = counts.astype(np.float64)
        assert items.offsets is not None
        counts[items.offsets[:-1][items.lengths > 0]] = 0
        of = np.repeat(np.arange(len(items)), items.lengths)
        return Likelihood(*(np.bincount(of, x, minlength=len(items)) for x in (cost * counts, counts)))

    def _told(self, name: str, found: Likelihood, seconds: float) -> System:
        documents = self.examples.columns(self.split)["user_index"].values
        users, which = np.unique(documents, return_inverse=True)
        nll, tokens = (np.bincount(which, x, minlength=len(users)) for x in found)
        by_user = {"nll": ratio_by_user(nll, tokens)}
        values = {"nll": float(by_user["nll"].mean())}
        return System(rank=np.zeros(len(users), np.int32), by_user=by_user, values=values, seconds=seconds)

    def _result(
        self,
        systems: Mapping[str, System],
        users: np.ndarray,
        label: np.ndarray,
        protocol: Mapping[str, Any],
        told: Mapping[str, Any],
        hard: Mapping[str, Task] | None = None,
    ) -> Result:
        config, manifest = self.config, self.examples.manifest
        stated = {
            **{name: manifest.get(name) for name in ("task", "simulated", "split_rule", "tie_rule")},
            "split": self.split,
            "seen": "whatever the records ask about",
            "target_time_used": False,
            "sampled_candidates": 0,
            "k": [],
            "users": len(users),
            "max_users": config.max_users,
            "catalogue_size": self.examples.vocab.num_items,
            "interval": f"95%, percentile bootstrap over users of metrics linearised in them, "
            f"{config.bootstrap_samples} samples, paired for differences",
            "vocabulary_hash": self.examples.vocab.hash,
            "prepared_hash": self.examples.hash,
            **told,
        }
        nobody = np.full(len(users), -1, np.int8)
        return Result(
            systems=systems,
            user_index=users,
            label=label.astype(np.int64),
            item_bucket=nobody,
            user_bucket=nobody,
            ks=(),
            bootstrap_samples=config.bootstrap_samples,
            seed=config.seed,
            protocol={**stated, **protocol, "seeds": {**protocol.get("seeds", {}), "evaluation": config.seed}},
            hard=hard or {},
        )

    def _rank_protocol(self, records: RankingRecords, fitted: Calibration | None) -> dict[str, Any]:
        manifest = self.examples.manifest
        return {
            "metrics": list(METRICS[:3]),
            "label_words": manifest.get("label_words"),
            "candidates": f"{records.candidates:,} in {len(records):,} prompts",
            "events_told": f"{records.history_events.mean():.1f} of {records.total_events.mean():.1f}, on average",
            "mean_events_told": float(records.history_events.mean()),
            "layout": self.config.layout,
            "auc": "over all pairs of answers; grouped_auc over those of a user, mean over users with both kinds",
            "log_loss": f"nats for each candidate, softmax over the label words of logits / {self.temperature:g}",
            "calibration": "none" if fitted is None else {**fitted.told(), "fitted_on": _VALID},
            # What is asked, not the prompts it stands in: so that prompts of other lengths can be compared.
            "examples_hash": _hash(
                records.user_index, np.diff(records.first), records.label, records.suffix, records.suffix_tokens
            ),
        }

    def _text_protocol(self) -> dict[str, Any]:
        columns = self.examples.columns(self.split)
        items = columns["items"]
        return {
            "metrics": ["nll"],
            "nll": f"nats for each predicted token, softmax over the vocabulary of scores / {self.temperature:g}",
            "examples_hash": _hash(
                items.values, items.lengths, *([columns["loss"].values] if "loss" in columns else [])
            ),
        }


def _users(records: RankingRecords) -> np.ndarray:
    """The user of each candidate."""
    return records.user_index[records.record]


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, "<i8").tobytes())
    return digest.hexdigest()[:16]
