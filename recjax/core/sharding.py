"""Meshes, logical axis names and the presets that map one to the other.

Every parameter and activation names its dimensions with a few logical names; a preset says which mesh axes each
name is split over. The rest of the code never spells a mesh axis, apart from the `shard_map` islands (table lookup,
catalogue softmax, catalogue top-k), which ask `Mesh.axes_of`.

Axis letters used in shapes everywhere: b batch row, l position in a row, t text token, d width, h heads, k head
width, f MLP width, e experts, v catalogue rows, n negatives, m tasks or domains, s fields, r rank.

Logical names: batch, length, items, item_width (the columns of a table), pieces, embed, mlp, heads, head_dim, experts,
expert_embed (the width of an expert's weights), layers, and None for a dimension never split.
Mesh axes: `replica` (slices), `data`, `expert` (a part of the batch and of the experts), `model`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from recjax.core.errors import MeshError
from recjax.core.placement import placed

AXES = ("replica", "data", "expert", "model")
BATCH_AXES = ("replica", "data", "expert")

Rules = dict[str, tuple[str, ...]]

# Where items are many, a table is split by rows: its lookups and its softmax are shard_map islands that move
# activations, so no step gathers a table. Under "fsdp" the rows lie over the data axis, which holds the batch as well,
# and every hidden vector of that axis travels. Where rows are few and tokens many, as in a language model, "fsdp_text"
# splits a table by columns instead, which a softmax gathers: vectors stay on their devices. Experts have an
# axis of their own, on which all other parameters lie as on the data axis; without one they lie on the data axis
# (`_without_expert_axis`). They never move either.
_FSDP = ("data", "expert")
PRESETS: dict[str, Rules] = {
    "data": {"batch": BATCH_AXES, "experts": ("expert",)},
    "fsdp": {
        "batch": BATCH_AXES,
        "items": _FSDP,
        "pieces": _FSDP,
        "embed": _FSDP,
        "experts": ("expert",),
        "expert_embed": ("data",),
    },
    "fsdp_model": {
        "batch": BATCH_AXES,
        "items": (*_FSDP, "model"),
        "pieces": (*_FSDP, "model"),
        "embed": _FSDP,
        "mlp": ("model",),
        "heads": ("model",),
        "experts": ("expert",),
        "expert_embed": ("data",),
    },
    "fsdp_text": {
        "batch": BATCH_AXES,
        "items": ("model",),
        "item_width": _FSDP,
        "pieces": ("model",),
        "embed": _FSDP,
        "mlp": ("model",),
        "heads": ("model",),
        "experts": ("expert",),
        "expert_embed": ("data",),
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """`shape` such as "data=4,model=2" (-1 takes what is left, unnamed axes are 1) and a preset of `PRESETS`."""

    shape: str = "data=-1"
    preset: str = "data"


class Mesh:
    """A device mesh together with the rules of its preset."""

    def __init__(self, devices: jax.sharding.Mesh, rules: Rules) -> None:
        self.devices, self.rules = devices, rules

    def axes_of(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes of size above one that the logical dimension `name` is split over."""
        return tuple(a for a in self.rules.get(name or "", ()) if self.devices.shape[a] > 1)

    def size_of(self, name: str | None) -> int:
        """Number of parts the logical dimension `name` is split into."""
        return math.prod(self.devices.shape[a] for a in self.axes_of(name))

    def spec(self, names: tuple[str | None, ...]) -> PartitionSpec:
        """Partition of an array whose dimensions have these logical names; two may not share a mesh axis."""
        used: set[str] = set()
        parts = []
        for name in names:
            axes = self.axes_of(name)
            if used & set(axes):
                raise MeshError(f"two dimensions of {names} are split over the same mesh axis", where=str(axes))
            used |= set(axes)
            parts.append(axes if len(axes) > 1 else axes[0] if axes else None)
        return PartitionSpec(*parts)

    def sharding(self, names: tuple[str | None, ...] = ()) -> NamedSharding:
        """`spec` as a sharding on the devices; no names means replicated."""
        return NamedSharding(self.devices, self.spec(names))

    def shardings(self, axes_tree: Any) -> Any:
        """Shardings for a tree whose leaves are tuples of logical names."""
        return jax.tree.map(self.sharding, axes_tree, is_leaf=lambda x: isinstance(x, tuple))

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global arrays from this process's rows of a batch; the first dimension is split over `batch`."""
        sharding = self.sharding(("batch",))
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

    @property
    def is_described(self) -> bool:
        """Whether the devices are only described, to compile for: they run nothing and hold no arrays."""
        return getattr(self.devices.devices.flat[0].client, "runtime_type", "") == "compile_only_runtime"

    def put(self, value: np.ndarray, names: tuple[str | None, ...] = ()) -> Any:
        """An array that all processes have, laid out by its logical names; its shape where devices are described."""
        sharding = self.sharding(names)
        if self.is_described:
            return jax.ShapeDtypeStruct(value.shape, jax.dtypes.canonicalize_dtype(value.dtype), sharding=sharding)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function` jitted, on this mesh; its results' shapes and shardings where devices are described."""
        jitted = jax.jit(function)
        with self.activate():
            if not self.is_described:
                return jitted(*arguments)
            traced = jitted.trace(*arguments)
            places = traced.lower().compile().output_shardings
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), traced.out_info, places
        )

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Make this the mesh that `constrain` and the shard_map islands see while tracing."""
        token = _ACTIVE.set(self)
        try:
            with jax.set_mesh(self.devices):
                yield
        finally:
            _ACTIVE.reset(token)


_ACTIVE: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("recjax_mesh", default=None)


def active() -> Mesh | None:
    """The mesh made current by `Mesh.activate`, if any; without one, code runs on a single device."""
    return _ACTIVE.get()


def platform() -> str:
    """Kind of device ("cpu", "gpu", "tpu") that the code being traced will run on."""
    mesh = active()
    return jax.default_backend() if mesh is None else mesh.devices.devices.flat[0].platform


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Ask for `x` to be laid out by its logical dimension names; a plain array when no mesh is active."""
    mesh = active()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, mesh.sharding(names))


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Build the mesh; raises `MeshError` when shape, preset and device count do not fit together."""
    devices = jax.devices() if devices is None else devices
    sizes = _parse(config.shape, len(devices))
    if config.preset not in PRESETS:
        raise MeshError(f"no sharding preset {config.preset!r}", expected="one of " + ", ".join(PRESETS))
    rules = PRESETS[config.preset]
    used = {axis for axes in rules.values() for axis in axes}
    for axis, size in zip(AXES, sizes, strict=True):
        if size > 1 and axis not in used:
            raise MeshError(
                f"preset {config.preset!r} leaves the mesh axis {axis!r} of size {size} unused",
                where=f"MESH = {config.shape!r}",
                mend="use another preset (SHARDING) or make that axis 1",
            )
    if sizes[AXES.index("expert")] == 1:
        rules = _without_expert_axis(rules)
    grid = placed(devices, sizes, where=f"MESH = {config.shape!r}")
    return Mesh(jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES)), rules)


def _without_expert_axis(rules: Rules) -> Rules:
    """Experts take the place of the width of their weights, which is then whole."""
    return {**rules, "experts": rules.get("expert_embed", ()), "expert_embed": ()}


def _parse(shape: str, count: int) -> tuple[int, ...]:
    where = f"MESH = {shape!r}"
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in shape.split(","))):
        name, sep, value = part.partition("=")
        name, value = name.strip(), value.strip()
        if not sep or name not in AXES or name in sizes or not value.lstrip("-").isdigit():
            raise MeshError("cannot read the mesh", where=where, expected='for example "data=4,model=2"')
        sizes[name] = int(value)
    fixed = math.prod(s for s in sizes.values() if s != -1)
    unknown = [a for a, s in sizes.items() if s == -1]
    if len(unknown) > 1 or any(s == 0 or s < -1 for s in sizes.values()):
        raise MeshError("cannot read the mesh", where=where, expected="positive sizes and at most one -1")
    if unknown and count % fixed == 0:
        sizes[unknown[0]] = count // fixed
    if math.prod(sizes.values()) != count:
        raise MeshError(
            "the mesh does not match the devices",
            where=where,
            expected=f"a product of {count}, the number of devices",
            mend='MESH = "data=-1" takes them all',
        )
    return tuple(sizes.get(axis, 1) for axis in AXES)
