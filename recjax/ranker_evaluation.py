"""Evaluation of a ranker on held-out rows: does it tell positives from negatives, and are its probabilities right.

Every row of a split is scored once. Metrics come with intervals over users (rows without users each count alone), head
by head, by domain, by how much is known of the user and of the item, and by tenths of the prediction. Beside the model
stand the rates of training: of all rows, of the item, of the user. Where a share of the training negatives was left
out, predictions are corrected for it before anything is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from recjax.core.errors import ConfigError, ExamplesError, TrainingError
from recjax.core.folder import hash_of
from recjax.core.module import Functional, Params
from recjax.core.sharding import Mesh
from recjax.data.examples import Examples
from recjax.data.rows_feed import RowReader, held_rows
from recjax.data.sampled import HeldExamples
from recjax.metrics.binary import corrected
from recjax.metrics.calibration import deciles
from recjax.ranker_metrics import METRICS, OF_REQUESTS, OF_ROW, Judged, calibration_task, grouped, judged
from recjax.ranking import fetch, run_late
from recjax.results import Result, System
from recjax.slices import Task

MODEL, BASELINES = "model", ("rate", "item_rate", "user_rate")
Logits = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankerEvaluation:
    """How to evaluate.

    `head` is the head whose metrics have plain names (none named: the first); runs are compared by its `main`. Rows are
    told apart by how many training rows their user and their item have: up to each number of `known`, and more; where
    the task names a text, by its characters: up to each of `lengths`, and more. The
    baselines are rates of training, those of an item or user with `prior` rows of the overall rate added. `max_rows`
    evaluates a fixed sample, drawn by `seed` (None: all). `value_form` says what the outputs of heads of numbers stand
    for (`losses.binary_heads.ValueHead`). Intervals are from `bootstrap_samples` resamples of users.
    """

    batch_size: int = 4096
    head: str = ""
    known: Sequence[int] = (0, 10, 100)
    lengths: Sequence[int] = (3, 7)
    baselines: Sequence[str] = BASELINES
    prior: float = 10.0
    max_rows: int | None = None
    bootstrap_samples: int = 1000
    main: str = "auc"
    value_form: Literal["log1p", "poisson"] = "log1p"
    seed: int = 0

    k: ClassVar[tuple[int, ...]] = ()
    metrics: ClassVar[tuple[str, ...]] = METRICS

    def __post_init__(self) -> None:
        for name in ("known", "lengths", "baselines"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("batch_size", "bootstrap_samples", "max_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"RankerEvaluation.{name} = {getattr(self, name)}", expected="at least 1")
        if not self.known or list(self.known) != sorted(set(self.known)) or self.known[0] < 0:
            raise ConfigError(f"RankerEvaluation.known = {self.known}", expected="rising numbers of rows")
        if not self.lengths or [0, *self.lengths] != sorted({0, *self.lengths}):
            raise ConfigError(f"RankerEvaluation.lengths = {self.lengths}", expected="rising numbers above 0")
        if wrong := set(self.baselines) - set(BASELINES):
            raise ConfigError(f"no baseline {', '.join(sorted(wrong))}", expected=", ".join(BASELINES))
        if self.main not in METRICS:
            raise ConfigError(f"RankerEvaluation.main = {self.main!r}", expected=" or ".join(map(repr, METRICS)))
        if self.prior <= 0:
            raise ConfigError(f"RankerEvaluation.prior = {self.prior}", expected="above 0")

    def shown(self) -> tuple[str, ...]:
        """The metrics that a line of progress shows."""
        return ("auc", "log_loss", "calibration")


class RankerEvaluator:
    """Scores one split of one task, with any parameters of one model."""

    def __init__(
        self, examples: Examples, *, split: str, config: RankerEvaluation, model: Functional, mesh: Mesh | None = None
    ) -> None:
        """Raises `ExamplesError` for other examples or a split without rows, `ConfigError` for an unknown head."""
        self.examples = HeldExamples(examples.path, examples.manifest, config.max_rows, config.seed)
        self.config, self.split, self.mesh = config, split, mesh
        self.reader = self._reader(split)
        if not len(self.reader):
            raise ExamplesError(f"the split {split!r} has no rows", where=str(examples.path))
        heads = self.reader.heads
        if config.head and config.head not in heads:
            raise ConfigError(f"no head {config.head!r}", where="RankerEvaluation.head", expected=", ".join(heads))
        self._keep = float(examples.manifest.get("keep_negatives", 1.0))
        first = config.head or heads[0]
        self.heads = (first, *(head for head in heads if head != first))
        self.user_index, user = np.unique(self.reader.column("user_index"), return_inverse=True)
        label = self.reader.column("labels")[:, [heads.index(head) for head in self.heads]]
        has_domains = bool(examples.manifest["domains"])
        domain = self.reader.column("domain") if has_domains else None
        request = self.reader.column("request") if examples.manifest["has_requests"] else None
        about = examples.manifest["heads"]
        self._values = {head: config.value_form for head in self.heads if about[head].get("kind") == "value"}
        self.rows = Judged(self.heads, label, user, len(self.user_index), domain, request, self._values)
        self._step = jax.jit(lambda params, batch: self._logits(model, params, batch))

    def __call__(self, params: Params) -> System:
        """The model; `TrainingError` when an output is not a number."""
        started = time.perf_counter()
        logits = self.scores(params)
        return judged(self.rows, logits, seconds=time.perf_counter() - started)

    def scores(self, params: Params, split: str = "", *, correct: bool = True) -> dict[str, np.ndarray]:
        """float64 [n] for each head: the logits of all rows of a split (that of the evaluation when not told),
        corrected for negatives that were left out of training unless told not to; and what else the model says of
        rows, under names that begin with `OF_ROW`."""
        reader = self.reader if split in ("", self.split) else self._reader(split)
        found: dict[str, np.ndarray] = {}
        place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        batches = held_rows(reader, batch_size=self._batch_size(), **place)
        with self.mesh.activate() if self.mesh else contextlib.nullcontext():
            for start, (_, logits) in enumerate(run_late(lambda b: self._score(params, b[1]), batches)):
                at = start * self._batch_size()
                for head in logits:
                    part = fetch(logits[head])[: len(reader) - at]
                    found.setdefault(head, np.full(len(reader), np.nan))[at : at + len(part)] = part
        for head, values in found.items():
            if not np.isfinite(values).all():
                raise TrainingError(
                    f"the model's output {head} is not a number for {int((~np.isfinite(values)).sum())} rows",
                    mend="evaluate an earlier checkpoint, or lower the learning rate and train again",
                )
        shifts = set(self.heads) - set(self._values) if correct else set()
        return {name: corrected(z, self._keep) if name in shifts else z for name, z in found.items()}

    def assess(self, params: Params, protocol: Mapping[str, Any]) -> Result:
        """The model beside the baselines; `protocol` adds to the protocol block."""
        started = time.perf_counter()
        logits: dict[str, Logits] = {MODEL: self.scores(params)}
        took = {MODEL: time.perf_counter() - started}
        train = self._reader("train")
        for name in self.config.baselines:
            started = time.perf_counter()
            logits[name] = self._rates(train, name)
            took[name] = time.perf_counter() - started
        config, manifest = self.config, self.examples.manifest
        stated = {
            **{
                name: manifest.get(name) for name in ("task", "simulated", "split_rule", "tie_rule", "heads", "domains")
            },
            **{
                name: manifest.get(name)
                for name in ("negatives", "held_negatives", "keep_negatives", "events", "grouped_by")
            },
            "split": self.split,
            "seen": "every row of the split",
            "target_time_used": False,
            "sampled_candidates": 0,
            "k": [],
            "metrics": [
                *METRICS[:6],
                *(METRICS[7:9] if manifest["domains"] else ()),
                *(OF_REQUESTS if self.rows.request is not None else ()),
            ],
            "rows": len(self.reader),
            "users": len(self.user_index),
            "users_of_one_kind": self._of_one_kind(),
            "max_rows": config.max_rows,
            "catalogue_size": self.examples.vocab.num_items,
            "calibration": "predicted over observed positives; calibration_error over tenths of the rows; shift of a "
            "group: what its logits would have to be moved by for predictions to add up to what happened",
            "interval": f"95%, percentile bootstrap over users of metrics linearised in them, "
            f"{config.bootstrap_samples} samples, paired for differences",
            "vocabulary_hash": self.examples.vocab.hash,
            "prepared_hash": self.examples.hash,
            "examples_hash": self._asked(),
        }
        nobody = np.full(len(self.user_index), -1, np.int8)
        return Result(
            systems={name: judged(self.rows, z, seconds=took[name]) for name, z in logits.items()},
            user_index=self.user_index,
            label=np.bincount(self.rows.user, self.rows.label[:, 0] >= 0.5, len(self.user_index)).astype(np.int64),
            item_bucket=nobody,
            user_bucket=nobody,
            ks=(),
            bootstrap_samples=config.bootstrap_samples,
            seed=config.seed,
            protocol={**stated, **protocol, "seeds": {**protocol.get("seeds", {}), "evaluation": config.seed}},
            hard=self._groups(logits, train),
        )

    def _groups(self, logits: Mapping[str, Logits], train: RowReader) -> dict[str, Task]:
        """By domain, by what is known of the user and the item, by the length of a text, by time, and by tenths of the
        prediction."""
        found: dict[str, Task] = {}
        if self.rows.domain is not None:
            names = [*self.examples.manifest["domains"], "other domains"]
            about = "By the domain of a row; each metric over the rows of the domain alone"
            found["domains"] = grouped(self.rows, logits, self.rows.domain, names, about)
        bounds = self.config.known
        lows = [0, *(bound + 1 for bound in bounds)]
        names = [f"{low} to {high} rows" for low, high in zip(lows, bounds, strict=False)] + [
            f"above {bounds[-1]} rows"
        ]
        for what, column in (("user", "user_index"), ("item", "items")):
            trained, asked = (_numbers(reader, column) for reader in (train, self.reader))
            counts = np.bincount(trained, minlength=int(asked.max(initial=0)) + 1)[asked]
            about = f"By how many training rows the {what} of a row has; each metric over these rows alone"
            found[f"known_{what}s"] = grouped(self.rows, logits, np.searchsorted(bounds, counts), names, about)
        if "length" in {field.name for field in self.examples.schema(self.split)}:
            length, bounds = self.reader.column("length"), self.config.lengths
            lows = [1, *(bound + 1 for bound in bounds)]
            names = [f"{low} to {high} characters" for low, high in zip(lows, bounds, strict=False)]
            about = "By the characters of the text that a row is asked by; each metric over these rows alone"
            number = np.where(length > 0, np.searchsorted(bounds, length), -1)
            found["lengths"] = grouped(self.rows, logits, number, [*names, f"above {bounds[-1]} characters"], about)
        if self.examples.manifest["times"]:
            time = self.reader.column("time").astype(np.float64)
            quarter = deciles(time, bins=4)
            names = [f"quarter {k + 1}" for k in range(4)]
            about = "By when a row happened, quarters of the rows in order of time; each metric over these rows alone"
            found["periods"] = grouped(self.rows, logits, quarter, names, about)
        found["tenths"] = calibration_task(self.rows, {MODEL: logits[MODEL]})
        return found

    def _rates(self, train: RowReader, name: str) -> dict[str, np.ndarray]:
        """The logit of a rate of training for every row: that of all rows, of its item or of its user."""
        labels, found = train.column("labels"), {}
        for head in self.heads:
            label = labels[:, train.heads.index(head)].astype(np.float64)
            known, label = label >= 0, np.maximum(label, 0)
            if head in self._values:
                mean = self._usual(train, name, np.log1p(label), known, offset=0.0)
                found[head] = mean if self.config.value_form == "log1p" else np.log(np.maximum(np.expm1(mean), 1e-6))
                continue
            share = self._usual(train, name, label, known, offset=0.5)
            found[head] = corrected(np.log(share) - np.log1p(-share), self._keep)
        return found

    def _usual(self, train: RowReader, name: str, label: np.ndarray, known: np.ndarray, *, offset: float) -> np.ndarray:
        """The mean label of training for every row: that of all rows, of its item or of its user."""
        rate = (label[known].sum() + offset) / (known.sum() + 2 * offset)
        if name == "rate":
            return np.full(len(self.reader), rate)
        column = {"item_rate": "items", "user_rate": "user_index"}[name]
        trained, asked = (_numbers(reader, column) for reader in (train, self.reader))
        size = int(max(trained.max(initial=0), asked.max(initial=0))) + 1
        shown, summed = (np.bincount(trained, x * known, minlength=size)[asked] for x in (known, label))
        return (summed + self.config.prior * rate) / (shown + self.config.prior)

    def _of_one_kind(self) -> int:
        """How many users have no positive, or nothing else, by the first head: they have no AUC of their own."""
        label, user = self.rows.label[:, 0], self.rows.user
        positives, negatives = (
            np.bincount(user[mine], minlength=self.rows.users) for mine in (label >= 0.5, (label >= 0) & (label < 0.5))
        )
        return int(((positives == 0) | (negatives == 0)).sum())

    def _asked(self) -> str:
        """A hash of the rows and their labels: models that are told other fields of them compare."""
        sample = (self.config.max_rows, self.config.seed) if self.config.max_rows else None
        return hash_of([self.examples.manifest["rows_hash"][self.split], sample])

    def _reader(self, split: str) -> RowReader:
        return RowReader(self.examples, split)

    def _batch_size(self) -> int:
        """Rows of a batch, which devices and processes can divide."""
        parts = int(np.lcm(self.mesh.size_of("batch") if self.mesh else 1, jax.process_count()))
        wanted = min(self.config.batch_size, max(len(self.reader), 1))
        return -(-wanted // parts) * parts

    def _score(self, params: Params, batch: Mapping[str, np.ndarray]) -> Mapping[str, jax.Array]:
        inputs = {name: x for name, x in batch.items() if name.startswith("field/") or name == "domain"}
        return self._step(params, self.mesh.put_batch(inputs) if self.mesh else inputs)

    def _logits(self, model: Functional, params: Params, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        out = model.apply(params, batch, train=False, key=None)
        missing = [head for head in self.heads if f"logit/{head}" not in out]
        more = {name: x for name, x in out.items() if name.startswith(OF_ROW)}
        if missing:
            raise ConfigError(
                f"the model has no head {', '.join(missing)}",
                where="the heads of the model",
                expected=f"those of the task: {', '.join(self.heads)}",
            )
        return {head: out[f"logit/{head}"] for head in self.heads} | more


def _numbers(reader: RowReader, column: str) -> np.ndarray:
    """int64 [n]: the user or the item of every row."""
    return reader.column(column).reshape(-1).astype(np.int64)
