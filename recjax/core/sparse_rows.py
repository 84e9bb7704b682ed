"""Training a table of a long catalogue at a cost that does not grow with the catalogue.

A step touches the rows of its batch and of the negatives drawn for it. `SparseRows` takes these rows, each once, out
of every table into a compact one, writes the ids of the batch as rows of that, and in the end puts what the optimiser
made of them back in place. In between, models, objectives and optimisers see a small catalogue and nothing else, and
a gradient has the size of the batch. It refuses what would need the other rows: a full softmax, a dense optimiser, an
average of the weights.

A model may have no table of items at all, but make vectors out of facts about each item. Then the facts are what is
compacted: it makes the vectors of the rows of a batch, not those of the catalogue.

The first two rows, padding and the unknown item, are always there and stay the first two. Rows that fill the compact
table up to its fixed size are copies nobody refers to; they are never written back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from recjax.core import state
from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Params
from recjax.core.rows import put_rows, take_unique_rows
from recjax.core.sharding import active

# Fields of a batch that hold rows of the catalogue, besides what objectives draw.
ID_FIELDS = ("history_ids", "decoder_ids", "target_ids", "negatives", "teacher/rows")
_SPECIAL = 2

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseRows:
    """Which parameters have a row per item (`tables`), and which of them are trained (`trained`), by path.

    Without either, the model knows items by their facts.
    """

    tables: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()

    def is_shorter(self, batch: Tree, num_rows: int) -> bool:
        """Whether `touched` would give fewer rows than the catalogue has."""
        return _SPECIAL + sum(x.size for name, x in batch.items() if _holds_rows(name, x)) < num_rows

    def touched(self, batch: Tree, num_rows: int) -> tuple[jax.Array, Tree]:
        """Every row of the catalogue in the batch, once and in order, and the batch with places in that instead.

        The result has a fixed length; places that are left over, the first two aside, hold `num_rows`. They are
        wherever a row is repeated: closing the gaps would cost more than everything else here, and is only done where
        it makes the result shorter.
        """
        ids = {name: x for name, x in batch.items() if _holds_rows(name, x)}
        every = _whole(jnp.concatenate([x.reshape(-1) for x in ids.values()]))
        parts = 1 if (mesh := active()) is None else mesh.size_of("items")
        size = min(_SPECIAL + every.shape[0], num_rows)
        size += -size % parts
        rows = jnp.sort(jnp.where(every < _SPECIAL, num_rows, every))
        if size < _SPECIAL + every.shape[0]:
            rows = once = jnp.unique(rows, size=size - _SPECIAL, fill_value=num_rows)
        else:
            rows = jnp.pad(rows, (0, size - _SPECIAL - every.shape[0]), constant_values=num_rows)
            once = jnp.where(jnp.diff(rows, prepend=-1) == 0, num_rows, rows)
        places = {
            name: jnp.where(x < _SPECIAL, x, _SPECIAL + jnp.searchsorted(rows, x)).astype(x.dtype)
            for name, x in ids.items()
        }
        return jnp.concatenate([jnp.arange(_SPECIAL, dtype=once.dtype), once]), {**batch, **places}

    def compact(self, tree: Any, rows: jax.Array, num_rows: int) -> Any:
        """`tree` (parameters, or an optimiser's state) with only `rows` of everything that has a row per item."""
        return self._map(tree, lambda x: take_unique_rows(x, rows), num_rows, self.tables)

    def compact_facts(self, const: Tree, rows: jax.Array, num_rows: int) -> Tree:
        """The facts of `const` about these rows alone; what was prepared for drawing is left out."""
        return {
            name: take_unique_rows(x, rows) if name.startswith("item") and x.shape[:1] == (num_rows,) else x
            for name, x in const.items()
            if not name.startswith("drawn/")
        }

    def put(self, old: Any, new: Any, rows: jax.Array, num_rows: int) -> Any:
        """`old` with the compact `new` written in place of `rows`."""
        paths = self._owned(old, num_rows, self.tables)
        trained = self._owned(old, num_rows, self.trained)
        before, after = state.by_path(old), state.by_path(new)
        out = {
            path: (put_rows(before[path], rows, after[path]) if path in trained else before[path])
            if path in paths
            else after[path]
            for path in before
        }
        return state.from_paths(old, out)

    def _map(self, tree: Any, function: Any, num_rows: int, tables: Sequence[str]) -> Any:
        owned = self._owned(tree, num_rows, tables)
        return state.from_paths(tree, {p: function(x) if p in owned else x for p, x in state.by_path(tree).items()})

    def _owned(self, tree: Any, num_rows: int, tables: Sequence[str]) -> set[str]:
        """Paths of the leaves of `tree` that belong to one of the `tables` and have a row for each of its rows."""
        return {
            path
            for path, leaf in state.by_path(tree).items()
            if leaf.shape[:1] == (num_rows,) and any(path == t or path.endswith("/" + t) for t in tables)
        }


def plan(
    model: Functional, row_wise: Sequence[str], frozen: Sequence[str], objectives: Sequence[Any]
) -> SparseRows | None:
    """How to train the parameters `row_wise` (paths) row by row, or a model that knows items by their facts alone.

    None for a model that is trained whole. Raises `ConfigError` where something needs more than the rows of the batch
    and parameters are to be trained by rows.
    """
    named = _paths(model.axes)
    tables = tuple(path for path, names in named.items() if "items" in names)
    if not row_wise:
        needs_all = tables or any(objective.reads_catalogue for objective in objectives)
        return SparseRows() if model.by_item and not needs_all else None
    if model.by_item is False:
        raise ConfigError(
            f"{', '.join(row_wise)} is trained row by row, but the model makes the vectors of items of more of its "
            "rows than those of a batch",
            where="Optimizer.groups",
            mend="take the optimiser adam or adagrad for the tables",
        )
    for path in row_wise:
        if named[path][:1] != ("items",):
            raise ConfigError(
                f"{path} is trained row by row, but has no row for each item",
                where="Optimizer.groups",
                expected="a pattern that matches only tables: " + ", ".join(tables),
            )
    if dense := sorted(set(tables) - set(row_wise) - set(frozen)):
        raise ConfigError(
            f"{', '.join(dense)} would be trained whole beside {', '.join(row_wise)}, which is trained row by row",
            where="Optimizer.groups",
            expected="every table with a row for each item in a row-wise or a frozen group",
        )
    for objective in objectives:
        if objective.reads_catalogue:
            raise ConfigError(
                f"the objective {objective.name!r} ({type(objective).__name__}) moves every row of the catalogue, but "
                f"{', '.join(row_wise)} is trained row by row",
                where="Optimizer.groups and Recipe.objectives",
                mend="take a sampled loss such as SampledSoftmax, or the optimiser adam or adagrad for the tables",
            )
    return SparseRows(tables=tables, trained=tuple(row_wise))


def rows_of(params: Params, const: Tree, sparse: SparseRows) -> int:
    """Length of the catalogue."""
    return len(state.by_path(params)[sparse.tables[0]] if sparse.tables else const["item_valid"])


def _holds_rows(name: str, x: jax.Array) -> bool:
    if name.startswith("field/"):  # those of a ranker share one table; others are numbers
        return jnp.issubdtype(x.dtype, jnp.integer)
    return name in ID_FIELDS or (name.startswith("drawn/") and name.endswith("rows"))


def _whole(x: jax.Array) -> jax.Array:
    """`x` on every device: all of them sort the same ids."""
    mesh = active()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, mesh.sharding())


def _paths(axes: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[str | None, ...]]:
    out: dict[str, tuple[str | None, ...]] = {}
    for name, value in axes.items():
        out |= {prefix + str(name): value} if isinstance(value, tuple) else _paths(value, f"{prefix}{name}/")
    return out
