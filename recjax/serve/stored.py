"""What every exported bundle holds: serialised functions and the weights they take; both are checked when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from recjax.core.errors import BundleError

WEIGHTS_FILE = "weights.safetensors"
REMAKE = "export the checkpoint again with this version of recjax"


def load_function(folder: Path, name: str, *, made_by: str) -> jax.export.Exported:
    """A function that jax `made_by` wrote; raises `BundleError` when it cannot be read or runs elsewhere only."""
    file = folder / name
    try:
        function = jax.export.deserialize(bytearray(file.read_bytes()))
        function.mlir_module()  # a newer jax writes operations that an older one knows nothing of
    except Exception as error:  # jax raises many kinds for bytes of another version
        here = jax.__version__
        raise BundleError(
            f"jax {here} cannot read a function made by jax {made_by}: {error}",
            where=str(file),
            mend=f"serve with jax {made_by} or up to six months newer, or export again with jax {here}",
        ) from error
    platform = jax.export.default_export_platform()
    if platform not in function.platforms:
        raise BundleError(
            f"the bundle does not run on {platform}",
            where=str(folder),
            expected=f"one of: {', '.join(function.platforms)}",
            mend="set JAX_PLATFORMS to one of these, or export again",
        )
    return function


def load_weights(folder: Path, wanted: dict[str, str]) -> dict[str, np.ndarray]:
    """The arrays by name, whose dtypes and shapes must be those `wanted`; raises `BundleError` where they are not."""
    file = folder / WEIGHTS_FILE
    try:
        weights = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"cannot read the weights: {error}", where=str(file), mend=REMAKE) from error
    found = shapes_of(weights)
    odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if odd:
        raise BundleError(f"weights do not fit the function: {', '.join(odd[:5])}", where=str(file), mend=REMAKE)
    return weights


def shapes_of(weights: dict[str, Any]) -> dict[str, str]:
    """Name -> dtype and shape, as the manifest records them."""
    return {name: f"{array.dtype} {list(array.shape)}" for name, array in weights.items()}
