"""The kinds of bundles there are, and how one of unknown kind is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from recjax.core.errors import BundleError
from recjax.serve.bundle import Bundle
from recjax.serve.rank_bundle import RankBundle
from recjax.serve.score_bundle import ScoreBundle
from recjax.serve.stored import Stored, manifest_of

KINDS: dict[str, type[Stored]] = {kind.kind: kind for kind in (Bundle, ScoreBundle, RankBundle)}


def load_bundle(path: str | os.PathLike[str]) -> Stored:
    """The bundle at `path`, of whatever kind; raises `BundleError`, also for a kind that this version does not know."""
    kind = manifest_of(Path(path)).get("kind", "")
    if kind not in KINDS:
        raise BundleError(
            f"this is a bundle of the kind {kind!r}",
            where=str(path),
            expected="one of: " + ", ".join(filter(None, KINDS)) + ", or none",
            mend="serve it with the version of recjax that wrote it",
        )
    return KINDS[kind](path)
