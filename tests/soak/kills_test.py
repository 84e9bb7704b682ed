"""The short form of `make soak`: a training that is killed a few times ends as if nobody had touched it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


@pytest.mark.usefixtures("tiny_gin")  # has prepared the same examples
def test_a_few_kills_change_nothing(tmp_path: Path, recjax_cache: Path) -> None:
    words = ["--kills=3", "--seed=1", "--steps=8", "--pairs=0", f"--cache={recjax_cache}", f"--folder={tmp_path}"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-3000:]
    assert re.match(r"3 kills \(seed 1\)", done.stdout) and "bit-same" in done.stdout
