"""The recipes of the stages of a run, and whether they can be trained, asked before the first of them is.

A stage reads its own gin file, then the further files and the bindings of the command line that concern it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from recjax import command
from recjax.core.config import Snapshot
from recjax.core.flags import Flags, find_file
from recjax.data.pipeline import Feed, check_whole
from recjax.prepare import ensure_prepared
from recjax.recipe import Recipe


def check_stages(files: Sequence[Path], flags: Flags, folder: Path, seed: int, cache: Path | None) -> None:
    """Configure every stage, then make the examples of those that need nothing of an earlier one.

    Raises `ConfigError` and what `prepare` raises. Whoever has a mistake in the last stage, or prompts that are too
    long for it, is told before hours are spent on the others.
    """
    recipes = [recipe_of_stage(file, files, flags, folder, seed)[0] for file in files]
    for recipe in recipes:
        if str(folder) in repr(recipe.mixture):
            continue
        examples = ensure_prepared(recipe.mixture, cache)
        if isinstance(recipe.feed, Feed):
            check_whole(examples[: len(recipe.mixture.tasks)], recipe.feed)


def recipe_of_stage(
    file: Path, files: Sequence[Path], flags: Flags, folder: Path, seed: int
) -> tuple[Recipe, Snapshot]:
    """The recipe of a stage, whose place is in `folder`."""
    bindings = (*bindings_for(file, files, flags), f"SEED={seed}")
    if "%STAGES" in _text(file, flags.search_paths):
        bindings += (f"STAGES={str(folder)!r}",)
    further = (str(file), *flags.gin_files)
    theirs = set().union(*(_macros(one, flags.search_paths) for one in files)) - _macros(file, flags.search_paths)
    told = dataclasses.replace(flags, gin_files=further, bindings=bindings, unused_macros=tuple(sorted(theirs)))
    return command.load(told)


def bindings_for(file: Path, files: Sequence[Path], flags: Flags) -> list[str]:
    """The bindings of the command line that concern a stage.

    A macro that other stages know and this one does not is theirs (in a further file it has no effect); SOURCE_DIR is
    for the stages that take it, and DATA_DIR then for all others.
    """
    further = [find_file(name, flags.search_paths) for name in flags.gin_files]
    macros = {path: set().union(*(_macros(one, flags.search_paths) for one in (path, *further))) for path in files}
    theirs = set().union(*macros.values()) - macros[file]
    if any("SOURCE_DIR" in known for known in macros.values()):
        theirs |= {"DATA_DIR"} if "SOURCE_DIR" in macros[file] else {"SOURCE_DIR"}
    return [binding for binding in flags.bindings if binding.partition("=")[0].strip() not in theirs]


def _macros(file: Path, search_paths: Sequence[str]) -> set[str]:
    """The macros that a gin file and what it includes set."""
    return set(re.findall(r"^([A-Z][A-Z0-9_]*)\s*=", _text(file, search_paths), re.MULTILINE))


def _text(file: Path, search_paths: Sequence[str]) -> str:
    """A gin file, and behind it what it includes."""
    text = file.read_text(encoding="utf-8")
    included = [find_file(name, search_paths) for name in re.findall(r"^include '([^']+)'", text, re.MULTILINE)]
    return "\n".join([text, *(_text(path, search_paths) for path in included)])
