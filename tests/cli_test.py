"""The command: help without jax, one message per mistake, and statuses that scripts can rely on."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recjax import __version__, cli
from recjax import list as listing
from recjax.core.errors import ConfigError, DataError, RecjaxError

# Entry points without a console script: the exit status of `recjax ...`, and the heavy modules it has imported.
PROBE = """
import atexit, sys
from recjax import cli
heavy = {"jax", "flax", "gin", "numpy", "tensorflow", "polars"}
atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))
sys.exit(cli.main())
"""


def recjax(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "recjax", *argv], capture_output=True, text=True, check=check)


@pytest.mark.parametrize(
    "argv, status, said",
    [
        (["--help"], 0, "usage: recjax VERB"),
        ([], 0, "usage: recjax VERB"),
        (["--version"], 0, __version__),
        (["list"], 0, "recipe\tstage\trole\tpaper"),
        (["list", "--help"], 0, "usage: recjax list"),
        (["tarin"], 2, "did you mean train?"),
        (["list", "nosuchrecipe"], 2, "no recipe nosuchrecipe"),
    ],
)
def test_help_lists_and_mistakes_need_nothing_heavy(argv: list[str], status: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *argv], capture_output=True, text=True)
    assert done.returncode == status
    assert said in (done.stderr if status else done.stdout)
    assert done.stderr.splitlines()[-1] == "[]"
    assert "Traceback" not in done.stderr


def test_every_verb_of_the_help_exists() -> None:
    for verb in cli.VERBS:
        assert importlib.util.find_spec(f"recjax.{verb}") is not None, verb


def test_a_verb_is_the_same_as_its_module() -> None:
    by_module = subprocess.run(
        [sys.executable, "-m", "recjax.list", "--json"], capture_output=True, text=True, check=True
    )
    assert by_module.stdout == recjax("list", "--json").stdout
    assert isinstance(json.loads(by_module.stdout), list)


@pytest.mark.parametrize("error", [ConfigError("one", where="two", expected="three", mend="four"), DataError("five")])
def test_a_mistake_is_one_message_and_status_2(error: RecjaxError, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: list[str]) -> int:
        assert argv == ["--x"]
        raise error

    assert cli.run(fail, ["--x"]) == 2
    assert capsys.readouterr().err == f"recjax: {error}\n"
    assert cli.run(fail, ["--debug", "--x"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith(f"recjax: {error}\n")


def test_interruption_full_disk_and_faults_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    def fail_with(error: BaseException) -> cli.Main:
        def fail(argv: list[str]) -> int:
            raise error

        return fail

    assert cli.run(fail_with(KeyboardInterrupt()), []) == 130
    assert cli.run(fail_with(OSError(errno.ENOSPC, "No space left on device")), []) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert cli.run(fail_with(PermissionError(errno.EACCES, "Permission denied", "/etc/x")), []) == 2
    assert capsys.readouterr().err == "recjax: Permission denied\n  where:    /etc/x\n"
    with pytest.raises(ZeroDivisionError):
        cli.run(fail_with(ZeroDivisionError()), [])
    assert cli.run(lambda argv: 3, []) == 3


def test_a_reader_that_stops_reading_is_no_mistake() -> None:
    command = [sys.executable, "-m", "recjax", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_flags_of_a_verb_are_exact_and_misspelt_ones_have_a_hint() -> None:
    parser = cli.ArgumentParser("train")
    parser.add_argument("--workdir")
    parser.add_argument("--steps", type=int)
    assert parser.parse_args(["--workdir", "x", "--steps=3"]).steps == 3
    for argv, hint in [
        (["--wrokdir=x"], "did you mean --workdir?"),
        (["--work", "x"], "did you mean --workdir?"),
        (["--steps=many"], "`recjax train --help` shows the flags"),
        (["extra"], "`recjax train --help` shows the flags"),
    ]:
        with pytest.raises(ConfigError) as error:
            parser.parse_args(argv)
        assert error.value.mend == hint and error.value.where == "recjax train"


HEADER = """# Written for the test.
# title: A title
# paper: One and Two 2020,
#   Journal of Tests
# data: any; note: with a colon
#
# command: recjax run x
# expected:
# measured: recall@10 0.2

# cost: too late
SEED = 1
"""


def test_a_header_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "1_train.gin"
    path.write_text(HEADER)
    assert listing.read_header(path) == listing.Header(
        title="A title",
        paper="One and Two 2020, Journal of Tests",
        data="any; note: with a colon",
        command="recjax run x",
        measured="recall@10 0.2",
    )
    path.write_text("# title: a\n# title: b\n")
    with pytest.raises(ConfigError, match="title is given twice"):
        listing.read_header(path)


def test_the_listing_has_every_stage_and_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    root = Path(cli.__file__).parent.parent / "configs" / "recipe"
    assert sorted(row["file"] for row in rows) == sorted(
        f"configs/recipe/{p.parent.name}/{p.name}" for p in root.glob("*/[0-9]*_*.gin")
    )
    assert listing.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows) and all(line.count("\t") == lines[0].count("\t") for line in lines)
    mains = [(row["recipe"], row["stage"]) for row in rows if row["role"] == "main"]
    assert [name for name, _ in mains] == sorted({row["recipe"] for row in rows})
    assert {("ecdctr", "12_full"), ("quickstart", "3_joint"), ("sasrec", "1_train")} <= set(mains)
    for row in rows:
        assert row["title"] and row["paper"] and row["data"] and row["command"], row["file"]


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        dict.fromkeys(listing._COLUMNS, "x") | {"recipe": "alpha"},
        dict.fromkeys(listing._COLUMNS, "y") | {"recipe": "alpha"},
    ]
    monkeypatch.setenv("COLUMNS", "120")
    listing._print_table(rows)
    shown = capsys.readouterr().out
    assert shown.count("alpha") == 1 and "measured" in shown and "\t" not in shown
