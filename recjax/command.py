"""What the verbs that work on a recipe have in common: their flags, and how a recipe is found and built.

A recipe comes from its name (`recjax train sasrec`; a `--gin_file` beside it is read after it), from `--gin_file`
alone, or, for verbs that take up a finished run, from the `config.gin` of its workdir. jax is set up here, before
anything asks for a device.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recjax.cli import ArgumentParser
from recjax.core import config, mirror
from recjax.core.errors import ConfigError
from recjax.core.flags import Flags, parse_argv, recipe_files
from recjax.core.remote import local_cache
from recjax.launch import cluster
from recjax.recipe import Recipe

CONFIG = "config.gin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A parsed command line: the recipe, the text it was built from, and the verb's own flags."""

    recipe: Recipe
    snapshot: config.Snapshot
    flags: Flags
    args: argparse.Namespace


def parser(verb: str) -> ArgumentParser:
    """A parser with the flags all of these verbs take."""
    out = ArgumentParser(verb)
    out.epilog = "gin flags: --gin_file=FILE, --gin.NAME=VALUE, --gin_search_paths=DIR"
    out.add_argument("recipe", nargs="?", default="", help="its name; a --gin_file beside it is read after it")
    out.add_argument("--workdir", type=Path, help="folder of the run, or its URL")
    out.add_argument("--cache", type=Path, help="where prepared examples are kept (default: RECJAX_CACHE)")
    return out


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Command:
    """Flags and recipe of one stage; raises `ConfigError` when it is not clear which."""
    flags = parse_argv(argv)
    args = parser.parse_args(list(flags.rest))
    if args.recipe:
        stages = recipe_files(args.recipe)
        if len(stages) > 1:
            names = ", ".join(f"{args.recipe}/{s.stem}" for s in stages)
            raise ConfigError(f"{args.recipe} has several stages", expected=f"one of {names}")
        flags = dataclasses.replace(flags, gin_files=(str(stages[0]), *flags.gin_files))
    if not flags.gin_files and args.workdir is not None:
        with mirror.local(args.workdir, error=ConfigError, cache=args.cache) as folder:
            written = folder / CONFIG
        if written.is_file():
            flags = dataclasses.replace(flags, gin_files=(str(written),))
    if not flags.gin_files:
        where = "" if args.workdir is None else f"no {CONFIG} in {args.workdir}"
        raise ConfigError("no recipe is given", where=where, mend=f"{parser.prog} NAME, or --gin_file=FILE")
    recipe, snapshot = load(flags)
    return Command(recipe=recipe, snapshot=snapshot, flags=flags, args=args)


def load(flags: Flags) -> tuple[Recipe, config.Snapshot]:
    """The recipe that gin files and bindings describe, and its text."""
    config.parse(flags)
    recipe: Any = config.build("recipe.Recipe")
    return recipe, config.snapshot()


def start_jax() -> None:
    """Keep compiled programs between runs, and join the other processes if there are any."""
    import jax

    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        folder = local_cache() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    cluster.initialize()
