"""From parameters and functions to a bundle: weights on the host, programs for several platforms, a folder with both.

Every kind of bundle is made here. It brings its programs and its other files, and says on which inputs the new bundle,
loaded as a server would, is compared with the model before it takes its place. Weights lie beside the programs, so that
they can be inspected and are not part of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np
from safetensors.numpy import save_file

from recjax import export_onnx
from recjax.core.errors import BundleError
from recjax.core.folder import new_folder, write_manifest
from recjax.core.module import Params
from recjax.core.state import by_path
from recjax.serve.stored import FORMAT, WEIGHTS_FILE, Stored, shapes_of

PLATFORMS = ("cpu", "cuda", "tpu")


class Program(NamedTuple):
    """A function of weights by path and of `inputs`, of which the shapes are told.

    `names` are those of inputs that are arrays; others are dicts of arrays. A shortcut answers what another program
    does, in fewer operations, and is not written as ONNX.
    """

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    names: tuple[str, ...] = ()
    is_shortcut: bool = False


def freeze(
    kind: type[Stored],
    out: str | os.PathLike[str],
    weights: dict[str, np.ndarray],
    programs: Mapping[str, Program],
    *,
    write: Callable[[Path], Mapping[str, Any]],
    pairs: Callable[[Any], Iterable[tuple[Any, Any]]],
    tolerance: float,
    name: str = "model",
    recipe: str = "",
    step: int = 0,
    checkpoint: str = "",
    platforms: Sequence[str] = PLATFORMS,
    onnx: bool = False,
) -> Path:
    """Write a bundle of a `kind` at `out` and return its path.

    `programs` are named by the files they go into. `write` adds the other files to the folder and returns what the
    manifest says of them; of the loaded bundle `pairs` gives arrays that it answered with and those of the model, which
    must be equal to `tolerance` (of the largest, where that is above 1). `recipe`, `step` and `checkpoint` are kept in
    the manifest. The programs are lowered for every one of `platforms` that allows it; the one this process runs on
    must. With `onnx` they are written as that, too (`export_onnx.py`). Raises `BundleError` when `out` exists or cannot
    be written, and when the bundle does not answer as the model.
    """
    if jax.process_count() > 1:
        raise BundleError("export runs in one process", where=f"{jax.process_count()} processes")
    if not name:
        raise BundleError("a bundle needs a name", where="name = ''")
    if onnx:
        export_onnx.check_available()
    with new_folder(out, error=BundleError) as folder:
        lowered, refused = _lower_all(programs, weights, tuple(platforms))
        for file, function in lowered.items():
            (folder / file).write_bytes(function.serialize())
            program = programs[file]
            if onnx and not program.is_shortcut:
                model = export_onnx.translated(program.function, weights, program.inputs, program.names)
                (folder / file).with_suffix(export_onnx.SUFFIX).write_bytes(model)
        save_file(weights, folder / WEIGHTS_FILE)
        # safetensors lets nobody else read what it wrote.
        shutil.copymode(folder / next(iter(programs)), folder / WEIGHTS_FILE)
        facts, last = write(folder), [*lowered.values()][-1]
        write_manifest(
            folder,
            {
                "format": FORMAT,
                **({"kind": kind.kind} if kind.kind else {}),
                "name": name,
                "recipe": recipe,
                "step": step,
                "checkpoint": checkpoint,
                **facts,
                "weights": shapes_of(weights),
                "jax_version": jax.__version__,
                "calling_convention": last.calling_convention_version,
                "platforms": list(last.platforms),
                "platforms_refused": refused,
            },
        )
        for found, expected in pairs(kind(folder, verify=False)):
            _check_same(np.asarray(found), np.asarray(expected), tolerance, folder)
    return Path(out)


def host_weights(params: Params) -> dict[str, np.ndarray]:
    """The arrays by path, such as "transformer/blocks/ffn/up"; raises `BundleError` for one that is not finite."""
    weights = {name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in by_path(params).items()}
    for name, array in weights.items():
        if not np.isfinite(array.astype(np.float32)).all():
            raise BundleError(
                "a parameter holds values that are not finite", where=name, mend="export an earlier checkpoint"
            )
    return weights


def shapes(weights: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    """What a program is told of its weights."""
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}


def _lower_all(
    programs: Mapping[str, Program], weights: dict[str, np.ndarray], platforms: tuple[str, ...]
) -> tuple[dict[str, jax.export.Exported], dict[str, str]]:
    """The exported functions, the last of them for platforms that allow all, and why others refused."""
    lowered, refused = {}, {}
    for file, program in programs.items():
        lowered[file], why = lower(program.function, (shapes(weights), *program.inputs), platforms)
        platforms, refused = tuple(lowered[file].platforms), {**refused, **why}
    return lowered, refused


def _check_same(found: np.ndarray, expected: np.ndarray, tolerance: float, folder: Path) -> None:
    """-inf, where there is no answer, must stand in the same places."""
    finite = np.isfinite(expected)
    allowed = tolerance * max(1.0, float(np.abs(expected[finite]).max(initial=0)))
    if not np.allclose(found, expected, rtol=0, atol=allowed):
        apart = float(np.abs(found - np.where(finite, expected, 0)).max(where=finite, initial=0))
        raise BundleError(
            f"the bundle answers differently from the model, by {apart:.1e}",
            where=str(folder),
            expected=f"answers equal to {allowed:.1e}",
            mend="this is a bug in recjax or jax; please report it with the recipe",
        )


def lower(
    function: Any, arguments: tuple[Any, ...], platforms: tuple[str, ...]
) -> tuple[jax.export.Exported, dict[str, str]]:
    """The exported function and, for each platform that it could not be lowered for, why: never this process's own."""

    def attempt(targets: Sequence[str]) -> jax.export.Exported:
        return jax.export.export(jax.jit(function), platforms=tuple(targets))(*arguments)

    here = jax.export.default_export_platform()
    wanted = list(dict.fromkeys((here, *platforms)))
    try:
        return attempt(wanted), {}
    except Exception:  # a platform may refuse a kernel in any way; find out which one does
        found, refused = attempt([here]), {}
    for platform in wanted[1:]:
        try:
            found = attempt([*found.platforms, platform])
        except Exception as error:
            refused[platform] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return found, refused
