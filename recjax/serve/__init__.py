"""Serving exported bundles over HTTP; see `recjax.serve.app`. Imports none of the training code."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """`recjax serve`."""
    from recjax.serve.__main__ import main as serve

    return serve(argv)
