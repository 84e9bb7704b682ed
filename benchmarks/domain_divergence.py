"""What adapters for each domain are worth: by how much domains differ, by rank, and by backbone.

    python benchmarks/domain_divergence.py OUT [--shifts 0 .3 .6 1.2] [--ranks 0 1 2 4 8]
        [--backbones mlp deepfm dcn autoint] [--seeds 1] [--steps 600] [--bind "DATA_DIR='DIR'" --bind ...]

Trains the stages `1_backbone` and `2_mlora` of the recipe `mlora` in OUT; what is there already is not trained again.
A shift is how large the change of taste in a domain of the simulated world is beside the common taste; where a DATA_DIR
is bound, the data say what it is. A rank of 0 is that of the recipe, a sixteenth of each layer's outputs. Columns: AUC
within domains weighted with their rows, test split, of the backbone and of MLoRA; then, over domains, the rank
correlation of what MLoRA gains with two things:

    rows    training rows of the domain
    pull    how strongly the domain pulls at the weights that all share: the root of g . g', the gradients of its mean
            loss by the dense weights of the trained backbone on two halves of its rows. Where a domain would have the
            weights of all, it is nothing but noise around 0, which is why the halves are two.

OUT/divergence.png shows the gain of every domain against both, means over the seeds, with the first of the ranks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from recjax import command, trained
from recjax.core.flags import Flags, config_root
from recjax.core.state import by_path, from_paths
from recjax.data.rows_feed import RowReader
from recjax.domain_gain import rank_correlation
from recjax.metrics.auc import auc
from recjax.plots import plot_points
from recjax.ranker_evaluation import RankerEvaluator
from recjax.tables import Table, number, signed
from recjax.train import CHECKPOINTS, train

FOLDER = config_root() / "recipe" / "mlora"
BACKBONES: dict[str, tuple[str, ...]] = {
    "mlp": (),
    "deepfm": (
        "BACKBONE=@factorization.FactorizationMachine()",
        "factorization.FactorizationMachine.deep=@tower.TowerConfig()",
    ),
    "dcn": ("BACKBONE=@crossing.Cross()",),
    "autoint": ("BACKBONE=@field_attention.FieldAttention()",),
}
MOST_ROWS = 4096


def ready(stem: str, stages: Path, *bindings: str) -> trained.Trained:
    """A stage, trained in its folder below `stages` unless it has been."""
    file = FOLDER / f"{stem}.gin"
    own = (f"STAGES={str(stages)!r}",) if "%STAGES" in file.read_text() else ()
    recipe = command.load(Flags(gin_files=(str(file),), bindings=(*own, *bindings)))[0]
    if not (stages / stem / CHECKPOINTS).exists():
        train(recipe, stages / stem)
    return trained.load(recipe, stages / stem)


def by_domain(run: trained.Trained) -> tuple[float, np.ndarray]:
    """The weighted AUC on the test split, and the AUC in each domain of training."""
    evaluator = run.assembly.evaluator("test")
    assert isinstance(evaluator, RankerEvaluator) and evaluator.rows.domain is not None
    z, rows = evaluator.scores(run.params)[evaluator.heads[0]], evaluator.rows
    positive, count = rows.label[:, 0] >= 0.5, len(evaluator.examples.manifest["domains"])
    each = np.array([auc(z[mine], positive[mine]) for d in range(count) for mine in [rows.domain == d]])
    return evaluator(run.params).values["weighted_auc"], each


def pulls(run: trained.Trained) -> tuple[np.ndarray, np.ndarray]:
    """The rows of each domain, and how strongly it pulls at the dense weights."""
    examples = run.assembly.examples[0]
    reader, head = RowReader(examples, "train"), next(iter(examples.manifest["heads"]))
    leaves = by_path(run.params)
    dense = {path: x for path, x in leaves.items() if path.endswith("weight")}

    @jax.jit
    def gradient(dense: Any, batch: Any) -> Any:
        def loss(dense: Any) -> jax.Array:
            z = run.assembly.model.apply(from_paths(run.params, leaves | dense), batch, train=False, key=None)
            z, y = z[f"logit/{head}"], batch[f"label/{head}"]
            return (jax.nn.softplus(z) - y * z).mean()

        return jnp.concatenate([g.ravel() for g in jax.tree.leaves(jax.grad(loss)(dense))])

    domain, found = reader.column("domain"), []
    for d in range(len(examples.manifest["domains"])):
        mine = np.random.default_rng(d).permutation(np.flatnonzero(domain == d))[: 2 * MOST_ROWS]
        halves = [reader.read(np.sort(half)) for half in np.array_split(mine, 2)]
        ours, theirs = (gradient(dense, {k: jnp.asarray(x) for k, x in half.items()}) for half in halves)
        found.append(float(ours @ theirs))
    return np.bincount(domain, minlength=len(found))[: len(found)], np.sign(found) * np.sqrt(np.abs(found))


def main() -> None:
    """Train what is missing, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shifts", nargs="+", type=float, default=[0.0, 0.3, 0.6, 1.2])
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 1, 2, 4, 8])
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=["mlp"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--bind", action="append", default=[], help="a gin binding of every stage")
    args = parser.parse_args()
    is_real = any(one.startswith("DATA_DIR") for one in args.bind)
    rows, shown = [], {}
    for backbone in args.backbones:
        for shift in [None] if is_real else args.shifts:
            for rank in args.ranks:
                world = () if shift is None else (f"rated_world.RatedWorld.shift={shift}",)
                told = [*BACKBONES[backbone], *world, f"TRAIN_STEPS={args.steps}", *args.bind]
                seeds = [
                    _judged(args.out / f"{backbone}-{shift}-seed{s}", rank, [*told, f"SEED={s}"])
                    for s in range(args.seeds)
                ]
                tied = [[rank_correlation(d[x], d["gain"]) for x in ("rows", "pull")] for _, _, d in seeds]
                plain, ours = (float(np.mean(column)) for column in list(zip(*seeds, strict=True))[:2])
                cells = [number(plain), number(ours), signed(ours - plain), *map(signed, np.nanmean(tied, axis=0))]
                rows.append([backbone, "" if shift is None else f"{shift:g}", str(rank or "o / 16"), *cells])
                name = backbone if shift is None else f"{backbone}, shift {shift:g}"
                shown.setdefault(name, {x: np.mean([d[x] for _, _, d in seeds], axis=0) for x in seeds[0][2]})
    header = ["backbone", "shift", "rank", "shared", "MLoRA", "gain", "gain and rows", "gain and pull"]
    print(Table(title="", header=header, rows=rows).markdown())
    print(plot_points(args.out / "divergence.png", shown, y="gain"))


def _judged(stages: Path, rank: int, bindings: list[str]) -> tuple[float, float, dict[str, list[float]]]:
    """Weighted AUC of the backbone and of MLoRA, and of each domain its rows, its pull and what it gains in AUC."""
    base = ready("1_backbone", stages, *bindings)
    plain, each = by_domain(base)
    own = [f"dense.DomainAdapters.rank={rank}"] if rank else []
    place = stages / f"rank{rank}"
    if not place.exists():
        place.mkdir(parents=True)
        (place / "1_backbone").symlink_to((stages / "1_backbone").resolve())
    ours, mine = by_domain(ready("2_mlora", place, *bindings, *own))
    count, pull = pulls(base)
    return plain, ours, {"rows": count.tolist(), "pull": pull.tolist(), "gain": (mine - each).tolist()}


if __name__ == "__main__":
    main()
