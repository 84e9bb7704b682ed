"""Processes on this machine: what each is told, and that they end and come back together."""

from __future__ import annotations

import itertools
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from recjax.launch import __main__ as verb
from recjax.launch import local
from recjax.launch.plan import restarting
from recjax.launch.surroundings import decide

GANG = """
import os, sys, time
me = os.environ["ME"]
what = sys.argv[1].split(",")[int(os.environ["ROUND"])].split("/")[int(me)]
if what == "wait":
    time.sleep(60)
if what.startswith("-"):
    os.kill(os.getpid(), -int(what))
sys.exit(int(what))
"""


@pytest.mark.parametrize(
    ("rounds", "status"),
    [
        ("0/0", 0),
        ("143/143,0/0", 0),  # both were told, and saved
        ("wait/-9,75/75,0/0", 0),  # one is killed: the other ends, and both come back
        ("2/wait", 2),  # a mistake: not again
        ("1/wait", 1),
        ("-9/wait,-9/wait,-9/wait,0/0", 137),  # no more restarts
    ],
)
def test_processes_here_come_back_together(rounds: str, status: int) -> None:
    words = [sys.executable, "-S", "-c", GANG, rounds]
    asked = itertools.count()

    def told() -> list[dict[str, str]]:
        number = str(next(asked))
        return [{"ME": "0", "ROUND": number}, {"ME": "1", "ROUND": number}]

    assert local.again(words, told, 2) == status
    assert next(asked) == min(len(rounds.split(",")), 3)


def test_what_each_process_here_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("local", "sasrec", "--processes=2", "--devices=4", "--dry-run", "--gin.MESH=data=4,model=2", "--workdir=w")
    assert verb.main(list(words)) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    for number, line in enumerate(lines):
        env = dict(word.split("=", 1) for word in line[1 : line.index("recjax")])
        cluster = decide({name: value.replace("PORT", "1234") for name, value in env.items()})
        assert (cluster.process, cluster.processes, cluster.source) == (number, 2, "environment")
        assert env["XLA_FLAGS"].endswith("=4") and line[line.index("recjax") :][:3] == ["recjax", "run", "sasrec"]
    assert len(lines) == 2


def test_a_shell_goes_on_as_the_launcher_here_does(tmp_path: Path) -> None:
    """The loop on TPU VMs and the launcher agree on every end; a shell adds 128 to the number of a signal."""
    script = tmp_path / "job"
    for status in (0, 1, 2, 75, 130, 137, 143):
        tries = tmp_path / f"tries{status}"
        script.write_text(f"echo x >> {tries}; exit {status}")
        done = subprocess.run(["bash", "-c", restarting(f"bash {script}", 2)], capture_output=True)
        assert done.returncode == status
        here = 128 - status if status in (130, 137) else status
        assert tries.read_text().count("x") == (3 if local.goes_on(here) else 1), status
