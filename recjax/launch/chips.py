"""The TPU chips that recipes are compiled for, as Google states them.

Sources: docs.cloud.google.com/tpu/docs, pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x", read in November
2026. Bandwidth between chips is stated for both directions together; half of it is what a chip can send. The network
between slices is stated for a whole pod of v5e (6.4 Tb/s for 256 chips); for v4 it is not stated, and that of v5p is
taken. jax shows a TPU7x chip as two devices, which share all of it. Peaks of arithmetic are in `recjax.core.flops`.
"""

from __future__ import annotations

import dataclasses

from recjax.core import flops
from recjax.core.errors import ConfigError
from recjax.core.flags import did_you_mean

GIB, GB = 2**30, 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One jax device of a kind of TPU.

    `memory` in bytes; `memory_rate`, `link_rate` (sent to other chips of the slice, all links together) and
    `network_rate` (sent to other slices) in bytes per second. `kind` is the `device_kind` of jax. `options` are what
    `get_topology_desc` has to be told.
    """

    name: str
    kind: str
    memory: float
    memory_rate: float
    link_rate: float
    network_rate: float
    devices_per_chip: int = 1
    options: tuple[tuple[str, str], ...] = ()

    @property
    def peak(self) -> float:
        """Dense bfloat16 products, FLOP/s."""
        found = flops.peak(self.kind)
        assert found is not None, self.kind
        return found


def _chip(name: str, kind: str, gib: int, gb_s: int, both_gb_s: int, network_gbit: float, devices: int = 1, **options):
    return Chip(
        name=name,
        kind=kind,
        memory=gib * GIB / devices,
        memory_rate=gb_s * GB / devices,
        link_rate=both_gb_s * GB / 2 / devices,
        network_rate=network_gbit * GB / 8 / devices,
        devices_per_chip=devices,
        options=tuple(options.items()),
    )


CHIPS = {
    chip.name: chip
    for chip in (
        # Both cores of a v4 chip as one device, as on Cloud TPU.
        _chip("v4", "TPU v4", 32, 1200, 600, 50, chip_config_name="megacore"),
        _chip("v5e", "TPU v5 lite", 16, 819, 400, 25),
        _chip("v5p", "TPU v5", 95, 2765, 1200, 50),
        _chip("v6e", "TPU v6 lite", 32, 1638, 800, 100),
        _chip("tpu7x", "TPU7x", 192, 7380, 1200, 100, devices=2),
    )
}


def chip(name: str) -> Chip:
    """The chip of that name; raises `ConfigError` for one that is not in the table."""
    if name not in CHIPS:
        raise ConfigError(
            f"no TPU {name!r}",
            where="--topology",
            expected=f"one of {', '.join(CHIPS)} and a shape, as in v5p:4x4x8",
            mend=did_you_mean(name, CHIPS),
        )
    return CHIPS[name]
