"""What every exported bundle holds: a manifest, serialised functions and the weights they take, checked when read.

`recjax.serve.kinds` knows which kinds of bundles there are. Weights are in the format of safetensors (eight bytes with
the length of a JSON header, the header, the arrays one after the other), which is read here, so that a process with jax
and numpy alone can load a bundle.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.export
import ml_dtypes
import numpy as np

from recjax.core.errors import BundleError, DataError
from recjax.core.folder import Manifest, check_files, hash_of, read_manifest
from recjax.data.text import Tokenizer, load_text

FORMAT = 1
WEIGHTS_FILE = "weights.safetensors"
TEXT_FILE = "text.model"
DTYPES: dict[str, Any] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
}
REMAKE = "export the checkpoint again with this version of recjax"


class Stored:
    """A loaded bundle of any kind on the default device."""

    kind: ClassVar[str] = ""  # of its manifest; bundles that recommend or search have none

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        """Read and check what is at `path`; raises `BundleError`. `verify=False` leaves out the checksums."""
        self.path = Path(path)
        self.manifest: Manifest = manifest_of(self.path)
        if (found := self.manifest.get("kind", "")) != self.kind:
            raise BundleError(
                f"this is a bundle {_described(found)}",
                where=str(self.path),
                expected=f"one {_described(self.kind)}",
                mend="serve it with recjax serve, which knows all kinds",
            )
        check_files(self.path, self.manifest, verify=verify, error=BundleError)
        self.name: str = self.manifest["name"]

    @property
    def origin(self) -> dict[str, Any]:
        """What an answer says of whose it is."""
        return {"model": self.name, "step": self.manifest["step"]}

    def facts(self) -> dict[str, Any]:
        """What is said of it to callers."""
        told = {name: self.manifest[name] for name in ("name", "recipe", "step", "created")}
        return {**told, "recommends": False, "searches": False, "max_k": 0, "facets": {}, "sample_users": 0}

    def load_call(self, file: str) -> Callable[..., Any]:
        """The function in `file`, compiled when it is called."""
        return jax.jit(load_function(self.path, file, made_by=self.manifest["jax_version"]).call)

    def load_weights(self) -> dict[str, jax.Array]:
        """What the functions take as their first argument."""
        return jax.device_put(load_weights(self.path, self.manifest["weights"]))

    def load_tokenizer(self) -> Tokenizer:
        """The vocabulary of texts that the weights were trained with."""
        told, file = self.manifest["text"], self.path / TEXT_FILE
        try:
            found = load_text(file, told["size"])
            found.encode("")  # which reads the model
        except (OSError, DataError) as error:
            raise BundleError(f"cannot read the tokenizer: {error}", where=str(file), mend=REMAKE) from error
        check_hash("the tokenizer", found.hash, told["hash"], where=file)
        return found

    def check_schema(self, schema: dict[str, Any]) -> None:
        """Raises `BundleError` where the functions were made for other arguments than the code here gives them."""
        found = self.manifest["schema"]
        if found == schema and self.manifest["schema_hash"] == hash_of(schema):
            return
        made, here = (
            {part: told.get(part) for part in ("features", "arguments") if part in schema} for told in (found, schema)
        )
        raise BundleError(
            f"the bundle was made for other feature code: {made}", where=str(self.path), expected=str(here), mend=REMAKE
        )


def manifest_of(path: Path) -> Manifest:
    """The manifest of a bundle of any kind; raises `BundleError`."""
    return read_manifest(path, format_version=FORMAT, what="bundle", error=BundleError)


def check_hash(what: str, found: str, wanted: str, *, where: Path) -> None:
    """Raises `BundleError` for a part that is not the one the weights were trained with."""
    if found != wanted:
        raise BundleError(
            f"{what} has hash {found}", where=str(where), expected=f"{wanted}, {what} of the weights", mend=REMAKE
        )


def _described(kind: str) -> str:
    return f"of the kind {kind!r}" if kind else "that recommends or searches"


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
