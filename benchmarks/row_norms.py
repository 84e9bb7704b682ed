"""Which rows of a ranker's table grow, and what it costs: norms and AUC by how often a value occurs, epoch by epoch.

    python benchmarks/row_norms.py RUN [--seed 0] [--stages 3_scratch 5_two_stage] [--field item_id] [--bounds 2 5 20]
        [--split test]

RUN is a finished `recjax run one_epoch`, or any run of rankers; its checkpoints are read. Values of the field fall
into parts by how many training rows have them: up to each of the bounds, and more. Each checkpoint of a stage is a
line: for every part the mean Euclidean norm of the vectors of its values, and the AUC over the rows of the split that
have one of them. A ranker that has gone through its rows too often shows it here: vectors of rare values, which few
rows hold in check, are those that go on growing, and rows with these values are what it gets wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from recjax import command, trained
from recjax.core import saved
from recjax.core.checkpoint import restore_params
from recjax.core.errors import ConfigError
from recjax.core.flags import Flags
from recjax.data.field_tables import FieldCounts
from recjax.data.fields import FIRST_VALUE, shapes_of
from recjax.metrics.auc import auc
from recjax.models.ranker import Ranker
from recjax.ranker_evaluation import RankerEvaluator
from recjax.tables import Table
from recjax.train import CHECKPOINTS


def parts_of(count: np.ndarray, bounds: list[int]) -> np.ndarray:
    """int64: the part of each value, 0 for counts up to the first bound."""
    return np.searchsorted(bounds, count)


def norms_by_part(vectors: np.ndarray, part: np.ndarray, parts: int) -> np.ndarray:
    """float64 [parts]: the mean norm of the vectors [n, d] of each part, NaN where there is none."""
    norm = np.linalg.norm(vectors.astype(np.float64), axis=1)
    many = np.bincount(part, minlength=parts)
    return np.where(many > 0, np.bincount(part, norm, minlength=parts) / np.maximum(many, 1), np.nan)


def auc_by_part(logits: np.ndarray, positive: np.ndarray, part: np.ndarray, parts: int) -> np.ndarray:
    """float64 [parts]: the AUC over the rows of each part, NaN where one kind is missing."""
    return np.array([auc(logits[part == k], positive[part == k]) for k in range(parts)])


def lines(workdir: Path, field: str, bounds: list[int], split: str) -> list[list[str]]:
    """A line for each checkpoint of a stage: its step, norms, and AUC. Raises `ConfigError` for what is no ranker."""
    recipe = command.load(Flags(gin_files=(str(workdir / command.CONFIG),)))[0]
    assembly = trained.load(recipe, workdir).assembly
    examples, evaluator = assembly.examples[0], assembly.evaluator(split)
    model = assembly.model.bind(assembly.abstract_params())
    if not isinstance(model, Ranker) or not isinstance(evaluator, RankerEvaluator):
        raise ConfigError(f"{workdir.name} trains no ranker", where="--stages", expected="stages of rankers")
    [shape] = [one for one in shapes_of(examples.manifest) if one.name == field]
    rows = np.arange(shape.offset + FIRST_VALUE, shape.offset + shape.rows)
    count = FieldCounts(field=field)([examples])["item/count"].astype(np.int64)
    asked = evaluator.reader.read(np.arange(len(evaluator.reader)))[f"field/{field}"]
    parts, positive, found = len(bounds) + 1, evaluator.rows.label[:, 0] >= 0.5, []
    for step in saved.steps(workdir / CHECKPOINTS):
        shapes = assembly.abstract_state().params
        params, _ = restore_params(workdir / CHECKPOINTS, shapes, step=step, vocabulary=assembly.vocabulary_hash)
        vectors = np.asarray(params["table"])[rows, : model.table_width]
        logits = evaluator.scores(assembly.with_facts(params))[evaluator.heads[0]]
        norms = norms_by_part(vectors, parts_of(count[rows], bounds), parts)
        aucs = auc_by_part(logits, positive, parts_of(count[asked], bounds), parts)
        found.append([workdir.name, f"{step:,}", *(f"{x:.3f}" for x in norms), *(f"{x:.4f}" for x in aucs)])
    return found


def main() -> None:
    """Read, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", default=["3_scratch", "5_two_stage", "12_adamw", "13_adamar"])
    parser.add_argument("--field", default="item_id")
    parser.add_argument("--bounds", nargs="+", type=int, default=[2, 5, 20])
    parser.add_argument("--split", default="test")
    args = parser.parse_args()
    lows = [0, *(bound + 1 for bound in args.bounds)]
    names = [*(f"{low} to {high}" for low, high in zip(lows, args.bounds, strict=False)), f"from {lows[-1]}"]
    print(f"Training rows of a value of {args.field}: {', '.join(names)}.\n")
    header, rows = ["", "step", *(f"norm, {name}" for name in names), *(f"auc, {name}" for name in names)], []
    for stage in args.stages:
        rows += lines(args.run / f"seed{args.seed}" / stage, args.field, args.bounds, args.split)
    print(Table(title="", header=header, rows=rows).markdown())


if __name__ == "__main__":
    main()
