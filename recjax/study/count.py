"""What a run costs and sees: parameters, targets, passes and FLOPs, counted rather than estimated.

N is counted twice, by the formula and from the parameters themselves; a recipe for which the two differ is refused,
because its law would be about something else. FLOPs of attention are for windows of `history_length`: rows hold
several windows, and no window looks into another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recjax.core import saved
from recjax.core.errors import ConfigError
from recjax.data.examples import Examples
from recjax.data.pipeline import BatchIterator, Feed, train_batches
from recjax.models.sequence import count_parameters
from recjax.recipe import Assembly, Recipe
from recjax.study.grid import Cell, Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """`parameters` N; `unique` U targets; FLOPs of one target; `steps` of the run."""

    parameters: int
    unique: int
    backbone: float
    total: float
    steps: int


def parameters(assembly: Assembly, size: Size) -> int:
    """N = 12 n d^2; raises `ConfigError` where the model has another number of weights."""
    found = count_parameters(assembly.abstract_params())["backbone"]
    if found != size.parameters:
        raise ConfigError(
            f"{size.name} has {found:,} weights in its blocks, and 12 n d^2 = {size.parameters:,}",
            where=f"{size.num_layers} layers of width {size.width}",
            expected="a feed-forward part of four times the width, ungated, and a key head for every head",
            mend="take mlp_width, num_kv_heads, head_dim and a gated ffn out of the recipe",
        )
    return found


def count(assembly: Assembly, cell: Cell) -> Count:
    """What the cell will take."""
    recipe = assembly.recipe
    batches = batches_of(recipe, assembly.examples)
    unique = sum(batches.unique_targets)
    model: Any = assembly.model.bind(assembly.abstract_params())
    flops = model.token_flops(recipe.feed.history_length)
    passes = cell.budget / (flops.total * unique) if cell.budget else cell.passes
    per_step = recipe.feed.batch_size * recipe.feed.row_length * batches.row_use
    return Count(
        parameters=parameters(assembly, cell.size),
        unique=unique,
        backbone=flops.backbone,
        total=flops.total,
        steps=max(1, math.ceil(passes * unique / per_step)),
    )


def batches_of(recipe: Recipe, examples: Sequence[Examples]) -> BatchIterator:
    """The training batches of a recipe, nothing read before they are asked for; `ConfigError` for one without users."""
    if not isinstance(recipe.feed, Feed):
        raise ConfigError(f"a study of {recipe.name}", expected="a recipe that is fed windows of users")
    return train_batches(examples, recipe.mixture.resolved, recipe.feed, seed=recipe.seed)


def targets_seen(recipe: Recipe, examples: Sequence[Examples], checkpoint: Path) -> int:
    """D: the targets that a run had been trained on at a checkpoint, repeated ones counted again."""
    batches = batches_of(recipe, examples)
    batches.set_state(saved.read(checkpoint).iterator["data"])
    return sum(batches.targets)
