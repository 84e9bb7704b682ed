"""The kinds of bundles there are, and how one of unknown kind is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from recjax.core.errors import BundleError
from recjax.core.folder import read_manifest
from recjax.serve.bundle import FORMAT, Bundle
from recjax.serve.rank_bundle import KIND as RANK
from recjax.serve.rank_bundle import RankBundle
from recjax.serve.score_bundle import KIND as SCORE
from recjax.serve.score_bundle import ScoreBundle

# By the "kind" of the manifest; bundles that recommend or search have none.
AnyBundle = Bundle | ScoreBundle | RankBundle
KINDS: dict[str, type[Bundle] | type[ScoreBundle] | type[RankBundle]] = {
    "": Bundle,
    SCORE: ScoreBundle,
    RANK: RankBundle,
}


def load_bundle(path: str | os.PathLike[str]) -> AnyBundle:
    """The bundle at `path`, of whatever kind; raises `BundleError`, also for a kind that this version does not know."""
    kind = read_manifest(Path(path), format_version=FORMAT, what="bundle", error=BundleError).get("kind", "")
    if kind not in KINDS:
        raise BundleError(
            f"this is a bundle of the kind {kind!r}",
            where=str(path),
            expected="one of: " + ", ".join(filter(None, KINDS)) + ", or none",
            mend="serve it with the version of recjax that wrote it",
        )
    return KINDS[kind](path)
