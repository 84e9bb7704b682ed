"""What is known of machines before they are there, and how runs get there: `recjax launch`, see `launch.__main__`."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """`recjax launch`."""
    from recjax.launch.__main__ import main as launch

    return launch(list(argv or ()))
