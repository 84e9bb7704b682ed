"""Characters typed until what is searched for is among the first three: every prefix of a query is a request.

    python benchmarks/keystrokes.py BUNDLE [--data DIR | --events 20000] [--searches 300] [--candidates 100]

BUNDLE is one of the recipe `unicorn`, DIR the data directory that it was trained on (the simulated world without).
Searches are those of the last tenth of the requests in time; candidates are the target and items drawn, half of them
in proportion to how often the log has them. Prints mean characters, the share of the query they are, how many searches
never get there, and the shares that need at most 0 to 3.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from recjax.data.requests_log import requests_of
from recjax.data.simulate import World
from recjax.data.sources import DataDir
from recjax.keystrokes import Search, report, scorer, typed
from recjax.serve.rank_bundle import RankBundle


def main() -> None:
    """Type, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", default="")
    parser.add_argument("--events", type=int, default=20_000, help="of the simulated world")
    parser.add_argument("--searches", type=int, default=300)
    parser.add_argument("--candidates", type=int, default=100)
    args = parser.parse_args()
    bundle = RankBundle(args.bundle)
    log = requests_of(DataDir(path=args.data, simulate=World(num_events=args.events, searches=True)).load())
    cut = np.sort(log["timestamp"].to_numpy())[int(log.height * 0.9)]
    held = log.filter((log["timestamp"] >= cut) & (log["task"] == "search"))
    held = held.sample(min(args.searches, held.height), seed=0)
    items, counts = (x.to_numpy() for x in log["item_id"].value_counts(sort=True).get_columns())
    rng, score, searches = np.random.default_rng(0), scorer(bundle), []
    for row in held.to_dicts():
        half = args.candidates // 2
        drawn = [*rng.choice(items, half), *rng.choice(items, args.candidates - half - 1, p=counts / counts.sum())]
        chosen = [{"item_id": row["item_id"]}, *({"item_id": item.item()} for item in drawn if item != row["item_id"])]
        order = rng.permutation(len(chosen))
        target = int(np.flatnonzero(order == 0)[0])
        context = {"task": "search", "user_id": row["user_id"]}
        searches.append(Search(row["query"], context, [chosen[at] for at in order], target))
    found = report([typed(score, search) for search in searches], [search.query for search in searches])
    print(f"{len(searches)} searches, {args.candidates} candidates; {args.bundle}")
    print(" ".join(f"{name} {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
