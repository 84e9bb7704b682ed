"""Chips and topologies: those of the table exist, others are refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from recjax.core.errors import ConfigError, MeshError
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.launch import topology
from recjax.launch.chips import CHIPS
from recjax.launch.topology import describe


def test_a_chip_is_described_in_the_same_units() -> None:
    for chip in CHIPS.values():
        assert 10**13 < chip.peak < 10**16
        assert 2**34 <= chip.memory <= 2**38
        # memory is faster than the links to other chips, and these than the network between slices
        assert chip.memory_rate > chip.link_rate > 5 * chip.network_rate > 10**10


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5p:4*4", "v5p:4x4x4x4", ""])
def test_topologies_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        describe(name)
    assert "v5p:4x4x8" in caught.value.message


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="libtpu") as caught:
        describe("v5e:2x2")
    assert "recjax[tpu]" in caught.value.message


class Device:
    """As much of a jax device as placing it needs."""

    platform = "tpu"
    device_kind = "TPU v5 lite"

    def __init__(self, at: int, slice_index: int) -> None:
        self.id, self.slice_index, self.process_index = at, slice_index, slice_index
        self.coords, self.core_on_chip = (at % 2, at // 2 % 2, 0), 0


def test_the_replica_axis_counts_slices() -> None:
    from recjax.core.placement import placed

    devices: Any = [Device(at, at // 4) for at in (5, 0, 7, 2, 1, 4, 3, 6)]
    grid = placed(devices, (2, 4, 1))
    assert [[d.slice_index for d in row.flat] for row in grid] == [[0] * 4, [1] * 4]
    # neighbours in the mesh are neighbours on the links
    ring = [d.coords for d in grid[0].flat]
    assert all(sum(a != b for a, b in zip(x, y, strict=True)) == 1 for x, y in zip(ring, ring[1:], strict=False))
    with pytest.raises(MeshError, match="2 slices"):
        placed(devices, (1, 8, 1))


@pytest.mark.libtpu
class TestWithLibtpu:
    @pytest.mark.parametrize(
        "name, slices, chips, devices",
        [("v4:2x2x1", 1, 4, 4), ("v5e:1x1", 1, 1, 1), ("v5p:4x4x8", 1, 128, 128), ("tpu7x:2x2x1", 1, 4, 8)]
        + [("v6e:16x16", 2, 512, 512)],
    )
    def test_devices(self, name: str, slices: int, chips: int, devices: int) -> None:
        found = describe(name, slices)
        assert (found.chips, len(found.devices)) == (chips, devices)
        assert all(d.device_kind == found.chip.kind for d in found.devices)

    def test_a_shape_that_no_host_has(self) -> None:
        with pytest.raises(ConfigError, match="no slice v5e:2x3"):
            describe("v5e:2x3")

    def test_a_mesh_over_slices_holds_no_arrays(self) -> None:
        mesh = make_mesh(MeshConfig(shape="replica=2,data=-1"), list(describe("v5e:2x2", 2).devices))
        assert mesh.is_described and not make_mesh(MeshConfig()).is_described
        assert [d.slice_index for d in mesh.devices.devices[1].flat] == [1] * 4
