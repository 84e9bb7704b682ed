"""What a launcher is about to do, as something that can be shown, checked and done.

A plan is a few files and a few commands, in order. Showing it is harmless and says everything: the files as they will
be written, the commands as a shell would take them.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from recjax.core.errors import INTERRUPTED, TRY_AGAIN, ConfigError, RecjaxError

VERBS = ("run", "train", "evaluate")
RESTARTS = 100


class LaunchError(RecjaxError):
    """A command of a launcher that did not work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to run: `words` after `recjax`, such as ("run", "sasrec"), under a `name`, and how often again."""

    name: str
    words: tuple[str, ...]
    restarts: int = RESTARTS

    @property
    def command(self) -> str:
        """As a shell takes it."""
        return shlex.join(("recjax", *self.words))

    def setting(self, macro: str) -> str:
        """What the command line says of a macro; "" when it says nothing."""
        found = [word.partition("=")[2] for word in self.words if word.startswith(f"--gin.{macro}=")]
        return found[-1].strip("'\"") if found else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """`files` by name, written to a folder first, then `commands`; `notes` are for the reader."""

    files: dict[str, str] = dataclasses.field(default_factory=dict)
    commands: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def shown(self, folder: Path) -> str:
        """All of it as text."""
        parts = [f"# {note}" for note in self.notes]
        parts += [f"# {folder / name}\n{text.rstrip()}\n" for name, text in self.files.items()]
        return "\n".join([*parts, *(shlex.join(words) for words in self.commands)]) + "\n"

    def carry_out(self, folder: Path) -> None:
        """Write the files and run the commands, up to the first that fails; raises `LaunchError` then."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        for words in self.commands:
            print(shlex.join(words), file=sys.stderr, flush=True)
            try:
                status = subprocess.run(words, check=False).returncode
            except FileNotFoundError as error:
                raise LaunchError(f"{words[0]} is not installed", where=shlex.join(words)) from error
            if status:
                raise LaunchError(f"{words[0]} ended with status {status}", where=shlex.join(words))


def job_of(recipe: str, verb: str, rest: Sequence[str], *, name: str = "", restarts: int = RESTARTS) -> Job:
    """The job of a command line; raises `ConfigError` for a verb that several processes cannot share."""
    if verb not in VERBS:
        raise ConfigError(f"{verb} is not for several processes", where="--verb", expected=", ".join(VERBS))
    if not recipe and not any(word.startswith("--gin_file") for word in rest):
        raise ConfigError("which recipe?", expected="its name or --gin_file=FILE", mend="`recjax list` shows them")
    told = re.sub(r"[^a-z0-9]+", "-", (name or recipe or "recjax").lower()).strip("-")[:40]
    return Job(name=told, words=(verb, *([recipe] if recipe else []), *rest), restarts=restarts)


def check_mesh(job: Job, devices: int) -> None:
    """Raise `ConfigError` where MESH of the command line has another number of devices than there will be."""
    sizes = [part.partition("=")[2].strip() for part in job.setting("MESH").split(",") if part.strip()]
    if not sizes or not all(size.lstrip("-").isdigit() for size in sizes):
        return  # the recipe's own, or one that the run itself will refuse with its reasons
    product = 1
    for size in sizes:
        product *= int(size) if size != "-1" else 1
    if product == devices or ("-1" in sizes and devices % product == 0):
        return
    raise ConfigError(
        f"{devices} devices are not the mesh",
        where=f"MESH = {job.setting('MESH')!r}",
        expected=f"a product of {devices}",
        mend='--gin.MESH="data=-1" takes them all',
    )


def restarting(command: str, restarts: int) -> str:
    """A shell loop that runs `command` again as long as its end says so: see `core.errors`."""
    return f"""\
restarts=0
while :; do
  {command} && exit 0
  status=$?
  # {INTERRUPTED}: told to stop and saved; {TRY_AGAIN}: others were missing; above 128: ended by a signal
  [ "$status" -eq {TRY_AGAIN} ] || [ "$status" -gt 128 ] || exit "$status"
  [ "$status" -ne 130 ] && [ "$restarts" -lt {restarts} ] || exit "$status"
  restarts=$((restarts + 1))
  echo "recjax: status $status, restart $restarts of {restarts}" >&2
done
"""


def whole(text: str) -> int:
    """argparse type: a positive whole number."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
    return int(text)
