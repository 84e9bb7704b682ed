"""Scaling studies: a grid of runs, the laws fitted to them, and larger models foretold; see `recjax.study.__main__`."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """`recjax study`."""
    from recjax.study.__main__ import main as study

    return study(list(argv or ()))
