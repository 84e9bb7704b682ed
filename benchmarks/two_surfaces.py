"""A data directory with two surfaces, much of one and little of the other, from a log of one.

    python benchmarks/two_surfaces.py SOURCE OUT [--items .08] [--leak .3] [--keep 1] [--seed 0]

SOURCE is a folder with interactions that have times, and perhaps items and users. Of its items a share --items, drawn
in proportion to the root of how often they occur, are ads. Their rows are on the surface "ads", but for a share --leak
that is "organic" like all other rows, so that both surfaces know these items; of the ads a share --keep is kept. OUT,
which must not exist, has the column `surface`. Which rows are where is a matter of the seed alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

from recjax.data.directory import write_directory


def with_surfaces(log: pl.DataFrame, *, items: float, leak: float, keep: float, seed: int) -> pl.DataFrame:
    """The rows that are kept, with the column `surface`."""
    draw = np.random.default_rng(seed)
    counts = log.group_by("item_id").len().sort("item_id")
    weight = np.sqrt(counts["len"].to_numpy())
    chosen = draw.choice(counts.height, max(1, round(items * counts.height)), replace=False, p=weight / weight.sum())
    is_ad = log["item_id"].is_in(counts["item_id"][chosen.tolist()].implode()).to_numpy()
    is_ad &= draw.random(log.height) >= leak
    kept = ~is_ad | (draw.random(log.height) < keep)
    return log.with_columns(surface=pl.Series(np.where(is_ad, "ads", "organic"))).filter(kept)


def main() -> None:
    """Read, choose, write, and say how much there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=float, default=0.08)
    parser.add_argument("--leak", type=float, default=0.3)
    parser.add_argument("--keep", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    log = pl.read_parquet(args.source / "interactions.parquet")
    frames = {"interactions": with_surfaces(log, items=args.items, leak=args.leak, keep=args.keep, seed=args.seed)}
    for name in ("items", "users"):
        if (path := args.source / f"{name}.parquet").exists():
            frames[name] = pl.read_parquet(path)
    write_directory(args.out, frames)
    for surface, rows in frames["interactions"].group_by("surface").len().sort("surface").iter_rows():
        print(f"{surface}: {rows:,} rows")


if __name__ == "__main__":
    main()
