"""What every exported bundle holds: serialised functions and the weights they take; both are checked when read.

Weights are in the format of safetensors (eight bytes with the length of a JSON header, the header, the arrays one after
the other), which is read here, so that a process with jax and numpy alone can load a bundle.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.export
import ml_dtypes
import numpy as np

from recjax.core.errors import BundleError

WEIGHTS_FILE = "weights.safetensors"
DTYPES: dict[str, Any] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
}
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
        weights = read_weights(file)
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read the weights: {error}", where=str(file), mend=REMAKE) from error
    found = shapes_of(weights)
    odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if odd:
        raise BundleError(f"weights do not fit the function: {', '.join(odd[:5])}", where=str(file), mend=REMAKE)
    return weights


def read_weights(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name; raises `ValueError` for anything that is not one."""
    data = np.fromfile(file, np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or start > len(data):
        raise ValueError(f"a header of {start - 8} bytes in a file of {len(data)}")
    try:
        header = json.loads(data[8:start].tobytes())
        found = {}
        for name, told in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, (first, end) = np.dtype(DTYPES[told["dtype"]]), told["shape"], told["data_offsets"]
            if not 0 <= first <= end <= len(data) - start or end - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has bytes {first} to {end}")
            found[name] = data[start + first : start + end].copy().view(dtype).reshape(shape)
        return found
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the header cannot be read: {error!r}") from error


def shapes_of(weights: dict[str, Any]) -> dict[str, str]:
    """Name -> dtype and shape, as the manifest records them."""
    return {name: f"{array.dtype} {list(array.shape)}" for name, array in weights.items()}
