"""The evaluation protocol: what can be chosen about it, and the statement of it that goes with every number.

Two numbers compare only when they were taken the same way, and most disagreements in this field are about the way:
ties, seen items, candidates, which users count. So the statement is written from the code and the manifest, never by
hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recjax.baselines.fit import BASELINES
from recjax.baselines.harness import TUNING_USERS
from recjax.baselines.records import Records
from recjax.core.errors import ConfigError
from recjax.data.examples import Examples
from recjax.index.scoring import BLOCK
from recjax.results import System

SEEN = ("removed", "kept")
DEFAULT_BASELINES = ("popularity", "item_graph", "item_knn")
HARD = (
    "long_tail",
    "head_torso",
    "new_items",
    "cold_users",
    "domains",
    "robustness",
    "trajectory",
    "older",
    "future",
    "item_quality",
)
_COUNTS = (("candidates", 0), ("recent", 0))
_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How to evaluate.

    Metrics are taken at every cut-off of `k`. `seen` says whether the items of a user's history are "removed" from
    the candidates (the target never is) or "kept". `max_users` evaluates a fixed sample of users drawn by `seed`
    (None: all). Users with at most `cold_events` training events are cold. `baselines` come from `BASELINES`.
    Intervals are from `bootstrap_samples` resamples. `samples` users are shown with their recommendations.
    `candidates` above 0 also ranks the target among so many unseen items drawn for each user, beside the full
    ranking. `hard` are further tasks of `HARD` (see `recjax.hard`), taken when a run is evaluated, not while it is
    trained; `recent` is what they call the latest events (0: the history length of the model).
    """

    k: Sequence[int] = (5, 10, 50)
    seen: str = "removed"
    batch_size: int = 256
    block: int = BLOCK
    max_users: int | None = None
    cold_events: int = 5
    baselines: Sequence[str] = DEFAULT_BASELINES
    candidates: int = 0
    hard: Sequence[str] = ()
    recent: int = 0
    bootstrap_samples: int = 1000
    samples: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        ks = tuple(sorted(set(self.k)))
        object.__setattr__(self, "k", ks)
        object.__setattr__(self, "baselines", tuple(self.baselines))
        object.__setattr__(self, "hard", tuple(self.hard))
        if not ks or any(not isinstance(k, int) or k < 1 for k in ks):
            raise ConfigError(f"Evaluation.k = {self.k!r}", expected="cut-offs of at least 1, such as (5, 10, 50)")
        if self.seen not in SEEN:
            raise ConfigError(f"Evaluation.seen = {self.seen!r}", expected=" or ".join(map(repr, SEEN)))
        for name, least in (("batch_size", 1), ("block", 1), ("bootstrap_samples", 1), ("samples", 0), *_COUNTS):
            if getattr(self, name) < least:
                raise ConfigError(f"Evaluation.{name} = {getattr(self, name)}", expected=f"at least {least}")
        if self.max_users is not None and self.max_users < 1:
            raise ConfigError(f"Evaluation.max_users = {self.max_users}", expected="at least 1, or None for all users")
        for given, known in (("baselines", tuple(BASELINES)), ("hard", HARD)):
            unknown = sorted(set(getattr(self, given)) - set(known))
            if unknown:
                raise ConfigError(f"there is no {unknown[0]!r}", where=f"Evaluation.{given}", expected=", ".join(known))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics that an evaluation gives."""
        ranked = [f"{name}@{k}" for name in ("recall", "ndcg", "mrr") for k in self.k] + ["mrr"]
        sampled = [f"sampled_{name}" for name in ranked] if self.candidates else []
        return (*ranked, "nll", *sampled, *(f"{name}@{k}" for name in ("popularity", "coverage") for k in self.k))

    @property
    def main(self) -> str:
        """What evaluations are compared by where nothing else is said: NDCG at the middle cut-off."""
        return f"ndcg@{self.k[len(self.k) // 2]}"

    def shown(self) -> tuple[str, str]:
        """The two metrics that a line of progress shows: recall and NDCG at 10, or at the largest cut-off."""
        k = 10 if 10 in self.k else max(self.k)
        return f"recall@{k}", f"ndcg@{k}"


def protocol_of(
    config: Evaluation,
    examples: Examples,
    split: str,
    users: int,
    *,
    times: str = "none",
    temperature: float = 1.0,
    resampled: str = "users",
) -> dict[str, Any]:
    """The protocol block of metrics.json: everything that must be equal for two numbers to be comparable.

    `times` is what the model is told of times (`Feed.times`), `temperature` what its scores are divided by in `nll`,
    `resampled` what is drawn for intervals.
    """
    manifest = examples.manifest
    counts = manifest.get("counts", {})
    return {
        "task": manifest.get("task"),
        "simulated": manifest.get("simulated"),
        "split": split,
        "split_rule": manifest.get("split_rule"),
        "tie_rule": manifest.get("tie_rule"),
        "seen": config.seen,
        "target": "ranked even where the user had it before",
        "candidates": "the whole catalogue, nothing sampled",
        "sampled_candidates": config.candidates,
        "sampled_rule": _sampled_rule(config),
        "nll": "nats: cross-entropy of the target under a softmax over the whole catalogue, nothing removed, "
        f"logits = score / {temperature:g}",
        "catalogue_size": examples.vocab.num_items,
        "catalogue_rule": manifest.get("catalogue_rule"),
        "rank_rule": "score descending, then row ascending; rows are in order of training popularity",
        "history": "all events before the target; a model sees the last history_length of them, a baseline all",
        "times_used": times,
        "target_time_used": times == "target",
        "recent_popularity": "events of the 7 days before the question, which is asked at "
        + ("the time of the target" if times == "target" else "the user's last event, or at the start of the period"),
        "baselines": f"fitted on train; settings by ndcg@10 on at most {TUNING_USERS} users of valid",
        "users": users,
        "split_counts": counts.get(split),
        "max_users": config.max_users,
        "k": list(config.k),
        "interval": f"95%, percentile bootstrap over {resampled}, {config.bootstrap_samples} samples, paired for "
        "differences",
        "buckets": {
            "item": "of the target: head, torso, tail hold a third of the training events each; unseen has none",
            "user": f"cold: at most {config.cold_events} training events",
        },
        "seeds": {"evaluation": config.seed},
        "vocabulary_hash": examples.vocab.hash,
        "examples_hash": examples.hash,
    }


def _sampled_rule(config: Evaluation) -> str:
    if not config.candidates:
        return "no sampled metrics"
    return (
        f"sampled_...: rank among {config.candidates} items drawn uniformly without replacement from those the user "
        "never had, by seed and user; ties by row as in the full ranking. They flatter: compare the full ranking."
    )


def shown_users(
    users: Sequence[int], examples: Examples, records: Records, systems: Mapping[str, System]
) -> list[dict[str, Any]]:
    """The chosen users in words: the end of their history, their target, and what each system recommends."""
    titles, vocab = examples.titles(), examples.vocab

    def word(row: int) -> str:
        title = titles[row]
        return str(title) if title else str(vocab.decode([row])[0])

    out = []
    for user in users:
        at = int(np.searchsorted(records.user_index, user))
        history = records.items[records.offsets[at] : records.offsets[at + 1]]
        out.append(
            {
                "user_index": user,
                "history": [word(row) for row in history[-_SHOWN:].tolist()],
                "target": word(int(records.label[at])),
                "rank": {name: int(system.rank[at]) for name, system in systems.items()},
                "recommended": {
                    name: [word(row) for row in system.recommended[user][:_SHOWN] if row]
                    for name, system in systems.items()
                    if user in system.recommended
                },
            }
        )
    return out
