"""Low-rank adapters (Hu et al. 2021, LoRA) over a frozen base, as a transform of a model's parameters.

A weight W that has an adapter is read as W + (alpha / r) A B, with A [.., in, r] drawn and B [.., r, out] zero. The
model is not told: its parameters are handed to it as objects that give this sum where a layer reads them, so that
under a scan only one layer's is there at a time. The base gets no gradient and no optimiser state, and may be stored
in 8 or 4 bits (`core.blockwise`; QLoRA, Dettmers et al. 2023). Adapters lie under the key `adapters` beside the
base, A split over devices as the input dimensions of W are and B as the output dimensions.

The gradients of A and B are taken through that of W, so a step multiplies as much as training W does; what is saved is
the memory of optimiser and gradients. With a stored base, layers should be recomputed in the backward pass
(`TransformerConfig.remat = "full"`), or what is read of all of them is kept for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from recjax.core import blockwise
from recjax.core.errors import ConfigError
from recjax.core.module import FACTS, Functional, Module, Params
from recjax.core.state import by_path, nested

ADAPTERS = "adapters"
_DRAW = 0x6C6F7261  # what a draw is for
_STACKED = ("layers", "experts")

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """Which weights of a frozen base have adapters, and of what rank.

    `paths` are regular expressions that may match anywhere in the path of a weight matrix; `ranks` are (pattern, rank)
    pairs, of which the first that matches counts before `rank`, and rank 0 is no adapter. `quantised` "int8" or "nf4"
    stores the matrices of `paths` so, with a scale for `block` entries. `trained` are patterns of other parameters of
    the base that are trained as they are, such as norms.
    """

    paths: tuple[str, ...] = (r"attention/", r"ffn/")
    rank: int = 8
    ranks: tuple[tuple[str, int], ...] = ()
    alpha: float = 16.0
    quantised: str = ""
    block: int = 64
    trained: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (*self.paths, *self.trained, *(p for p, _ in self.ranks)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r} is not a regular expression", where=f"Adapters: {error}") from error
        if self.rank < 1 or any(rank < 0 for _, rank in self.ranks) or self.block < 1 or not self.alpha > 0:
            raise ConfigError(
                "adapters cannot be like this",
                where=repr(self),
                expected="rank and block at least 1, ranks at least 0, alpha above 0",
            )
        if self.quantised not in ("", *blockwise.KINDS):
            kinds = ", ".join(map(repr, ("", *blockwise.KINDS)))
            raise ConfigError(f"Adapters.quantised = {self.quantised!r}", expected=f"one of {kinds}")

    def rank_of(self, path: str) -> int:
        """The rank of the adapter of a weight that `paths` name."""
        return next((rank for pattern, rank in self.ranks if re.search(pattern, path)), self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weight:
    """A matrix of the base, or a stack of them: where its input and output dimensions begin, its adapter's rank."""

    shape: tuple[int, ...]
    axes: Axes
    inputs_at: int
    outputs_at: int
    rank: int

    def fresh(self, key: jax.Array) -> dict[str, jax.Array]:
        """A and B: A normal of standard deviation 1/sqrt(in), B zero."""
        stacked, ins, outs = self._split(self.shape)
        a = jax.random.normal(key, (*stacked, *ins, self.rank)) / math.sqrt(math.prod(ins))
        return {"a": a, "b": jnp.zeros((*stacked, self.rank, *outs))}

    def adapter_axes(self) -> dict[str, Axes]:
        """Logical axes of A and B."""
        stacked, ins, outs = self._split(self.axes)
        return {"a": (*stacked, *ins, None), "b": (*stacked, None, *outs)}

    def _split(self, x: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        return x[: self.inputs_at], x[self.inputs_at : self.outputs_at], x[self.outputs_at :]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale", "inputs", "outputs"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """A weight as a layer finds it: `read[...]` is the sum. A stack of them is cut and scanned as an array is.

    `base` is an array or what `blockwise.store` made of one; without `a` and `b` there is no adapter. `inputs` and
    `outputs` count the last dimensions of the weight.
    """

    base: Any
    a: Any
    b: Any
    scale: float
    inputs: int
    outputs: int

    def __getitem__(self, key: Any) -> jax.Array:
        weight = blockwise.read(self.base) if isinstance(self.base, dict) else self.base
        if self.a is not None and self.b is not None:
            stacked, rank = weight.shape[: weight.ndim - self.inputs - self.outputs], self.a.shape[-1]
            a, b = self.a.reshape(*stacked, -1, rank), self.b.reshape(*stacked, rank, -1)
            weight = weight + (self.scale * (a @ b)).reshape(weight.shape).astype(weight.dtype)
        return weight[key]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return jax.eval_shape(lambda: self[...]).shape


class Adapted(Functional):
    """A model whose parameters are those of `base`, some of them stored, and adapters.

    A `Functional` like any other: the step, evaluation and checkpoints see no difference. `held` are the paths that no
    step moves. `merge` gives the parameters of `base` that do the same.
    """

    def __init__(self, base: Functional, config: Adapters) -> None:
        """Raises `ConfigError` where a pattern finds nothing in the base."""
        self.base, self.config, self.maintains, self.by_item = base, config, False, base.by_item
        paths = by_path(jax.eval_shape(base.init, jax.random.key(0)))
        axes = by_path(base.axes, is_leaf=lambda x: isinstance(x, tuple))
        self._weights = {p: w for p, x in paths.items() if (w := _weight(config, p, x.shape, axes[p])) is not None}
        self._check(paths)
        trained = {p for p in paths if any(re.search(t, p) for t in config.trained)}
        self.untrained = tuple(p for p in base.untrained if p in trained)
        stored = {p: self._store_axes(p, names) for p, names in axes.items()}
        self.axes: Params = nested(stored) | {ADAPTERS: self._adapters(_Weight.adapter_axes)}
        held = by_path(nested({p: x for p, x in stored.items() if p not in trained}), is_leaf=_is_axes)
        self.held = frozenset(held)

    def init(self, key: jax.Array) -> Params:
        """A fresh base, stored, with adapters that change nothing yet."""
        keys = iter(jax.random.split(jax.random.fold_in(key, _DRAW), len(self._weights)))
        return self.adapt(self.base.init(key), self._adapters(lambda weight: weight.fresh(next(keys))))

    def adapt(self, plain: Params, adapters: Params) -> Params:
        """The parameters of `base`, stored, with adapters beside them."""
        kind, block = self.config.quantised, self.config.block
        leaves = by_path(plain)
        if kind:
            leaves |= {path: blockwise.store(leaves[path], kind, block) for path in self._weights}
        return nested(leaves) | {ADAPTERS: adapters}

    def merge(self, params: Params) -> Params:
        """The parameters of `base` that give the same outputs; facts that travel with `params` stay."""
        return jax.tree.map(lambda x: x[...], self._reading(params), is_leaf=lambda x: isinstance(x, Read))

    def plain(self, params: Params) -> Params:
        """The parameters of the frozen base alone, read back."""
        return self.merge({**params, ADAPTERS: {}})

    def fit(self, params: Params, facts: Mapping[str, Any], key: jax.Array) -> Params:
        """As the base does it, before it is stored."""
        plain = self.plain(params)
        fitted = self.base.fit(plain, facts, key)
        return params if fitted is plain else self.adapt(fitted, params[ADAPTERS])

    def apply(self, params: Params, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the module of the base, its weights read through the adapters."""
        return self.base.apply(self._reading(params), batch, *args, **kwargs)

    def bind(self, params: Params) -> Module:
        """The module of the base, its weights read through the adapters."""
        return self.base.bind(self._reading(params))

    def _reading(self, params: Params) -> Params:
        """Parameters of the base with a `Read` for every weight that is stored or has an adapter."""
        base = by_path({name: x for name, x in params.items() if name not in (ADAPTERS, FACTS)})
        adapters = by_path(params[ADAPTERS])
        for path, weight in self._weights.items():
            parts = (blockwise.VALUES, blockwise.SCALES) if self.config.quantised else ()
            stored: Any = {part: base.pop(f"{path}/{part}") for part in parts}
            base[path] = Read(
                base=stored or base[path],
                a=adapters.get(f"{path}/a"),
                b=adapters.get(f"{path}/b"),
                scale=self.config.alpha / max(weight.rank, 1),
                inputs=weight.outputs_at - weight.inputs_at,
                outputs=len(weight.shape) - weight.outputs_at,
            )
        return nested(base) | {name: x for name, x in params.items() if name == FACTS}

    def _adapters(self, make: Any) -> Params:
        """A tree with what `make` gives for each weight that has an adapter."""
        return nested({path: make(weight) for path, weight in self._weights.items() if weight.rank})

    def _store_axes(self, path: str, names: Axes) -> Any:
        is_stored = self.config.quantised and path in self._weights
        return {blockwise.VALUES: names, blockwise.SCALES: names} if is_stored else names

    def _check(self, paths: Mapping[str, Any]) -> None:
        """Raise `ConfigError` for patterns that find nothing, and for weights that would be trained twice."""
        config = self.config
        for name, patterns, among in (
            ("paths", config.paths, list(self._weights)),
            ("ranks", [p for p, _ in config.ranks], list(self._weights)),
            ("trained", config.trained, [p for p in paths if p not in self._weights]),
        ):
            idle = [pattern for pattern in patterns if not any(re.search(pattern, path) for path in among)]
            if idle:
                raise ConfigError(
                    f"no parameter for {', '.join(map(repr, idle))}",
                    where=f"Adapters.{name}",
                    expected="a pattern that matches one of: " + ", ".join(sorted(among or paths)),
                )
        twice = [p for p in self._weights if any(re.search(t, p) for t in config.trained)]
        if twice:
            raise ConfigError(f"{', '.join(twice)} would be trained beside adapters", where="Adapters.trained")


def _weight(config: Adapters, path: str, shape: tuple[int, ...], axes: Axes) -> _Weight | None:
    """The matrix at `path`; None where it is none, or where no pattern names it.

    Heads and their width are one dimension of it, layers and experts are stacked before.
    """
    if not any(re.search(pattern, path) for pattern in config.paths):
        return None
    inputs_at = next((at for at, name in enumerate(axes) if name not in _STACKED), len(axes))
    starts = [at for at in range(inputs_at, len(axes)) if axes[at] != "head_dim" or axes[at - 1] != "heads"]
    if len(starts) != 2:
        return None
    rank = config.rank_of(path)
    return _Weight(shape=shape, axes=axes, inputs_at=inputs_at, outputs_at=starts[1], rank=rank)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)
