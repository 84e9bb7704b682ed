"""Where kernels of other libraries may run: on the device that they are for, or not at all.

A kernel is asked for by name in a config. What would quietly be computed in another way, by us or by the library, is
refused instead, with what to ask for.
"""

from __future__ import annotations

import importlib
from typing import Any

from recjax.core.errors import ConfigError
from recjax.core.sharding import platform

# tokamax's own kernels by device; asked for none, it would fall back to what XLA makes of the formula.
_OWN = {"gpu": ("mosaic", "triton"), "tpu": ("mosaic",)}


def check_device(kernel: str, known: tuple[str, ...], *, where: str, instead: str) -> str:
    """The device that the code being traced is for; raises `ConfigError` unless the kernel is for it."""
    if (here := platform()) not in known:
        raise ConfigError(
            f"{kernel} does not run on {here}",
            where=f"{where}.kernel = {kernel!r}",
            expected=f"one of {known}",
            mend=f"kernel = {instead!r}",
        )
    return here


def tokamax(*, where: str, instead: str) -> tuple[Any, tuple[str, ...]]:
    """The library, and the names of the kernels that it has for the device.

    Raises `ConfigError` where it is not installed, and on a CPU.
    """
    here = check_device("tokamax", tuple(_OWN), where=where, instead=instead)
    try:
        return importlib.import_module("tokamax"), _OWN[here]
    except ImportError:
        raise ConfigError(
            "the library tokamax is not installed",
            where=f"{where}.kernel = 'tokamax'",
            mend=f"pip install tokamax, or kernel = {instead!r}",
        ) from None
