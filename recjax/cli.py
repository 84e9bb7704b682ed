"""The `recjax` command: finds the verb, imports it only then, and turns mistakes into one message and status 2.

A verb is a module `recjax.VERB` with `main(argv) -> status`, which ends in

    if __name__ == "__main__":
        sys.exit(cli.run(main))

so that `recjax VERB` and `python -m recjax.VERB` are the same. Nothing here imports jax.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from recjax.core.errors import TRY_AGAIN, ClusterError, ConfigError, RecjaxError
from recjax.core.flags import did_you_mean, take_cluster

VERBS = {
    "list": "recipes with paper, data, cost, expected and measured result",
    "prepare": "build the examples of a recipe's tasks, or check a data directory",
    "train": "train a stage of a recipe; resumes by itself",
    "evaluate": "score a checkpoint: metrics.json",
    "infer": "run a checkpoint over a task and write an artifact",
    "export": "write a bundle for serving",
    "serve": "answer requests over HTTP from bundles",
    "compile": "compile the train step for a TPU topology without owning it: memory, FLOPs, collectives",
    "convert": "language models of Hugging Face or T5X into our checkpoints, and ours into Hugging Face's",
    "embed": "vectors of the items of a data directory, by a sentence encoder such as MiniLM",
    "run": "all stages of a recipe in order, then a report: measured beside published",
    "launch": "start a verb as several processes here, or say what starts it on TPU VMs, GKE, SLURM or Ray",
    "study": "scaling studies: grid of runs, laws, a larger model foretold, trained and compared",
}
_HELP = """usage: recjax VERB [--help] [options]

{verbs}

Recipes:    --gin_file=configs/recipe/<name>/<n>_<stage>.gin, settings --gin.NAME=VALUE
Everywhere: --debug shows the traceback behind a message; recjax --version
            --coordinator=HOST:PORT --processes=N --process=I is one of several (schedulers are recognised)
"""

Main = Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """The `recjax` command; returns the exit status."""
    # `python -m` finds the modules of the current folder, which a recipe may import; so does this command.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    return run(_main, argv)


def run(main: Main, argv: Sequence[str] | None = None) -> int:
    """Call `main` with the arguments, `--debug` and the place among several processes taken out, and return its status.

    A mistake of the user is a message on stderr and status 2, an interruption is status 130 (`core.errors` lists all);
    any other exception is a fault of the program and passes through.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        words, told = take_cluster([word for word in words if word != "--debug"])
        os.environ.update(told)
        status = main(words)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        _complain("interrupted", debug)
        return 130
    except RecjaxError as error:
        _complain(error.message, debug)
        return TRY_AGAIN if isinstance(error, ClusterError) else 2
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        _complain(f"{error.strerror}\n  where:    {error.filename or 'the disk being written to'}", debug)
        return 2


class ArgumentParser(argparse.ArgumentParser):
    """argparse for a verb: no abbreviations, and a mistake is a `ConfigError` with the nearest flag."""

    def __init__(self, verb: str, description: str | None = None) -> None:
        super().__init__(
            prog=f"recjax {verb}",
            description=description or VERBS.get(verb),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        options, unknown = self.parse_known_args(args)
        if unknown:
            word = unknown[0].partition("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            near = did_you_mean(word, known) if word.startswith("-") else ""
            raise ConfigError(
                f"{'no flag' if word.startswith('-') else 'unexpected'} {word}",
                where=self.prog,
                mend=near or f"`{self.prog} --help` shows the flags",
            )
        return options

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where=self.prog, mend=f"`{self.prog} --help` shows the flags")


def _main(argv: list[str]) -> int:
    verb, *rest = argv or ["--help"]
    if verb in ("--help", "-h", "help"):
        print(_HELP.format(verbs="\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())), end="")
        return 0
    if verb == "--version":
        from recjax import __version__

        print(f"recjax {__version__}")
        return 0
    if verb not in VERBS:
        raise ConfigError(f"no verb {verb}", expected=", ".join(VERBS), mend=did_you_mean(verb, VERBS))
    return importlib.import_module(f"recjax.{verb}").main(rest)


def _complain(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    mark = "\x1b[1;31mrecjax:\x1b[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else "recjax:"
    print(f"{mark} {message}", file=sys.stderr)
