"""Puts the output of each command of `docs/launch.md` below it: python docs/dry_runs.py

A command stands in a block of its own as the first line, `$ recjax launch ... --dry-run`; what follows in the block is
replaced. A test does the same and fails where the page would change.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("launch.md")
_BLOCK = re.compile(r"```console\n\$ recjax launch (?P<words>.*?--dry-run)\n.*?```", re.DOTALL)


def refreshed(text: str) -> str:
    """The page with what the commands say now."""

    def block(found: re.Match[str]) -> str:
        return f"```console\n$ recjax launch {found['words']}\n{said(found['words'])}```"

    return _BLOCK.sub(block, text)


def said(words: str) -> str:
    """What `recjax launch WORDS` prints."""
    from recjax.launch.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as output:
        if main(shlex.split(words.replace("\\\n", " "))):
            raise SystemExit(f"recjax launch {words} failed")
    return output.getvalue()


if __name__ == "__main__":
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
