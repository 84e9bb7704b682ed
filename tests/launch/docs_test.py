"""The page about launching shows what the launchers say now."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "dry_runs.py"


def test_the_page_shows_what_is_said_now(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("dry_runs", SCRIPT)
    assert spec is not None and spec.loader is not None
    dry_runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dry_runs)
    page = dry_runs.PAGE.read_text(encoding="utf-8")
    assert dry_runs.refreshed(page) == page, "python docs/dry_runs.py"
    assert page.count("--dry-run\n") == 7
