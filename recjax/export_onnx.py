"""A bundle's programs as ONNX as well, for servers that run nothing else: `recjax export --onnx`. So far rankers.

Beside `rank.jaxexport` lies `rank.onnx`, the same function with its weights inside, for any number of rows. Inputs are
called as in the schema of the manifest, outputs come in its order. onnxruntime runs it before the bundle takes its
place, and must answer as the model does. What jax2onnx cannot translate is refused with its reason, as are, in version
0.17.1, searches of a catalogue for any number of prompts and seen items.

jax2onnx asks for an older orbax than recjax does, and works with this one. So it is installed by itself, in an
environment of its own: pip install 'recjax[onnx]', then pip install --no-deps 'jax2onnx==0.17.1'.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from recjax.core.errors import BundleError

SUFFIX = ".onnx"
TOLERANCE = 1e-5
_NEEDED = ("jax2onnx", "onnxruntime")
_SIZES = {"b": 3, "n": 2}  # of dimensions of any size, in a comparison
_ROWS = 3  # the first of every table: of padding, of what is unknown, and of something known


def check_available() -> None:
    """Raises `BundleError` where jax2onnx or onnxruntime is not installed; imports neither."""
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise BundleError(
            f"ONNX needs {' and '.join(missing)}",
            expected="an environment with both",
            mend="pip install 'recjax[onnx]', then pip install --no-deps 'jax2onnx==0.17.1'",
        )


def translated(
    function: Callable[..., Any], weights: dict[str, np.ndarray], inputs: tuple[Any, ...], names: Sequence[str]
) -> bytes:
    """`function(weights, *inputs)` as an ONNX model of the inputs alone.

    `inputs` are arrays, called `names`, or dicts of arrays that are called by their keys, as `jax.export` is told of
    them. Raises `BundleError` where an operation has no translation, or onnxruntime does not answer as jax does.
    """
    from jax2onnx import to_onnx

    leaves, tree = jax.tree.flatten(inputs)
    held = {name: jax.numpy.asarray(array) for name, array in weights.items()}
    paths: list[Any] = [path for path, _ in jax.tree.leaves_with_path(inputs)]
    called: list[str] = [path[-1].key if len(path) > 1 else names[int(path[0].idx)] for path in paths]

    def alone(*given: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.leaves(function(held, *jax.tree.unflatten(tree, given))))

    sizes = [tuple(n if isinstance(n, int) else str(n) for n in leaf.shape) for leaf in leaves]
    told = [jax.ShapeDtypeStruct(size, leaf.dtype) for size, leaf in zip(sizes, leaves, strict=True)]
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of types of 64 bits, which it asks for on its way
            model = to_onnx(alone, told, input_names=called).SerializeToString()
    except Exception as error:  # of any kind, where it does not know an operation
        raise BundleError(
            f"jax2onnx cannot translate this model: {type(error).__name__}: {str(error)[:200]}",
            mend="export it without --onnx",
        ) from error
    _compare(model, alone, dict(zip(called, told, strict=True)))
    return model


def _compare(model: bytes, function: Callable[..., Any], inputs: dict[str, Any]) -> None:
    """Hold the numbers of onnxruntime to those of jax, for inputs drawn at random."""
    import onnxruntime

    rng, given = np.random.default_rng(0), {}
    for name, told in inputs.items():
        size = [_SIZES[n] if isinstance(n, str) else n for n in told.shape]
        kind = np.dtype(told.dtype).kind
        drawn = rng.normal(size=size) if kind == "f" else rng.integers(0, 2 if kind == "b" else _ROWS, size)
        given[name] = drawn.astype(told.dtype)
    expected = jax.jit(function)(*given.values())
    try:
        found = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, given)
    except Exception as error:  # which has no class in common
        what = f"onnxruntime cannot run this model: {str(error)[:200]}"
        raise BundleError(what, mend="export it without --onnx") from error
    for ours, theirs in zip(expected, found, strict=True):
        # Rows may change places among equal scores, but the scores may not.
        if ours.dtype.kind == "f" and not np.allclose(theirs, ours, rtol=TOLERANCE, atol=TOLERANCE):
            raise BundleError(
                "onnxruntime answers otherwise than the model",
                expected=f"numbers equal to {TOLERANCE}",
                mend="this is a bug in jax2onnx, onnxruntime or recjax; please report it with the recipe",
            )
