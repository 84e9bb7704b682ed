"""The only file that touches flax state.

Layers are `nnx.Module`s; outside a layer, parameters are a plain nested dict of arrays (`Params`) and a model is a
pure function of it. Nothing stateful lives in a module: dropout keys are arguments of the call, so no random state
is ever part of a checkpoint.

Every parameter is made by `param`, which gives each dimension a logical axis name (`recjax.core.sharding` maps the
names to mesh axes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]
Module = nnx.Module
Rngs = nnx.Rngs
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

# Under this name the arrays that a model is given beside its parameters travel with them (`with_facts`).
FACTS = "facts"
# What a model saw of its batch, for `maintain`, stands under names that begin so among its outputs.
SEEN = "seen/"
_AXES, _TRAINED = "logical_axes", "trained"


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer,
    dtype: Any = jnp.float32,
    *,
    trained: bool = True,
) -> nnx.Param:
    """An array of `shape`, whose dimensions carry the logical names `axes`.

    The optimiser leaves one that is not `trained` alone; the model sets it itself (`Functional.maintain`).
    """
    if len(shape) != len(axes):
        raise ValueError(f"{len(shape)} dimensions but {len(axes)} axis names: {shape}, {axes}")
    metadata: dict[str, Any] = {_AXES: axes, _TRAINED: trained}
    return nnx.Param(init(rngs.params(), shape, dtype), **metadata)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` copies of a layer in one module whose parameters have a leading `layers` dimension."""

    def params_of(key: jax.Array) -> Any:
        return nnx.state(make(nnx.Rngs(params=key)))

    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))))
    module = nnx.merge(graph, jax.vmap(params_of)(jax.random.split(rngs.params(), count)))
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(**{_AXES: ("layers", *variable.get_metadata(_AXES))})
    return module


def scan(
    layers: nnx.Module,
    call: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    per_layer: Any,
    *,
    remat: bool = False,
    unroll: bool = False,
) -> tuple[Any, Any]:
    """Fold `carry, y = call(layer, carry, x)` over a module made by `stack`, `x` running over the rows of `per_layer`.

    Gives the last `carry` and the `y` of all layers, stacked. `remat` recomputes each layer in the backward pass;
    `unroll` writes the layers out one after another, which compiles slower and runs faster for the few layers of a
    small model.
    """
    graph, state = nnx.split(layers)

    def body(carry: Any, xs: Any) -> tuple[Any, Any]:
        layer_state, x = xs
        return call(nnx.merge(graph, layer_state), carry, x)

    if remat:
        body = jax.checkpoint(body, prevent_cse=unroll)
    return jax.lax.scan(body, carry, (state, per_layer), unroll=unroll)


def some(layers: nnx.Module, start: int, stop: int) -> nnx.Module:
    """Layers `start` to `stop - 1` of a module made by `stack`, stacked as well."""
    graph, state = nnx.split(layers)
    return nnx.merge(graph, jax.tree.map(lambda x: x[start:stop], state))


def one(layers: nnx.Module, index: int) -> nnx.Module:
    """One layer of a module made by `stack`."""
    graph, state = nnx.split(layers)
    return nnx.merge(graph, jax.tree.map(lambda x: x[index], state))


class Functional:
    """A module class and its arguments as pure functions of a parameter dict.

    `axes` are the logical axes of every parameter, `untrained` the paths of those that the optimiser leaves alone, and
    `held` of those that no step is to move at all. `base` is the model without what was put around it
    (`core.adapters`).

    A module may have parameters that no gradient reaches: running statistics, books whose dead rows are revived. It
    sets them in two methods, which give new values by path ("/"-joined) and which the engine calls: `fit(facts, key)`
    before the first step of a fresh run, and `maintain(seen, key)` after the optimiser's part of every step. `seen`
    holds the module's outputs `seen/<name>` of all micro-batches, stacked in a first dimension.

    A module whose `by_item` is True makes what it knows of an item of the facts about that item alone, so that a step
    may show it a few items in place of the catalogue (`core.sparse_rows`); where it is False it needs the whole
    catalogue for each. Modules that make nothing of facts have no such attribute, None here.
    """

    base: Functional
    held: frozenset[str]

    def __init__(self, make: Callable[..., nnx.Module]) -> None:
        """`make(rngs=...)` builds the module."""
        self._make = make
        template = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(params=0)))
        self._graph, state = nnx.split(template, nnx.Param)
        self._treedef_state = state
        self.axes: Params = _to_dict(state, lambda variable: tuple(variable.get_metadata(_AXES)))
        self.untrained: tuple[str, ...] = tuple(
            "/".join(map(str, path)) for path, v in nnx.to_flat_state(state) if not v.get_metadata(_TRAINED)
        )
        self.maintains = hasattr(template, "maintain")
        self.by_item: bool | None = getattr(template, "by_item", None)
        self.base, self.held = self, frozenset()

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; deterministic in `key`."""
        return nnx.to_pure_dict(nnx.state(self._make(rngs=nnx.Rngs(params=key)), nnx.Param))

    def apply(self, params: Params, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the module with `params` in place of its own; facts that travel with them join the batch."""
        if facts := params.get(FACTS):
            batch = {**batch, **facts}
        return self.bind(params)(batch, *args, **kwargs)

    def fit(self, params: Params, facts: Mapping[str, Any], key: jax.Array) -> Params:
        """Fresh `params` fitted to the facts of a recipe, where the module has a method for it."""
        module: Any = self.bind(params)
        return _with(params, module.fit(facts, key)) if hasattr(module, "fit") else params

    def maintain(self, params: Params, seen: Mapping[str, Any], key: jax.Array) -> Params:
        """`params` as the module wants them after a step in which it has `seen` this."""
        module: Any = self.bind(params)
        return _with(params, module.maintain(seen, key))

    def bind(self, params: Params) -> nnx.Module:
        """The module with `params`, for calling something other than `__call__`."""
        state = jax.tree.map(lambda x: x, self._treedef_state)
        nnx.replace_by_pure_dict(state, {name: part for name, part in params.items() if name != FACTS})
        return nnx.merge(self._graph, state)


def with_facts(params: Params, facts: Mapping[str, Any]) -> Params:
    """`params` that carry `facts`, arrays a model reads from its batch and nobody trains, wherever they go next."""
    return {**params, FACTS: dict(facts)} if facts else params


def _with(params: Params, values: Mapping[str, jax.Array]) -> Params:
    """`params` with other values at some paths; shapes and dtypes stay."""
    out = dict(params)
    for path, value in values.items():
        name, _, rest = path.partition("/")
        if not rest and (value.shape, value.dtype) != (params[name].shape, params[name].dtype):
            raise ValueError(f"{path}: {value.dtype}{value.shape}, not {params[name].dtype}{params[name].shape}")
        out[name] = _with(out[name], {rest: value}) if rest else value
    return out


def _to_dict(state: Any, read: Callable[[Any], Any]) -> Params:
    """A nested dict with `read(variable)` at every variable of `state`."""
    out: Params = {}
    for path, variable in nnx.to_flat_state(state):
        node: Any = out
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = read(variable)
    return out
