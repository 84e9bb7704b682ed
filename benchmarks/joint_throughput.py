"""Whether one model for search and recommendation trains as fast as the two that it replaces, on this machine.

    python benchmarks/joint_throughput.py --out DIR [--data DIR] [--steps 20] [--rounds 5] [recipe bindings]

The arms 1 (recommendation), 2 (search) and 5 (both) of the recipe `search_and_rec`, or of `--recipe`, take turns in one
process: loader, transfer and train step, as `recjax train` runs them. An example is a window of a history or a pair of
query and item; "worth" is the time that the single models take for the examples of a joint step, divided by the time of
that step: at 1 the joint model costs what the two cost together. Times are CPU seconds of the process, which a busy
machine does not change; medians over the rounds. Bindings are those of the command line, such as TRAIN_STEPS=100 or
pipeline.Feed.history_length=50. Writes DIR/joint_throughput.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import jax

from recjax import command
from recjax.core.flags import Flags, config_root
from recjax.data.pipeline import BatchIterator
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly

ARMS = {"recommendation": "1_recommend", "search": "2_search", "both": "5_joint"}


@dataclass
class Arm:
    """A run that is taken further a few steps at a time; what it did is added up, what it took noted by round."""

    stage: Path
    bindings: tuple[str, ...]
    cache: Path | None
    targets: int = 0
    steps: int = 0
    windows: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    loader_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = command.load(Flags(gin_files=(str(self.stage),), bindings=self.bindings))[0]
        self.assembly = Assembly(recipe, ensure_prepared(recipe.mixture, self.cache))
        batches = self.assembly.batches()
        assert isinstance(batches, BatchIterator)
        self.batches, self.train = batches, self.assembly.train_step()
        self.state, self.const = self.assembly.init_state(), self.assembly.const()
        self.run(2)  # compiles
        self.targets, self.steps, self.step_s, self.loader_s = 0, 0, [], []
        self.windows = [-n for n in self._handed_out()]

    def run(self, steps: int) -> None:
        """So many steps, and the CPU time of one of them."""
        started, loading = time.process_time(), 0.0
        with self.assembly.mesh.activate():
            for _ in range(steps):
                before = time.process_time()
                batch = next(self.batches)
                loading += time.process_time() - before
                self.targets += int((batch["weight"] > 0).sum())
                self.state, metrics = self.train(self.state, self.assembly.mesh.put_batch(batch), self.const)
                jax.block_until_ready(metrics)
        self.steps += steps
        self.step_s.append((time.process_time() - started) / steps)
        self.loader_s.append(loading / steps)

    def _handed_out(self) -> list[float]:
        """Examples of each task so far."""
        return [e * n for e, n in zip(self.batches.epochs, self.batches.epoch_windows, strict=True)]

    @property
    def per_step(self) -> list[float]:
        """Examples of each task in a step."""
        return [(n + w) / self.steps for n, w in zip(self._handed_out(), self.windows, strict=True)]


def main() -> None:
    """All arms in turn, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bindings", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="")
    parser.add_argument("--recipe", default="search_and_rec")
    parser.add_argument("--steps", type=int, default=20, help="of an arm in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    bindings = (f"DATA_DIR={args.data!r}", *args.bindings)
    stages = config_root() / "recipe" / args.recipe
    arms = {name: Arm(stages / f"{stage}.gin", bindings, args.cache) for name, stage in ARMS.items()}
    for _ in range(args.rounds):
        for arm in arms.values():
            arm.run(args.steps)
    rows = {name: told(arm) for name, arm in arms.items()}
    alone = [rows["recommendation"], rows["search"]]
    for part in ("step", "loader"):
        pairs = zip(rows["both"]["examples"], alone, strict=True)
        worth = sum(examples * one[f"{part}_ms"] / one["examples"][0] for examples, one in pairs)
        rows["both"][f"{part}_worth"] = worth / rows["both"][f"{part}_ms"]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "joint_throughput.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (args.out / "joint_throughput.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


def told(arm: Arm) -> dict:
    """What is in a row of the table."""
    step, loader = statistics.median(arm.step_s), statistics.median(arm.loader_s)
    return {
        "step_ms": 1e3 * step,
        "loader_ms": 1e3 * loader,
        "targets": arm.targets / arm.steps,
        "targets_per_s": arm.targets / arm.steps / step,
        "examples": arm.per_step,
        "row_use": arm.batches.row_use,
        "rows": arm.assembly.num_rows,
        "scored": len(arm.const["item_valid"]),
    }


def table(rows: dict) -> str:
    """In Markdown."""
    head = ["model", "rows of the table, scored", "slots in use", "examples in a step", "targets"]
    head += ["loader, ms", "step, ms", "targets/s", "worth"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        cells = [name, f"{row['rows']:,}, {row['scored']:,}", f"{row['row_use']:.1%}"]
        cells += [" + ".join(f"{n:.0f}" for n in row["examples"]), f"{row['targets']:.0f}", f"{row['loader_ms']:.1f}"]
        cells += [f"{row['step_ms']:.0f}", f"{row['targets_per_s']:,.0f}"]
        cells += [f"{row['step_worth']:.2f}" if "step_worth" in row else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
