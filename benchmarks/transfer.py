"""PrepRec from one log on another: the table of zero-shot, in-domain, popularity, SASRec and their mixture.

    python benchmarks/transfer.py TARGET=DIR... --runs RUNS [--users 2000] [--rows zero_shot,popularity,sasrec,mixture]

RUNS/in_NAME is a run of preprec/3_in_domain on the log NAME and RUNS/sas_NAME one of preprec/2_sasrec; every in_NAME is
also tried on all other targets. Bindings (--bind preprec.PrepRec.gap=...) are for all PrepRec rows, whose runs are then
better kept as RUNS/KIND_NAME (--kind). Popularity rows rank by the very tables that the model reads, at its periods.
Runs RUNS/VARIANT_NAME (other settings, kept in their config.gin) are tried as well with --variants VARIANT,... Prints a
table and writes RUNS/transfer-NAME.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from recjax import command
from recjax.blend import Blend, best_share
from recjax.core.flags import Flags, recipe_files
from recjax.core.module import Functional, Module, with_facts
from recjax.data.popularity import Dynamics
from recjax.evaluation import Evaluator
from recjax.metrics.bootstrap import paired_difference
from recjax.models.preprec import Tables, _columns
from recjax.recipe import Recipe
from recjax.results import System
from recjax.trained import Trained, load

SHOWN = ("recall@10", "ndcg@10", "sampled_recall@10", "sampled_ndcg@10")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5)


class InPeriod(Module):
    """Items by their popularity in the last whole period before the query: `of` is "coarse" or "fine"."""

    def __init__(self, of: str) -> None:
        self.of = of

    def __call__(self, batch: Mapping[str, Any], *, train: bool, key: Any) -> dict[str, jax.Array]:
        tables = Tables.of(dict(batch))
        asked = jnp.take_along_axis(batch["query_time"], jnp.maximum(batch["query_at"], 0), axis=1).reshape(-1)
        coarse, fine = tables.periods(asked)
        period, table = (coarse, tables.coarse) if self.of == "coarse" else (fine, tables.fine)
        score = _columns(table, period - 1).T
        return {"query": jnp.ones((*batch["query_at"].shape, 1)), "table": score[..., None]}


class Mixture(Blend):
    """A mixture of models of two configurations, of which gin knows one at a time: neither can be made anew."""

    def init(self, key: jax.Array) -> dict[str, Any]:
        return {}


def recipe_of(stage: str, data: str, users: int | None, *bindings: str) -> Recipe:
    """A stage of the recipe on some data, evaluated on a sample of its users."""
    [file] = recipe_files(f"preprec/{stage}")
    given = (f"DATA_DIR={data!r}", f"evaluation.Evaluation.max_users={users}", *bindings)
    return command.load(Flags(gin_files=(str(file),), bindings=given))[0]


def evaluator_of(run: Trained, split: str, model: Any, recipe: Recipe) -> Evaluator:
    """The protocol of `recipe` for a model that stands beside the trained one."""
    return Evaluator(
        run.assembly.examples[0],
        split=split,
        config=recipe.evaluation,
        model=model,
        history_length=recipe.feed.history_length,
        times=recipe.feed.times,
    )


class Bench:
    """Rows of one target."""

    def __init__(
        self, name: str, data: str, runs: Path, users: int | None, kind: str = "in", bindings: Sequence[str] = ()
    ) -> None:
        self.name, self.data, self.runs, self.users, self.kind = name, data, runs, users, kind
        self.recipe = recipe_of("3_in_domain", data, users, *bindings)
        self.home = load(self.recipe, runs / f"{kind}_{name}")
        self.systems: dict[str, System] = {}
        self.notes: dict[str, Any] = {}

    def add(self, name: str, system: System) -> None:
        self.systems[name] = system
        values = " ".join(f"{m} {system.values[m]:.4f}" for m in SHOWN)
        print(f"{self.name:16} {name:32} {values} ({system.seconds:.0f} s)", flush=True)

    def zero_shot(self, names: list[str]) -> None:
        self.add("PrepRec in domain", self.home.assembly.evaluator("test")(self.home.params))
        for source in names:
            if source != self.name:
                run = load(self.recipe, self.runs / f"{self.kind}_{source}")
                self.add(f"PrepRec from {source}", self.home.assembly.evaluator("test")(run.params))
        others = dataclasses.replace(self.recipe, facts=[Dynamics(events="all")])
        run = load(others, self.runs / f"{self.kind}_{self.name}")
        self.add("PrepRec in domain, all events", run.assembly.evaluator("test")(run.params))

    def variant(self, name: str, sources: list[str]) -> None:
        """Rows of models with other settings, of this log and of others."""
        for source in dict.fromkeys([self.name, *sources]):
            folder = self.runs / f"{name}_{source}"
            if not (folder / "checkpoints").is_dir():
                continue
            flags = Flags(gin_files=(str(folder / command.CONFIG),), bindings=(f"DATA_DIR={self.data!r}",))
            recipe = dataclasses.replace(command.load(flags)[0], evaluation=self.recipe.evaluation)
            run = load(recipe, folder)
            where = "in domain" if source == self.name else f"from {source}"
            self.add(f"PrepRec {where}, {name}", run.assembly.evaluator("test")(run.params))

    def popularity(self) -> None:
        for name, of, dynamics in (
            ("popularity until the query", "coarse", Dynamics(coarse_days=2, decay=1.0)),
            ("popularity, decayed 10 days", "coarse", Dynamics()),
            ("popularity, last 8 days", "fine", Dynamics()),
            ("popularity, last 30 days", "fine", Dynamics(window=15)),
            ("popularity, last 30 days, all events", "fine", Dynamics(window=15, events="all")),
        ):
            facts = {k: jnp.asarray(v) for k, v in dynamics(self.home.assembly.examples).items()}
            model = Functional(lambda rngs, of=of: InPeriod(of))
            self.add(name, evaluator_of(self.home, "test", model, self.recipe)(with_facts({}, facts)))

    def ids(self, *, mixed: bool) -> None:
        folder = self.runs / f"sas_{self.name}"
        if not (folder / "checkpoints").is_dir():
            return
        recipe = recipe_of("2_sasrec", self.data, self.users)
        sasrec = load(recipe, folder)
        self.add("SASRec in domain (no target time)", sasrec.assembly.evaluator("test")(sasrec.params))
        if not mixed:
            return
        blend: Any = Mixture(self.home.assembly.model, sasrec.assembly.model, self.home.assembly.vocab.valid)

        few = dataclasses.replace(self.recipe.evaluation, max_users=1000)
        valid = evaluator_of(self.home, "valid", blend, dataclasses.replace(self.recipe, evaluation=few))
        test = evaluator_of(self.home, "test", blend, self.recipe)

        def value_of(share: float) -> float:
            return valid(blend.params(self.home.params, sasrec.params, share)).values["ndcg@10"]

        share, self.notes["mixture"] = best_share(value_of, SHARES)
        self.notes["share"] = share
        self.add(f"mixture, {share} PrepRec", test(blend.params(self.home.params, sasrec.params, share)))

    def report(self) -> dict[str, Any]:
        """Values of all rows, and differences to popularity with their intervals."""
        ks = self.recipe.evaluation.k
        per_user = {name: s.per_user(ks) for name, s in self.systems.items()}
        differences = {}
        for name in per_user:
            for base in ("popularity, last 30 days", "SASRec in domain (no target time)"):
                if base in per_user and name != base:
                    for metric in SHOWN:
                        found = paired_difference(per_user[name][metric], per_user[base][metric], samples=1000)
                        differences[f"{name} - {base}: {metric}"] = [found.mean, found.low, found.high]
        values = {name: {m: float(s.values[m]) for m in SHOWN} for name, s in self.systems.items()}
        users = len(next(iter(self.systems.values())).rank)
        return {"users": users, "rows": values, "differences": differences, **self.notes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--users", type=int, default=None, help="a sample of so many users of each target")
    parser.add_argument("--sources", default="", help="names of logs whose models are tried; default: all targets")
    parser.add_argument("--rows", default="zero_shot,popularity,sasrec,mixture")
    parser.add_argument("--variants", default="")
    parser.add_argument("--kind", default="in")
    parser.add_argument("--bind", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    targets = dict(one.split("=", 1) for one in args.targets)
    rows = args.rows.split(",")
    for name, data in targets.items():
        started = time.perf_counter()
        bench = Bench(name, data, args.runs, args.users, args.kind, args.bind)
        if "popularity" in rows:
            bench.popularity()
        sources = args.sources.split(",") if args.sources else list(targets)
        if "zero_shot" in rows:
            bench.zero_shot(sources)
        for variant in filter(None, args.variants.split(",")):
            bench.variant(variant, sources)
        if "sasrec" in rows or "mixture" in rows:
            bench.ids(mixed="mixture" in rows)
        found = bench.report()
        (args.runs / f"transfer-{name}.json").write_text(json.dumps(found, indent=1))
        print(f"{name}: {found['users']} users, {time.perf_counter() - started:.0f} s", flush=True)
        for difference, (mean, low, high) in found["differences"].items():
            print(f"  {difference}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]")


if __name__ == "__main__":
    command.start_jax()
    main()
