"""Taking rows of a table that may lie split over devices, without ever gathering the table.

The table is split by rows over the mesh axes of `items` and by columns over those of `item_width`, the indices over
those of `batch`, which either may overlap. `take_rows` is a `shard_map` island: indices and taken rows move between
devices, the table stays where it is, in the gradient too. Where its rows lie over axes of the batch, a device makes
vectors for all devices of these, most of them zero, and they are summed up; where its columns do, it makes its columns
of all these vectors, which are no more than its own share, and every vector travels once.

`take_rows` hands the table on beside the rows. Whoever uses the table next should use the one handed on: in the
backward pass the gradient of that later use arrives here and the taken rows' gradient is added into it in place, so
that a model that reads its table in several ways holds one gradient of the table's size instead of several.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from recjax.core.sharding import Mesh, active


def take_rows(
    table: Float[Array, "v d"], index: Int[Array, "*i"], *, by_batch: bool = True
) -> tuple[Float[Array, "*i d"], Float[Array, "v d"]]:
    """`table[index]` and the table handed on.

    `by_batch` says that the first dimension of `index` is the batch dimension; otherwise every device is given the
    whole of `index`. Indices must lie in the table.
    """
    return _take(table, index, by_batch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take(table: jax.Array, index: jax.Array, by_batch: bool) -> tuple[jax.Array, jax.Array]:
    mesh = active()
    if mesh is None or not (mesh.axes_of("items") or mesh.axes_of("item_width")):
        return jnp.take(table, index, axis=0, mode="clip"), table
    split = Split(mesh, by_batch)

    def local(table: jax.Array, index: jax.Array) -> jax.Array:
        index = split.for_columns(split.gather(index))
        row, inside = split.local_rows(index, table.shape[0])
        rows = jnp.where(inside[..., None], jnp.take(table, row, axis=0, mode="clip"), 0)
        return split.scatter_sum(split.join_columns(rows))

    return split.island(local, (split.stored, split.index), split.index)(table, index), table


def _take_forward(table: jax.Array, index: jax.Array, by_batch: bool):
    return _take(table, index, by_batch), index


def _take_backward(by_batch: bool, index: jax.Array, cotangents: tuple[jax.Array, jax.Array]):
    d_rows, d_table = cotangents
    mesh = active()
    if mesh is None or not any(mesh.axes_of(n) for n in ("items", "item_width", "batch" if by_batch else None)):
        return _add_rows(d_table, index, d_rows), None
    split = Split(mesh, by_batch)
    others = tuple(a for a in split.batch_only if a not in split.width)

    def local(d_table: jax.Array, index: jax.Array, d_rows: jax.Array) -> jax.Array:
        index, d_rows = split.for_columns(split.gather(index)), split.own_columns(split.gather(d_rows))
        parts = math.prod(mesh.devices.shape[a] for a in others)
        if parts > 1 and index.size * parts <= d_table.shape[0]:  # few rows: send the rows, not a table of sums
            index, d_rows = (jax.lax.all_gather(x, others, axis=0, tiled=True) for x in (index, d_rows))
            parts = 1
        row, _ = split.local_rows(index, d_table.shape[0], outside=d_table.shape[0])
        if parts == 1:
            return _add_rows(d_table, row, d_rows)
        return d_table + jax.lax.psum(_add_rows(jnp.zeros_like(d_table), row, d_rows), others)

    return split.island(local, (split.stored, split.index, split.index), split.stored)(d_table, index, d_rows), None


_take.defvjp(_take_forward, _take_backward)


def _add_rows(table: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """Add `rows` at `index`; an index past the end adds nothing."""
    flat = rows.reshape(-1, rows.shape[-1]).astype(table.dtype)
    return table.at[index.reshape(-1)].add(flat, mode="drop")


class Split:
    """Which mesh axes hold the table's rows, the batch, or both; for writing islands over both.

    Inside an island each device has a block of table rows and a block of the batch. After `gather`, devices that
    differ only in their table block (axes `items`) have the same batch block. `table` is the partition of a table of
    whole rows, `stored` of one that is split by columns as well (axes `width`).
    """

    def __init__(self, mesh: Mesh, by_batch: bool) -> None:
        items, batch = mesh.axes_of("items"), mesh.axes_of("batch") if by_batch else ()
        self.mesh, self.items = mesh, items
        self.shared = tuple(a for a in items if a in batch)
        self.unshared = tuple(a for a in items if a not in batch)
        self.batch_only = tuple(a for a in batch if a not in items)
        self.width, self.by_batch = mesh.axes_of("item_width"), by_batch
        self.table = PartitionSpec(items or None)
        self.stored = PartitionSpec(items or None, self.width or None)
        # `gather` joins blocks over the shared axes only, so the other batch axes must be the outer ones
        self.index = PartitionSpec((*self.batch_only, *self.shared) or None)

    def island(self, function, inputs, output):
        """`function` on each device's own blocks."""
        return jax.shard_map(function, mesh=self.mesh.devices, in_specs=inputs, out_specs=output, check_vma=False)

    def gather(self, x: jax.Array) -> jax.Array:
        """The rows of `x` of all devices that differ only in which part of the table they hold."""
        return jax.lax.all_gather(x, self.shared, axis=0, tiled=True) if self.shared else x

    def own_part(self, x: jax.Array) -> jax.Array:
        """Undo `gather` of something that is the same on all devices it was gathered from."""
        if not self.shared:
            return x
        size = x.shape[0] // math.prod(self.mesh.devices.shape[a] for a in self.shared)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.shared) * size, size)

    def scatter_sum(self, x: jax.Array) -> jax.Array:
        """Undo `gather`: the sum over all table blocks, each device keeping its own block of the batch."""
        if self.unshared:
            x = jax.lax.psum(x, self.unshared)
        return jax.lax.psum_scatter(x, self.shared, scatter_dimension=0, tiled=True) if self.shared else x

    def for_columns(self, index: jax.Array) -> jax.Array:
        """The indices of all devices that hold other columns of the table."""
        return jax.lax.all_gather(index, self.width, axis=0, tiled=True) if self.width and self.by_batch else index

    def own_columns(self, rows: jax.Array) -> jax.Array:
        """From whole rows for this device's block of the batch to its own columns of the rows `for_columns`."""
        if not self.width:
            return rows
        if self.by_batch:
            return jax.lax.all_to_all(rows, self.width, rows.ndim - 1, 0, tiled=True)
        size = rows.shape[-1] // math.prod(self.mesh.devices.shape[a] for a in self.width)
        return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(self.width) * size, size, axis=-1)

    def join_columns(self, rows: jax.Array) -> jax.Array:
        """Undo `own_columns`."""
        if not self.width:
            return rows
        if self.by_batch:
            return jax.lax.all_to_all(rows, self.width, 0, rows.ndim - 1, tiled=True)
        return jax.lax.all_gather(rows, self.width, axis=rows.ndim - 1, tiled=True)

    def local_rows(self, index: jax.Array, size: int, outside: int = 0) -> tuple[jax.Array, jax.Array]:
        """Index into this device's part of the table, `outside` where it is not there, and whether it is."""
        row = index - (jax.lax.axis_index(self.items) * size if self.items else 0)
        inside = (row >= 0) & (row < size)
        return jnp.where(inside, row, outside), inside


