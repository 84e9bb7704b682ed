"""Which device stands where in a mesh.

The order of `jax.devices()` says little about which TPU chips are neighbours. Within a slice, devices are placed so
that the axes of a mesh run along the links between chips; over several slices, the axis `replica` counts the slices,
and nothing else crosses the slower network between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from recjax.core.errors import MeshError


def placed(devices: Sequence[Any], sizes: Sequence[int], *, where: str = "") -> np.ndarray:
    """`devices` as an array of `sizes`, the first of which is the axis `replica`.

    Raises `MeshError` where one of the other axes would cross from slice to slice.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.asarray(devices, dtype=object).reshape(sizes)
    if sizes[0] % slices:
        raise MeshError(
            f"{slices} slices cannot share a replica axis of {sizes[0]}",
            where=where,
            expected=f"replica = {slices}, or a multiple of it",
            mend=f'MESH = "replica={slices},data=-1"',
        )
    inside = (sizes[0] // slices, *sizes[1:])
    if slices == 1:
        return mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    between = (slices, *(1 for _ in sizes[1:]))
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)
