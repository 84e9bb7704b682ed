"""How a ranker that is updated every day does on each day before it is trained on it, beside one that is not updated.

    python benchmarks/progressive.py WORKDIR

WORKDIR is that of a stage that was trained in one pass in order of time and kept its checkpoints, such as
runs/ecdctr/seed0/15_daily: a checkpoint is the end of a day. Columns are those of the model as it was when the day
began, and of the model of the first day: how far they are apart is what is forgotten without updates.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recjax import command, trained
from recjax.core.flags import Flags
from recjax.prequential import progressive


def main() -> None:
    """Score, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    args = parser.parse_args()
    recipe = command.load(Flags(gin_files=(str(args.workdir / command.CONFIG),)))[0]
    print(progressive(trained.load(recipe, args.workdir, checkpoint="newest")).markdown())


if __name__ == "__main__":
    main()
