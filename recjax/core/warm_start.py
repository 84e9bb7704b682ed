"""Starting from the parameters of another model.

Parameters are matched by path, after renaming those of the checkpoint. Nothing is left out in silence: every
parameter that only one of the two has, and every other shape, is listed, and the start fails unless a pattern
allows it. The idea is that of big_vision's `merge_params`. Optimiser state and step are not taken over.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recjax.core import checkpoint, saved
from recjax.core.errors import CheckpointError, ConfigError
from recjax.core.module import Params
from recjax.core.saved import Record, Signature
from recjax.core.state import by_path, from_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Take the parameters (or their average) from the folder `checkpoints` of another run.

    With `stage`, `checkpoints` is the folder of all stages of a system and `stage` the one to take them from.
    `step` is a number, "newest" or "max:METRIC" / "min:METRIC". `rename` are (regular expression, replacement)
    pairs, applied one after another, as `re.sub` does, to the paths in the checkpoint. `allow` are regular
    expressions of paths that may be missing, unexpected or of another shape; such parameters of the model keep
    their fresh values. So do those that `fresh` names, whether or not the checkpoint has them, such as batch norms of
    other traffic. Of what `grow` names the checkpoint may have fewer entries along the first dimension, such as
    adapters of fewer domains: these come first, and the others keep their fresh values.

    `earlier` says that what the checkpoint was trained on must have ended before the training rows of this run begin;
    whoever knows of rows sees to it (`recipe.Assembly`).
    """

    checkpoints: str
    stage: str = ""
    step: int | str = "newest"
    rename: tuple[tuple[str, str], ...] = ()
    allow: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    grow: tuple[str, ...] = ()
    earlier: bool = False

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie."""
        return Path(self.checkpoints, self.stage, "checkpoints") if self.stage else Path(self.checkpoints)

    def __post_init__(self) -> None:
        for pattern, replacement in (*self.rename, *((p, "") for p in (*self.allow, *self.fresh, *self.grow))):
            try:
                re.sub(pattern, replacement, "")
            except re.error as error:
                raise ConfigError(
                    f"no regular expression, or no replacement for it: {pattern!r}", where=f"WarmStart: {error}"
                ) from error


class Taken(NamedTuple):
    """What a start took over: the parameters that were `copied`, those that kept their `fresh` values, and those `left`
    in the checkpoint, by the paths they have there."""

    copied: list[str]
    fresh: list[str]
    left: list[str]


def warm_start(config: WarmStart, params: Params) -> tuple[Params, Taken]:
    """`params` with the values of the checkpoint, and which those are.

    Every array keeps the dtype and the layout it has in `params`. Raises `CheckpointError` with all mismatches that
    are not allowed, and with all rules that rename nothing.
    """
    leaves = by_path(params)

    def read(path: Path, record: Record) -> tuple[Params, Taken]:
        stored = saved.params_of(record)
        source = {name: record.signature[at] for name, at in stored.items()}
        sources = match(source, saved.signature(params), config, where=str(path))
        wanted = {
            stored[name]: jax.ShapeDtypeStruct(source[name][1], leaves[p].dtype, sharding=leaves[p].sharding)
            for p, name in sources.items()
        }
        arrays = by_path(saved.load(path, saved.nested(wanted))) if wanted else {}
        values = leaves | {p: _grown(arrays[stored[name]], leaves[p]) for p, name in sources.items()}
        used = set(sources.values())
        taken = Taken(
            [*sources], [p for p in leaves if p not in sources], [name for name in source if name not in used]
        )
        return from_paths(params, values), taken

    return checkpoint.read_checkpoint(config.folder, config.step, read)


def _grown(found: jax.Array, fresh: jax.Array) -> jax.Array:
    """What was found, and behind it what is fresh beyond it."""
    if found.shape == fresh.shape:
        return found
    return jax.device_put(jnp.concatenate([found, fresh[found.shape[0] :]]), fresh.sharding)


def paths_in(config: WarmStart) -> list[str]:
    """The paths of the parameters in the checkpoint, before anything is renamed."""
    return checkpoint.read_checkpoint(config.folder, config.step, lambda path, record: list(saved.params_of(record)))


def match(source: Signature, target: Signature, config: WarmStart, where: str = "") -> dict[str, str]:
    """The path in the checkpoint for every path of the model that takes its value from there."""
    problems = []
    renamed: dict[str, str] = {}
    used = set()
    for original in source:
        name = original
        for pattern, replacement in config.rename:
            name, count = re.subn(pattern, replacement, name)
            if count:
                used.add(pattern)
        if name in renamed:
            problems.append(f"both {renamed[name]} and {original} would be named {name}")
        renamed[name] = original
    problems += [f"the rule {p!r} -> {r!r} renames nothing" for p, r in config.rename if p not in used]
    for what, patterns in (("fresh", config.fresh), ("grow", config.grow)):
        idle = [p for p in patterns if not any(re.search(p, path) for path in target)]
        problems += [f"{what} = {p!r} names nothing" for p in idle]

    def is_fresh(path: str) -> bool:
        return any(re.search(pattern, path) for pattern in config.fresh)

    def grows(path: str, there: tuple[int, ...], here: tuple[int, ...]) -> bool:
        longer = len(there) == len(here) > 0 and there[0] < here[0] and there[1:] == here[1:]
        return longer and any(re.search(pattern, path) for pattern in config.grow)

    def note(path: str, problem: str) -> None:
        if not any(re.search(pattern, path) for pattern in (*config.allow, *config.fresh)):
            problems.append(problem)

    matched = {}
    for path, form in target.items():
        if is_fresh(path):
            continue
        if path not in renamed:
            note(path, f"missing from the checkpoint: {path} {saved.form(form)}")
        elif (there := source[renamed[path]])[1] != form[1] and not grows(path, there[1], form[1]):
            note(path, f"different: {path} is {saved.form(there)} in the checkpoint and {saved.form(form)} here")
        else:
            matched[path] = renamed[path]
    for path, original in renamed.items():
        if path not in target:
            was = "" if path == original else f" (there {original})"
            note(path, f"unexpected in the checkpoint: {path} {saved.form(source[original])}{was}")
    if problems:
        raise CheckpointError(
            "cannot warm start from this checkpoint:\n    " + "\n    ".join(problems),
            where=where or config.checkpoints,
            mend="add WarmStart.rename rules, or WarmStart.allow patterns for what may differ",
        )
    return matched