def sum_rows(table: Float[Array, "r d"], index: Int[Array, "v p"]) -> Float[Array, "v d"]:
    """For each row of `index` the sum of the rows of `table` that it names; -1 names none.

    Both are split over the mesh axes of `items`, and so is the result. The parts of the table stay where they are.
    """
    mesh = active()
    if mesh is None or not mesh.axes_of("items"):
        return _sum_local(table, index, index >= 0)
    split = Split(mesh, False)

    def local(table: jax.Array, index: jax.Array) -> jax.Array:
        index = jax.lax.all_gather(index, split.items, axis=0, tiled=True)
        total = _sum_local(table, *split.local_rows(index, table.shape[0]))
        return jax.lax.psum_scatter(total, split.items, scatter_dimension=0, tiled=True)

    return split.island(local, (split.table, split.table), split.table)(table, index)


def _sum_local(table: jax.Array, row: jax.Array, inside: jax.Array) -> jax.Array:
    """One column of `row` [v, p] after the other, so that no array is p times as large as the result."""
    total = jnp.zeros((row.shape[0], table.shape[1]), table.dtype)
    for column in range(row.shape[1]):
        taken = jnp.take(table, jnp.maximum(row[:, column], 0), axis=0, mode="clip")
        total = total + jnp.where(inside[:, column, None], taken, 0)
    return total


def take_unique_rows(table: Shaped[Array, "v *d"], rows: Int[Array, " n"]) -> Shaped[Array, "n *d"]:
    """`table[rows]`, itself split over the devices by rows; `rows` is the same on all of them, and those past the end
    of the table come as the last one or as zero."""
    mesh = active()
    if mesh is None or not mesh.axes_of("items"):
        return jnp.take(table, rows, axis=0, mode="clip")
    split = Split(mesh, False)

    def local(table: jax.Array, rows: jax.Array) -> jax.Array:
        row, inside = split.local_rows(rows, table.shape[0])
        taken = jnp.take(table, row, axis=0, mode="clip")
        taken = jnp.where(inside.reshape(-1, *(1,) * (taken.ndim - 1)), taken, 0)
        summed = taken.astype(jnp.int32) if taken.dtype == bool else taken
        return jax.lax.psum_scatter(summed, split.items, scatter_dimension=0, tiled=True).astype(taken.dtype)

    return split.island(local, (split.table, PartitionSpec()), split.table)(table, rows)


def put_rows(
    table: Shaped[Array, "v *d"], rows: Int[Array, " n"], values: Shaped[Array, "n *d"]
) -> Shaped[Array, "v *d"]:
    """`table` with `values` (laid out as `take_unique_rows` gives them) at `rows`, which are different but for those
    past the end of the table: these are left out. In place where the table is donated."""
    mesh = active()

    def write(table: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
        return table.at[rows].set(values, mode="drop")

    if mesh is None or not mesh.axes_of("items"):
        return write(table, rows, values)
    split = Split(mesh, False)

    def local(table: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
        values = jax.lax.all_gather(values, split.items, axis=0, tiled=True)
        row, _ = split.local_rows(rows, table.shape[0], outside=table.shape[0])
        return write(table, row, values)

    return split.island(local, (split.table, PartitionSpec(), split.table), split.table)(table, rows, values)
