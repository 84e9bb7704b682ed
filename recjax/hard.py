"""Hard tasks: what a mean over all users and untouched histories does not show. Usable with any sequence model.

Five come from the scaling study of Zhang et al. 2024 (arXiv 2311.11351): rare items, users with few events, domains,
damaged histories, several steps ahead. Three come from sliding-window training (Joshi et al. 2024, arXiv 2409.14517):
older positions, the unseen future, and items whose events lie long ago. One is the split of Penha et al. 2024 into
the few items that everybody has and all others, and one asks for items that nobody had before (Singh et al. 2024, arXiv
2306.08121). Some only slice the ranks that are there;
the others rank again through a view of the records (`recjax.data.views`), the model and the cheap baselines alike.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from recjax.baselines.harness import Scorer, rank_batches
from recjax.baselines.records import Records
from recjax.core.errors import ConfigError, ExamplesError
from recjax.core.module import Params
from recjax.data import views
from recjax.data.record import Column, spans
from recjax.data.sampled import View
from recjax.data.vocab import FIRST_ITEM
from recjax.evaluation import MODEL, Evaluator
from recjax.metrics.buckets import mass_groups
from recjax.metrics.relevance import recall_and_map
from recjax.ranking import fetch, make_recommend, run_late
from recjax.results import System
from recjax.slices import Group, Task

CHEAP = ("popularity", "item_graph", "recent_popularity")
COLD_EVENTS = 5
HEAD = 0.01
RATES = (0.1, 0.3, 0.5)
STEPS = 10
FUTURE_K = 100


def hard_tasks(
    evaluator: Evaluator, params: Params, systems: Mapping[str, System], fitted: Mapping[str, tuple[Scorer, float]]
) -> dict[str, Task]:
    """The tasks that `Evaluation.hard` names, for the model and for the baselines of `CHEAP` among `fitted`.

    `systems` are those ranked already, the model first. Raises `ConfigError` for a task that the data cannot give.
    """
    scorers = {name: scorer for name, (scorer, _) in fitted.items() if name in CHEAP}
    bench = _Bench(evaluator, params, systems, scorers)
    return {name: _TASKS[name](bench) for name in evaluator.config.hard}


@dataclasses.dataclass(frozen=True)
class _Bench:
    """What all tasks share."""

    evaluator: Evaluator
    params: Params
    systems: Mapping[str, System]
    scorers: Mapping[str, Scorer]

    @functools.cached_property
    def base(self) -> Group:
        """All users as they are, in order of their number."""
        return _group(self.evaluator, self.systems)

    @functools.cached_property
    def records(self) -> Records:
        """The records in order of the user number, as in `base`."""
        records = self.evaluator.records
        return records.take(np.argsort(records.user_index, kind="stable"))

    @property
    def rows(self) -> slice:
        """The rows of the catalogue."""
        return slice(FIRST_ITEM, FIRST_ITEM + self.evaluator.examples.vocab.num_items)

    @property
    def shown(self) -> tuple[str, ...]:
        return self.evaluator.config.shown()

    @property
    def recent(self) -> int:
        """How many events count as recent."""
        return self.evaluator.config.recent or self.evaluator.history_length

    def through(self, view: View, *, baselines: bool = True) -> tuple[Group, dict[str, System]]:
        """The model, and the cheap baselines, on records changed by a view; an empty group when none is left."""
        try:
            evaluator = self.evaluator.through(view)
        except ExamplesError:
            return Group(user_index=np.zeros(0, np.int64), values={}), {}
        systems = {MODEL: evaluator(self.params)}
        if baselines:
            systems |= {name: evaluator.rank_with(scorer) for name, scorer in self.scorers.items()}
        return _group(evaluator, systems), systems


def _group(evaluator: Evaluator, systems: Mapping[str, System]) -> Group:
    values = {name: system.per_user(evaluator.config.k) for name, system in systems.items()}
    whole = {n: {m: v for m, v in s.values.items() if m not in values[n]} for n, s in systems.items()}
    return Group(user_index=np.sort(evaluator.records.user_index), values=values, whole=whole)


def _long_tail(bench: _Bench) -> Task:
    evaluator = bench.evaluator
    part = mass_groups(evaluator.examples.item_count, evaluator.valid, 4)[bench.records.label]
    return Task(
        about="by popularity of the target: G1 (most popular) to G4 hold a quarter of the training events each; G4 "
        "also has the items without any",
        groups={f"G{p + 1}": bench.base.take(part == p) for p in range(4)},
        shown=bench.shown,
    )


def _head_torso(bench: _Bench) -> Task:
    evaluator = bench.evaluator
    count = np.where(evaluator.valid, evaluator.examples.item_count, -1)
    head = np.argsort(-count, kind="stable")[: max(1, round(HEAD * int(evaluator.valid.sum())))]
    is_head = np.isin(bench.records.label, head)
    return Task(
        about=f"by popularity of the target in training: head is the top {HEAD:.0%} of the items, torso all others",
        groups={"head": bench.base.take(is_head), "torso": bench.base.take(~is_head)},
        shown=tuple(f"recall@{k}" for k in evaluator.config.k if k >= 10),
    )


def _new_items(bench: _Bench) -> Task:
    evaluator = bench.evaluator
    is_known = evaluator.examples.item_count[bench.records.label] > 0
    rare = mass_groups(evaluator.examples.item_count, evaluator.valid, 3)[bench.records.label] == 2
    return Task(
        about="by whether the target occurs in training at all; of those that do, the rare ones (the tail: items after "
        "which the rest of the catalogue has less than a third of the training events) once more by themselves",
        groups={
            "in training": bench.base.take(is_known),
            "in training, rare": bench.base.take(is_known & rare),
            "not in training": bench.base.take(~is_known),
        },
        shown=tuple(dict.fromkeys((*bench.shown, f"recall@{max(evaluator.config.k)}", "mrr"))),
    )


def _cold_users(bench: _Bench) -> Task:
    cut, _ = bench.through(lambda records: views.latest(records, COLD_EVENTS))
    return Task(
        about=f"every history cut to its last {COLD_EVENTS} events; what the user really had stays out of the ranking",
        groups={"whole history": bench.base, f"last {COLD_EVENTS} events": cut},
        shown=(*bench.shown, bench.shown[0].replace("recall", "coverage")),
    )


def _domains(bench: _Bench) -> Task:
    domain, records = domains_of(bench.evaluator), bench.records
    items, offsets = records.seen_items()
    user = np.repeat(np.arange(len(records)), np.diff(offsets))
    same = (domain[items] == domain[records.label[user]]) & (domain[items] >= 0)
    is_known = np.bincount(user[same], minlength=len(records)) > 0
    return Task(
        about="by whether the user's history has an item of the target's domain",
        groups={"domain seen before": bench.base.take(is_known), "domain new to the user": bench.base.take(~is_known)},
        shown=bench.shown,
    )


def domains_of(evaluator: Evaluator) -> np.ndarray:
    """int64 [v]: a number for the domain of each row, -1 where there is none.

    Raises `ConfigError` when the catalogue has no column `domain`.
    """
    import polars as pl

    file = evaluator.examples.path / "items.parquet"
    table = pl.read_parquet(file)
    if "domain" not in table.columns:
        raise ConfigError(
            'the hard task "domains" needs to know the domain of each item',
            where=str(file),
            expected="a column domain in the items table of the data directory",
            mend='name it, for example DataDir.columns = {"domain": "category"}, and prepare again, '
            'or leave "domains" out of Evaluation.hard',
        )
    codes = table["domain"].cast(pl.String).rank("dense").fill_null(0).to_numpy().astype(np.int64) - 1
    out = np.full(len(evaluator.valid), -1)
    out[table["row"].to_numpy()] = codes
    return out


def _robustness(bench: _Bench) -> Task:
    seed, groups = bench.evaluator.config.seed, {"untouched": bench.base}
    for rate in RATES:
        groups[f"{rate:.0%} deleted"], _ = bench.through(lambda r, rate=rate: views.deleted(r, rate, seed))
    for rate in RATES:
        changed = functools.partial(views.replaced, rate=rate, rows=bench.rows, seed=seed)
        groups[f"{rate:.0%} replaced"], _ = bench.through(changed)
    return Task(
        about="each event of the history deleted, or its item replaced by a random one, with the probability given; "
        "what the user really had stays out of the ranking",
        groups=groups,
        shown=bench.shown,
    )


def _trajectory(bench: _Bench) -> Task:
    records = bench.evaluator.examples.columns(bench.evaluator.split)
    future = _future_of(bench, records)
    steps = min(STEPS, int(future.lengths.max(initial=1)))
    numbers, starts = records["user_index"].values, future.offsets
    assert starts is not None
    lengths = np.minimum(future.lengths, steps)
    own = np.zeros((len(numbers), steps), np.int32)
    own[np.repeat(np.arange(len(numbers)), lengths), spans(np.zeros_like(lengths), lengths)] = future.values[
        spans(starts[:-1], lengths)
    ]
    actual, groups = own.copy(), {}
    bounds = np.arange(len(numbers) + 1) * steps
    for step in range(steps):
        told, systems = bench.through(lambda r, step=step: views.after(r, step))
        groups[f"step {step + 1}, true events before"] = told
        if step:
            shown = Column(own.reshape(-1), bounds)
            made, systems = bench.through(
                lambda r, step=step, shown=shown: views.after(r, step, shown), baselines=False
            )
        else:
            made = Group(user_index=told.user_index, values={n: v for n, v in told.values.items() if n == MODEL})
        if not len(made.user_index):
            break
        best, at = systems[MODEL].best, np.searchsorted(np.sort(numbers), made.user_index)
        assert best is not None
        at = np.argsort(numbers, kind="stable")[at]
        own[at, step] = best
        found = (actual[at] == best[:, None]).any(axis=1).astype(np.float64)
        values = {MODEL: {**made.values[MODEL], "in_period": found}}
        groups[f"step {step + 1}, own choices before"] = dataclasses.replace(made, values=values)
    only = " This split holds out one event of each user, so there is only one step." if steps == 1 else ""
    return Task(
        about=f"the next {steps} held-out events one after the other, after the true events or after the model's own "
        "first choices at the true times; in_period: the first choice is among the events of the period." + only,
        groups=groups,
        shown=(*bench.shown, "in_period"),
    )


def _older(bench: _Bench) -> Task:
    seed = bench.evaluator.config.seed
    group, _ = bench.through(lambda records: views.older(records, bench.recent, seed))
    return Task(
        about="part of the training log, not held out: a random event of each user that is not among the last "
        f"{bench.recent} training events is the target, what came before it the history",
        groups={"next item": bench.base, "older position": group},
        shown=(*bench.shown, "mrr", "nll"),
    )


def _future(bench: _Bench) -> Task:
    evaluator, config = bench.evaluator, bench.evaluator.config
    records = evaluator.examples.columns(evaluator.split)
    future, k = _future_of(bench, records), min(FUTURE_K, evaluator.examples.vocab.num_items)
    numbers = records["user_index"].values
    lists = [np.unique(future[u]) for u in range(len(numbers))]
    lists = [items[items >= FIRST_ITEM] for items in lists]
    if config.seen == "removed":
        had = [
            example["items"] for example in evaluator.examples.source(evaluator.split).__getitems__(range(len(lists)))
        ]
        lists = [np.setdiff1d(items, seen) for items, seen in zip(lists, had, strict=True)]
    order = np.argsort(numbers, kind="stable")
    relevant = [lists[u] for u in order]
    chosen = np.flatnonzero([len(items) > 0 for items in relevant])
    found = {name: _best_rows(bench, k, mean) for name, mean in ((MODEL, False), ("mean of item vectors", True))}
    askers = dataclasses.replace(bench.records, label=np.zeros_like(bench.records.label))  # no target to spare
    for name, scorer in bench.scorers.items():
        parts = rank_batches(scorer, askers, evaluator.valid, k, remove_seen=config.seen == "removed")
        found[name] = np.concatenate([part.rows for part in parts])
    values = {}
    for name, rows in found.items():
        recall, precision = recall_and_map(rows[chosen], [relevant[u] for u in chosen])
        values[name] = {f"map@{k}": precision, f"recall@{k}": recall}
    return Task(
        about="all events of the held-out period that are new to the user are relevant; the user vector is the model's "
        f"state, or the mean of the vectors of the last {evaluator.history_length} items, against all item vectors",
        groups={"held-out period": Group(user_index=np.sort(numbers)[chosen], values=values)},
        shown=(f"map@{k}", f"recall@{k}"),
    )


def _best_rows(bench: _Bench, k: int, mean_of_items: bool) -> np.ndarray:
    """int32 [n, k], in order of the user number."""
    evaluator, config = bench.evaluator, bench.evaluator.config
    assert evaluator.model is not None
    recommend = make_recommend(evaluator.model, k=k, block=config.block, mean_of_items=mean_of_items)
    users, rows = [], []
    with evaluator.on_devices():
        batches = map(evaluator.place, evaluator.batches(packed=False))
        for batch, best in run_late(lambda b: recommend(bench.params, b, evaluator.valid), batches):
            real = fetch(batch["row_weight"]) > 0
            users.append(fetch(batch["user_index"])[real])
            rows.append(fetch(best)[real])
    return np.concatenate(rows)[np.argsort(np.concatenate(users), kind="stable")]


def _item_quality(bench: _Bench) -> Task:
    train = Records.of(bench.evaluator.examples, "train")
    count = np.bincount(train.items, minlength=len(bench.evaluator.valid))
    recent = np.bincount(train.latest(bench.recent).items, minlength=len(count))
    label = bench.records.label
    is_old, is_known = (recent < count / 2)[label], count[label] > 0
    return Task(
        about=f"by the target's training events: most of them older than the last {bench.recent} events of their "
        "users, or not",
        groups={"mostly old": bench.base.take(is_old & is_known), "mostly recent": bench.base.take(~is_old & is_known)},
        shown=bench.shown,
    )


def _future_of(bench: _Bench, records: Mapping[str, Column]) -> Column:
    if "future" not in records:
        raise ConfigError(
            "the examples do not hold out a period",
            where=str(bench.evaluator.examples.path),
            expected="held-out examples with a future",
            mend='prepare them again; NextItem.split = "leave_last" or "global_time" holds out several events',
        )
    return records["future"]


_TASKS: dict[str, Callable[[_Bench], Task]] = {
    "long_tail": _long_tail,
    "head_torso": _head_torso,
    "new_items": _new_items,
    "cold_users": _cold_users,
    "domains": _domains,
    "robustness": _robustness,
    "trajectory": _trajectory,
    "older": _older,
    "future": _future,
    "item_quality": _item_quality,
}
