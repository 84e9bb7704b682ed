"""What training carries from step to step, and how it lies on the devices.

`TrainState` is the whole of it: nothing else (no random key, no module) is needed to go on after a restart. The
layout of an optimiser's state is never written down by hand: every slot finds the parameter it belongs to by its
path and takes that parameter's logical axes. This file decides neither how parameters move (`core.optim`) nor how
they reach the disk (`core.checkpoint`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from recjax.core.module import Params
from recjax.core.sharding import Mesh

Axes = tuple[str | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """`step` int32 scalar: updates done so far; `params`: nested dict; `opt_state`: whatever the optimiser keeps.

    The leaves are arrays, or one thing for each array: its shape, its sharding.
    """

    step: Any
    params: Params
    opt_state: Any


def create(params: Params, optimizer: optax.GradientTransformation, held: frozenset[str] = frozenset()) -> TrainState:
    """The state before the first update; the optimiser knows nothing of the parameters that are `held` (paths)."""
    trained, _ = split(params, held)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(trained))


def split(params: Params, held: frozenset[str]) -> tuple[Params, Params]:
    """The parameters that are trained, and those at the paths `held`, each as a nested dict."""
    if not held:
        return params, {}
    leaves = by_path(params)
    trained = nested({path: x for path, x in leaves.items() if path not in held})
    return trained, nested({path: x for path, x in leaves.items() if path in held})


def joined(trained: Params, held: Params) -> Params:
    """Undo `split`."""
    return nested(by_path(trained) | by_path(held)) if held else trained


def shardings(mesh: Mesh, shapes: TrainState, param_axes: Params) -> TrainState:
    """A `TrainState` of shardings for a state of these `shapes` (from `jax.eval_shape`).

    `param_axes` has a tuple of logical axis names at every parameter. An optimiser slot follows `slot_axes`; the
    step and other scalars are replicated.
    """
    axes = {_dict_keys(path): leaf for path, leaf in _leaves(param_axes, is_leaf=lambda x: isinstance(x, tuple))}
    params = {_dict_keys(path): leaf.shape for path, leaf in _leaves(shapes.params)}

    def sharding(path: tuple[Any, ...], leaf: Any) -> jax.sharding.NamedSharding:
        keys = _dict_keys(path)
        for start in range(len(keys)):
            owner = keys[start:]
            if owner in axes:
                return mesh.sharding(slot_axes(leaf.shape, params[owner], axes[owner]))
        return mesh.sharding()

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def abstract(shapes: Any, shardings: Any) -> Any:
    """Shapes and shardings in one tree, as `core.checkpoint` wants its target."""
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings)


def slot_axes(shape: tuple[int, ...], param_shape: tuple[int, ...], param_axes: Axes) -> Axes:
    """Logical axes of an optimiser slot of `shape` that belongs to a parameter.

    A slot shaped like the parameter takes its axes; a slot that keeps only leading dimensions (one number per table
    row, [rows] or [rows, 1]) takes the axes of those. Any other shape is replicated.
    """
    out: list[str | None] = []
    for size, param_size, name in zip(shape, param_shape, param_axes, strict=False):
        if size != param_size:
            break
        out.append(name)
    if all(size == 1 for size in shape[len(out) :]):
        return (*out, *(None,) * (len(shape) - len(out)))
    return (None,) * len(shape)


def by_path(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """The leaves of a tree by "/"-joined path, for example "params/blocks/ffn/up" or "opt_state/0/mu/table"."""
    return {"/".join(_name(key) for key in path): leaf for path, leaf in _leaves(tree, is_leaf)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path as a nested dict."""
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node, parts = out, path.split("/")
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        if parts[-1] in node or not isinstance(node, dict):
            raise ValueError(f"two leaves of the state have the path {path!r}")
        node[parts[-1]] = leaf
    return out


def from_paths(tree: Any, values: dict[str, Any]) -> Any:
    """A tree like `tree` with the leaves `values`, as `by_path` names them."""
    return jax.tree.unflatten(jax.tree.structure(tree), [values[path] for path in by_path(tree)])


def _leaves(tree: Any, is_leaf: Any = None) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _dict_keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The trailing run of dictionary keys: a mirror of the parameters inside an optimiser state ends in it."""
    keys: list[str] = []
    for key in reversed(path):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        keys.append(_name(key))
    return tuple(reversed(keys))
