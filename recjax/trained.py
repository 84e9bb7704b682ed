"""A finished run taken up again: its recipe joined with its examples, and the parameters of one checkpoint.

What export and infer start from. It only reads, and takes the same checkpoint as `recjax evaluate` when not told
which.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from recjax import command
from recjax.cli import ArgumentParser
from recjax.core import mirror, saved
from recjax.core.adapters import Adapted
from recjax.core.checkpoint import restore_params
from recjax.core.errors import CheckpointError, ConfigError
from recjax.core.module import Params
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe
from recjax.train import CHECKPOINTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """`params` lie where the mesh of the recipe puts them; `checkpoint` is the folder they come from."""

    assembly: Assembly
    params: Params
    step: int
    checkpoint: Path


def load(recipe: Recipe, workdir: Path, *, checkpoint: str = "", cache: Path | None = None) -> Trained:
    """The parameters of a checkpoint of `workdir`, a folder or a URL, adapters merged into them.

    `checkpoint` is a step, "newest", or "max:metric" ("min:metric") for the best by it; "" is the best by the metric
    of the recipe's checkpoints, or the newest where it names none. Raises `CheckpointError` when there is none that
    fits the recipe and its vocabulary.
    """
    assembly = Assembly(recipe, ensure_prepared(recipe.mixture, cache))
    kept = recipe.checkpoints
    chosen: Any = checkpoint or (f"{kept.mode}:{kept.metric}" if kept.metric else "newest")
    with mirror.local(workdir, error=CheckpointError, cache=cache) as at:
        params, record = restore_params(
            at / CHECKPOINTS,
            assembly.abstract_state().params,
            step=int(chosen) if chosen.isdigit() else chosen,
            vocabulary=assembly.vocabulary_hash,
        )
    folder = at / CHECKPOINTS / saved.name_of(record.step)
    if isinstance(assembly.model, Adapted):
        adapted, assembly = assembly.model, Assembly(dataclasses.replace(recipe, adapters=None), assembly.evaluated)
        places = assembly.mesh.shardings(assembly.model.axes)
        params = jax.jit(adapted.merge, out_shardings=places)(params)
    return Trained(assembly=assembly, params=assembly.with_facts(params), step=record.step, checkpoint=folder)


def parser(verb: str) -> ArgumentParser:
    """The flags of a verb that takes a checkpoint and writes a new folder."""
    flags = command.parser(verb)
    flags.add_argument(
        "--checkpoint",
        "--step",
        default="",
        help='a step, "newest", or "max:ndcg@10"; default: best by the recipe\'s metric',
    )
    flags.add_argument("--out", type=Path, required=True, help="the new folder; nothing is overwritten")
    return flags


def from_command_line(flags: ArgumentParser, argv: Sequence[str]) -> tuple[Trained, argparse.Namespace]:
    """The run that a command line names, and its other flags; raises `ConfigError` when it names none."""
    command.start_jax()
    given = command.parse(flags, argv)
    args = given.args
    if args.workdir is None:
        raise ConfigError("whose checkpoint?", expected="--workdir=DIR, the folder of a run")
    return load(given.recipe, args.workdir, checkpoint=args.checkpoint, cache=args.cache), args
