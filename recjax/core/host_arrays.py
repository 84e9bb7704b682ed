"""Arrays of the host in checkpoints: written one after the other, as they lie, and not copied first.

orbax copies every numpy array before it writes, so that the caller may change it, and writes all at once: three times
the memory of a model. What a converter hands over lies in files and is not changed; so it is read as it is written,
and no more than one array is on its way. Arrays of devices are written as orbax does it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import type_handlers


class HostArrays(type_handlers.NumpyHandler):
    """Writes numpy arrays without copies, each when the one before it is written."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def _background_serialize(self, *args: Any, **kwargs: Any) -> None:
        self._turn = asyncio.Lock()  # of the event loop of this save
        await super()._background_serialize(*args, **kwargs)

    async def _open_and_write(self, *args: Any, **kwargs: Any) -> None:
        async with self._turn:
            await super()._open_and_write(*args, **kwargs)


def handlers() -> Any:
    """How each kind of leaf is written: a registry of orbax, whose type cannot be checked at run time."""
    return type_handlers.create_type_handler_registry(
        (np.ndarray, HostArrays()),
        (jax.Array, type_handlers.ArrayHandler()),
        *((kind, type_handlers.ScalarHandler()) for kind in (int, float, np.number)),
    )
