"""When joint training helps: the worlds of `recjax/data/worlds.py`, one model for both tasks against one for each.

    python benchmarks/when_search_helps.py shared_queries --out DIR [--items 400] [--seeds 0 1] [--world_seed 0]

For every value of the world's knob a model of the evaluated task alone and a joint one are trained from scratch, each
example as often in both (the joint one takes the steps of both tasks together), and the last parameters are evaluated
on test: recall@10 and the loss in nats, over the whole catalogue with seen items kept. Predicted (Penha et al. 2024):
in popularity_shift the joint model wins where mixing brings the training popularity nearer to that of the test (the
sign of a difference of KL), in the others its gain grows with rho.

In popularity_shift the best there is to learn is a popularity. Above the entropy of the test a model that is trained to
the end is KL(test || its task) nats, alone or jointly, because the input says which task it is. As long as a joint
model has not learned to tell them, it is KL(test || both in equal parts). So the gain in nats is a share of the
difference of the two, 1 at first and 0 in the end, and the prediction is one about early training. Told as `shared`.
There the model is T5 1.1 as in the paper, whose answers all begin with the same token, and it is trained for few steps
(one epoch, some 50 for the task alone). So few leave a single model short of its optimum, and a joint one, which takes
twice as many, is nearer to its own: that speaks for joint training in every setting, whatever the popularities are.
With --equal_steps the single model takes as many steps as the joint one. In the other worlds the model is a decoder
alone with one table, because the rows by which a query finds an item and those by which a history is read must be the
same for one task to tell the other anything.

Writes DIR/NAME.json and DIR/NAME.png, after every setting; what is there already with the same arguments is kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.stats import spearmanr

from recjax import plots
from recjax.core.optim import Optimizer
from recjax.data.examples import Examples, write_examples
from recjax.data.pipeline import Feed
from recjax.data.small_world import SmallWorld
from recjax.data.sources import DataDir
from recjax.data.text import TextConfig
from recjax.data.tokens import AtomicIds
from recjax.data.worlds import WORLDS, PopularityShift, SharedHistories, SharedQueries
from recjax.evaluation import Evaluation
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.seq2seq import EncoderDecoder, t5_stack
from recjax.models.sequence import Sequence as Decoder
from recjax.nn.transformer import TransformerConfig
from recjax.recipe import Assembly, Recipe
from recjax.tasks.cache import place_of
from recjax.tasks.mixtures import Mixture
from recjax.tasks.next_item import NextItem
from recjax.tasks.search import Search
from recjax.tasks.work import Task, columns_of, examples_of

RHO = (0.0, 0.25, 0.5, 0.75, 1.0)
# (kl_rec, kl_search, agreement of the two errors)
SHIFTS = (
    *((0.8, 0.05, 0.0), (0.6, 0.1, 0.0), (0.4, 0.4, -1.0), (0.8, 0.2, -0.5), (0.05, 0.8, 0.0)),
    *((0.1, 0.6, 0.0), (0.1, 0.8, 0.5), (0.2, 0.8, 1.0), (0.05, 0.4, 1.0), (0.5, 0.5, 0.0)),
)
TASKS = ("rec", "search")
KINDS = (PopularityShift.kind, SharedQueries.kind, SharedHistories.kind)


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """How a model is made and trained: `epochs` of each task in batches of `rows` rows of 64 tokens."""

    model: Callable[..., Any]
    feed: dict[str, Any]
    text: TextConfig
    rate: float
    epochs: float
    rows: int


class Found(NamedTuple):
    """Recall@10 and loss of the evaluated task on test, and how many steps were taken."""

    recall: float
    nll: float
    steps: int


def wiring(name: str, width: int) -> Wiring:
    """The model of a world."""
    if name != PopularityShift.kind:
        encoder = TransformerConfig(num_layers=2, width=width, num_heads=2, dropout=0.1)
        made = functools.partial(Decoder, encoder=encoder, max_length=16, embedding_dropout=0.1, scale_embedding=True)
        feed = {"history": "tile", "history_length": 16, "text_length": 12}
        return Wiring(model=made, feed=feed, text=TextConfig(), rate=3e-3, epochs=25.0, rows=16)
    stack = functools.partial(t5_stack, num_layers=2, width=width, num_heads=4, head_dim=16, mlp_width=128, dropout=0.1)
    made = functools.partial(EncoderDecoder, encoder=stack(), decoder=stack(is_decoder=True))
    feed = {"history": "every", "history_length": 8, "text_length": 8, "answer": "decoder", "answer_length": 16}
    return Wiring(model=made, feed=feed, text=TextConfig(size=512), rate=1e-3, epochs=1.0, rows=16)


def main() -> None:
    """Every value of the knob, a table and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=KINDS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--epochs", type=float, help="instead of those of the world's model, as --rows is")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rows", type=int, help="rows of 64 tokens in a batch")
    parser.add_argument("--users", type=int, default=1000, help="of popularity_shift, with ten events each")
    parser.add_argument("--equal_steps", action="store_true", help="of the task alone as of both together")
    parser.add_argument("--world_seed", type=int, default=0, help="of what is drawn in the world")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the models")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))
    wired = wiring(args.world, args.width)
    cache, train = args.out / "examples", functools.partial(trained, wired=told(wired, args))
    path, settled = args.out / f"{args.world}.json", {name: str(value) for name, value in vars(args).items()}
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = found["rows"] if found.get("settings") == settled else []
    alone: dict[Any, Found] = {}
    every = [(world, e, seed) for world, e in settings(args.world, args) for seed in args.seeds]
    for world, evaluated, seed in every[len(rows) :]:
        started, tasks = time.perf_counter(), tasks_of(world, wired.text, cache)
        # In the worlds of rho what the evaluated task alone is trained on does not depend on the knob.
        key = (world if isinstance(world, PopularityShift) else None, seed)
        joint = train(tasks, TASKS[evaluated], seed=seed, cache=cache)
        if key not in alone:
            steps = joint.steps if args.equal_steps else None
            alone[key] = train(tasks[evaluated : evaluated + 1], TASKS[evaluated], seed=seed, cache=cache, steps=steps)
        single, measured = alone[key], world.measured(world.make())
        both = {"alone": single.recall, "joint": joint.recall, "gain": joint.recall - single.recall}
        steps = {"steps_alone": single.steps, "steps_joint": joint.steps}
        row = {"task": TASKS[evaluated], **measured, "seed": seed, **both, "gain_nats": single.nll - joint.nll, **steps}
        if isinstance(world, PopularityShift):
            row["shared"] = row["gain_nats"] / (row[f"kl_{row['task']}"] - row["kl_joint"])
        rows.append(row)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        print(f"{time.perf_counter() - started:.0f} s", shown, flush=True)
        found = {"world": args.world, "settings": settled, "verdict": verdict(rows), "rows": rows}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(args.world, rows, args.out / args.world)
    print(found["verdict"])


