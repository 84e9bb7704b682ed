"""What a slice such as v6e:4x4 is called at Google's doors: Cloud TPU, Compute Engine, GKE and xpk.

Sources: docs.cloud.google.com/tpu/docs and /kubernetes-engine/docs/concepts/plan-tpus, read in November 2026. Hosts of
several-host slices have four chips each. Names with a number count TensorCores for v4, v5p and TPU7x, else chips.
"""

from __future__ import annotations

import dataclasses
import math
import re

from recjax.core.errors import ConfigError
from recjax.core.flags import did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A TPU: `accelerator` type (a prefix), `cores` it counts for a chip, GKE's `label`, `machine` type (a pattern).

    `runtime` is the image of the Cloud TPU API, "" where that has none; `devices` are those that jax shows of a chip;
    `single` are numbers of chips that one host can have.
    """

    accelerator: str
    label: str
    machine: str
    runtime: str
    cores: int = 1
    devices: int = 1
    single: tuple[int, ...] = (4,)


KINDS = {
    "v4": Kind(
        accelerator="v4", label="tpu-v4-podslice", machine="ct4p-hightpu-{}t", runtime="tpu-ubuntu2204-base", cores=2
    ),
    "v5e": Kind(
        accelerator="v5litepod",
        label="tpu-v5-lite-podslice",
        machine="ct5lp-hightpu-{}t",
        runtime="v2-alpha-tpuv5-lite",
        single=(1, 4, 8),
    ),
    "v5p": Kind(
        accelerator="v5p", label="tpu-v5p-slice", machine="ct5p-hightpu-{}t", runtime="v2-alpha-tpuv5", cores=2
    ),
    "v6e": Kind(
        accelerator="v6e",
        label="tpu-v6e-slice",
        machine="ct6e-standard-{}t",
        runtime="v2-alpha-tpuv6e",
        single=(1, 4, 8),
    ),
    "tpu7x": Kind(accelerator="tpu7x", label="tpu7x", machine="tpu7x-standard-{}t", runtime="", cores=2, devices=2),
}
_PER_HOST = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """A TPU slice of a `shape` such as "4x4x8", in chips."""

    name: str
    shape: str
    kind: Kind

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(int(n) for n in self.shape.split("x"))

    @property
    def chips_per_host(self) -> int:
        """Chips of one host, which is a pod of GKE and a process of jax."""
        return self.chips if self.chips in self.kind.single else _PER_HOST

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return self.chips // self.chips_per_host

    @property
    def devices(self) -> int:
        """Number of jax devices."""
        return self.chips * self.kind.devices

    @property
    def accelerator(self) -> str:
        """The accelerator type of Cloud TPU and xpk."""
        return f"{self.kind.accelerator}-{self.chips * self.kind.cores}"

    @property
    def machine(self) -> str:
        """The machine type of Compute Engine and GKE."""
        return self.kind.machine.format(self.chips_per_host)


def slice_of(name: str) -> Slice:
    """The slice "v6e:4x4"; raises `ConfigError` for a chip or a shape that there is not."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if found is None or found[1] not in KINDS:
        raise ConfigError(
            f"cannot read the slice {name!r}",
            where="--tpu",
            expected=f"one of {', '.join(KINDS)} and a shape in chips, such as v6e:4x4 or v5p:4x4x8",
            mend=did_you_mean(name.partition(":")[0], KINDS),
        )
    made = Slice(name=name, shape=found[2], kind=KINDS[found[1]])
    if made.chips % made.chips_per_host or made.chips < 1:
        expected = "4 chips for each host"
        raise ConfigError(f"{made.chips} chips are no number of hosts", where=f"--tpu {name}", expected=expected)
    return made
