"""Devices of a TPU slice that nobody has to own: enough of them to compile for.

`libtpu`, from the package index, holds the compiler for every TPU; it needs no TPU to describe a slice of any shape.
The devices found here can be put in a mesh and compiled for. They hold no arrays.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

from recjax.core.errors import ConfigError
from recjax.launch.chips import Chip, chip

# libtpu asks a metadata server for the machine that it runs on, and says so when there is none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at the same time
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """`slices` equal slices of a shape such as "4x4x8"; `devices` are jax devices to compile for."""

    name: str
    chip: Chip
    slices: int
    devices: tuple[Any, ...]

    @property
    def chips(self) -> int:
        """Number of chips of all slices."""
        return len(self.devices) // self.chip.devices_per_chip

    def __str__(self) -> str:
        return f"{self.slices} x {self.name}" if self.slices > 1 else self.name


def describe(name: str, slices: int = 1) -> Topology:
    """The topology `name`, such as "v5p:4x4x8", so many times.

    Raises `ConfigError` when the chip or the shape does not exist and when libtpu is not installed. Devices of other
    platforms are left alone, so it goes together with jax on a CPU.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){0,2})", name)
    if found is None or slices < 1:
        raise ConfigError(
            f"cannot read the topology {name!r}" + (f", {slices} slices" if slices < 1 else ""),
            where="--topology, --slices",
            expected="a chip and a shape in chips, as in v5p:4x4x8 or v6e:16x16, and at least one slice",
        )
    kind = chip(found[1])
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "libtpu, which holds the compiler for TPUs, is not installed",
            where=f"--topology {name}",
            mend="pip install 'recjax[tpu]'; it needs no TPU",
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    shape = [int(n) for n in found[2].split("x")]
    options: dict[str, Any] = dict(kind.options)
    if slices > 1:
        options["num_slices"] = slices
    if min(shape[:2]) < 2:  # a part of one host
        options["chips_per_host_bounds"] = (*shape, 1, 1)[:3]
    try:
        devices = topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
    except Exception as error:  # what libtpu raises has no class of its own
        raise ConfigError(
            f"there is no slice {name}",
            where="--topology",
            expected="a shape that Google offers, such as 2x2, 4x4, 16x16 (v5e, v6e) or 2x2x1, 4x4x8 (v4, v5p, tpu7x)",
            mend=str(error).splitlines()[0],
        ) from error
    return Topology(name=name, chip=kind, slices=slices, devices=tuple(devices))