def told(wired: Wiring, args: argparse.Namespace) -> Wiring:
    """With what the command line says otherwise."""
    given = {name: value for name in ("epochs", "rows") if (value := getattr(args, name)) is not None}
    return replace(wired, **given)


def settings(name: str, args: argparse.Namespace) -> list[tuple[SmallWorld, int]]:
    """Worlds, and which of `TASKS` is evaluated."""
    drawn: dict[str, Any] = {"items": args.items, "seed": args.world_seed}
    if name != PopularityShift.kind:
        return [(WORLDS[name](rho=rho, **drawn), int(name == "shared_histories")) for rho in RHO]  # type: ignore[call-arg]
    size: dict[str, Any] = {"users": args.users, "held_out": args.users // 2, "zipf": 16}
    return [(PopularityShift(kl_rec=r, kl_search=s, agreement=a, **size, **drawn), 0) for r, s, a in SHIFTS]


def tasks_of(world: SmallWorld, text: TextConfig, cache: Path) -> list[Task]:
    """Recommendation and search over a world, their examples in the cache."""
    log = NextItem(data=DataDir(simulate=world), split="given", catalogue="items")
    tasks: list[Task] = [log, Search(log=log, split="given", text=text)]
    for task in tasks:
        place = place_of(task, cache)
        if not place.path.exists():
            work = task.work()
            kept = {"vocab": work.vocab, "items": work.items, "users": work.users, "text": work.text}
            facts = {"task": task.name, "content_hash": place.content_hash, **work.facts}
            with write_examples(place.path, facts=facts, **kept) as writer:
                for split, schema in work.schemas.items():
                    writer.add(split, schema, columns_of(list(examples_of(work, split)), schema))
    return tasks


def trained(
    tasks: Sequence[Task], evaluated: str, *, wired: Wiring, seed: int, cache: Path, steps: int | None = None
) -> Found:
    """What the last parameters find after so many epochs of the evaluated task, or so many steps."""
    recipe = Recipe(
        name="when_search_helps",
        mixture=Mixture(tasks=tasks, temperature=1.0),
        feed=Feed(batch_size=wired.rows, row_length=64, **wired.feed),
        model=wired.model,
        objectives=[CatalogueSoftmax()],
        spelling=AtomicIds(),
        optimizer=Optimizer(learning_rate=wired.rate),
        evaluation=Evaluation(k=(10,), seen="kept", baselines=(), batch_size=256),
        train_steps=1,
        seed=seed,
    )
    number = next(
        k for k, task in enumerate(tasks) if task.name == ("search" if evaluated == "search" else "next_item")
    )
    assembly = Assembly(recipe, [Examples.open(place_of(task, cache).path) for task in tasks])
    batches, state, step, const = assembly.batches(), assembly.init_state(), assembly.train_step(), assembly.const()
    taken = 0
    with assembly.mesh.activate():
        while batches.epochs[number] < wired.epochs if steps is None else taken < steps:
            state, _ = step(state, assembly.mesh.put_batch(next(batches)), const)
            taken += 1
        found = assembly.evaluator("test", number)(state.params)
    batches.close()
    assert found.nll is not None
    return Found(recall=float(found.values["recall@10"]), nll=float(found.nll.mean()), steps=taken)


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How far the prediction held."""
    if "rho" in rows[0]:
        rho = sorted({r["rho"] for r in rows})
        gain = [float(np.mean([r["gain"] for r in rows if r["rho"] == one])) for one in rho]
        return {"spearman": float(np.asarray(spearmanr(rho, gain))[0]), "gain_at_0": gain[0], "gain_at_1": gain[-1]}
    right = {g: sum((r[g] > 0) == r[f"joint_helps_{r['task']}"] for r in rows) for g in ("gain", "gain_nats")}
    return {**right, "of": len(rows), "shared": float(np.median([r["shared"] for r in rows]))}


def draw(name: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The gain against the knob."""
    figure, (axis,) = plots._figure(width=5.5, height=4.0, columns=1)
    at = [r["rho"] if "rho" in r else r[f"kl_{r['task']}"] - r["kl_joint"] for r in rows]
    axis.axhline(0.0, color="#6b7480", linewidth=0.8)
    axis.scatter(at, [r["gain"] for r in rows], s=18)
    label = "rho" if "rho" in rows[0] else "KL to the test: of the task alone, less of both (nats)"
    plots._label(axis, f"Gain of joint training: {name}", label, "recall@10, joint less alone")
    plots._save(figure, path.with_suffix(".png"))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
