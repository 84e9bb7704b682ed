"""From parameters and functions to the parts of a bundle: weights on the host, programs for several platforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import numpy as np

from recjax.core.errors import BundleError
from recjax.core.module import Params
from recjax.core.state import by_path

PLATFORMS = ("cpu", "cuda", "tpu")


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
