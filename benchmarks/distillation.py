"""How good a teacher is, how much its lists and its students' have in common, and what distillation did for rare items.

    python benchmarks/distillation.py RUN --examples PREPARED [--k 20] [--candidates candidates.parquet]

RUN is the folder of `recjax run dllm2rec`. For each stage and the mean over seeds: recall and NDCG at k of the test
targets; the NDCG of targets with fewer than 5 training events; the share of users for whom the teacher ranks the
target below the stage, and above it; and the share of the stage's first k that are also among the teacher's first k.
`--candidates` adds the overlap with lists of other retrievers (columns method, user_id, items): these were made at the
test position, so they are compared with here and never trained on. Prints markdown; computes nothing that a model
would have to be run for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from recjax.core.artifact import read_artifact
from recjax.data.examples import Examples

RARE = 5


def ndcg(rank: np.ndarray, k: int) -> np.ndarray:
    """Of one relevant item at `rank`, counted from 0."""
    return np.where(rank < k, 1 / np.log2(rank + 2.0), 0)


def lists_of(stage: Path, k: int) -> dict[int, list[int]] | None:
    """The first k rows of each user; None when the stage has not inferred any."""
    if not (stage / "artifacts" / "recommendations").exists():
        return None
    found = read_artifact(stage / "artifacts" / "recommendations", kind="recommendations")
    users, rows = np.asarray(found["user_index"]).tolist(), np.asarray(found["rows"])[:, :k].tolist()
    return dict(zip(users, rows, strict=True))


def overlap(one: dict[int, list[int]] | None, other: dict[int, list[int]] | None, k: int) -> str:
    """Mean share of the first k items that both have, over the users of both."""
    users = set(one or {}) & set(other or {})
    if one is None or other is None or not users:
        return ""
    return f"{np.mean([len(set(one[u]) & set(other[u])) / k for u in users]):.1%}"


def candidates_of(path: Path, examples: Examples, k: int) -> dict[str, dict[int, list[int]]]:
    """The lists of each method by user number."""
    import polars as pl

    number = {str(user): i for i, user in enumerate(examples.user_ids())}
    out: dict[str, dict[int, list[int]]] = {}
    for method, user, items in pl.read_parquet(path).select("method", "user_id", "items").iter_rows():
        if str(user) in number:
            rows = examples.vocab.encode(items[:k]).tolist()
            out.setdefault(method, {})[number[str(user)]] = rows
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--examples", type=Path, required=True, help="the prepared folder that the run used")
    parser.add_argument("--teacher", default="1_teacher")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--candidates", type=Path, default=None)
    args = parser.parse_args()
    examples, k = Examples.open(args.examples), args.k
    seeds = sorted(args.run.glob("seed*"))
    stages = sorted({p.parent.parent.name for s in seeds for p in s.glob("*/test/per_user.npz")})
    others = candidates_of(args.candidates, examples, k) if args.candidates else {}
    heads = [f"recall@{k}", f"ndcg@{k}", f"ndcg@{k} rare", "teacher worse", "teacher better", "overlap with teacher"]
    heads += [f"overlap with {name}" for name in others]
    print("| stage | " + " | ".join(heads) + " |\n|" + "---|" * (len(heads) + 1))
    for stage in stages:
        values, shared = [], [""] * (1 + len(others))
        for seed in seeds:
            if not (seed / stage / "test" / "per_user.npz").exists():
                continue
            found, taught = (np.load(seed / s / "test" / "per_user.npz") for s in (stage, args.teacher))
            rank, teacher = found["rank/model"], taught["rank/model"]
            rare = examples.item_count[found["label"]] < RARE
            gain = ndcg(rank, k)
            values.append(
                [(rank < k).mean(), gain.mean(), gain[rare].mean(), (teacher > rank).mean(), (teacher < rank).mean()]
            )
            mine = lists_of(seed / stage, k)
            teachers = [lists_of(seed / args.teacher, k), *others.values()]
            shared = [overlap(mine, other, k) for other in teachers]
        row = [f"{v:.4f}" if i < 3 else f"{v:.1%}" for i, v in enumerate(np.mean(values, axis=0))]
        print(f"| {stage} | " + " | ".join([*row, *shared]) + " |")


if __name__ == "__main__":
    main()
