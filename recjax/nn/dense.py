"""Dense layers of rankers, each of which may be corrected for every domain by an adapter of low rank.

An adapter (MLoRA, Yang et al. 2024, arXiv 2408.08913) belongs to a layer that has been made: `adapt` adds it to every
`Dense` of a module, so that whatever is built of `Dense` can be adapted and draws the same numbers as without. A
batch may mix domains. An adapter starts as nothing: every domain is then the backbone to the last bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from recjax.core.errors import ConfigError
from recjax.core.module import Initializer, Module, Params, Rngs, param
from recjax.nn.dropout import dropout
from recjax.nn.linear import linear

# Up to so many ranks over all domains they are computed side by side and all but one set to zero; beyond, each row
# gathers the adapter of its domain.
SIDE_BY_SIDE = 1024
_ADAPTER = ("adapter_in", "adapter_out", "adapter_bias")


class Pass(NamedTuple):
    """What a layer is told about a call besides its input.

    `domain` int32 [b] chooses adapters; a row whose domain has none is left to the backbone. Batch norms put what
    they saw into `seen`.
    """

    train: bool
    key: Key[Array, ""] | None
    domain: Int[Array, " b"] | None
    seen: dict[str, Any]

    def part(self, index: int) -> Pass:
        """The same with a key of its own."""
        return self if self.key is None else self._replace(key=jax.random.fold_in(self.key, index))

    def dropout(self, x: Float[Array, "*n i"], rate: float) -> Float[Array, "*n i"]:
        """Dropout in training, `x` otherwise."""
        return dropout(x, rate, self.key) if self.train and self.key is not None else x


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainAdapters:
    """An adapter for each of `domains` in every dense layer but the heads.

    The rank of a layer of o outputs is max(1, o // `rank_divisor`), as in the published code, or `rank`.
    """

    domains: int
    rank: int | None = None
    rank_divisor: int = 16

    def __post_init__(self) -> None:
        for name in ("domains", "rank", "rank_divisor"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"DomainAdapters.{name} = {getattr(self, name)}", expected="at least 1")

    def rank_of(self, outputs: int) -> int:
        """The rank of a layer's adapters."""
        return self.rank or max(1, outputs // self.rank_divisor)


class Dense(Module):
    """drop(x W + b) + (x A_d) B_d + c_d, d being the domain of a row; the last two terms once it is adapted.

    Factors of x W are rounded to bfloat16 where it is `rounded` (`nn.linear`).
    """

    adapted = rounded = False

    def __init__(
        self,
        inner: int,
        outer: int,
        *,
        axes: tuple[str | None, str | None] = (None, None),
        bias: bool = True,
        init: Initializer | None = None,
        rngs: Rngs,
    ) -> None:
        self.axes = axes
        self.weight = param(rngs, (inner, outer), axes, init or nnx.initializers.glorot_normal())
        self.bias = param(rngs, (outer,), axes[1:], nnx.initializers.zeros) if bias else None

    def adapt(self, adapters: DomainAdapters, rngs: Rngs) -> None:
        """Add A, drawn, and B and c, which are zero."""
        (inner, outer), domains = self.weight.shape, adapters.domains
        rank, zeros = adapters.rank_of(outer), nnx.initializers.zeros
        glorot = nnx.initializers.glorot_normal(batch_axis=(0,))
        self.adapter_in = param(rngs, (domains, inner, rank), (None, self.axes[0], None), glorot)
        self.adapter_out = param(rngs, (domains, rank, outer), (None, None, self.axes[1]), zeros)
        self.adapter_bias = param(rngs, (domains, outer), (None, self.axes[1]), zeros)
        self.adapted = True

    def __call__(self, x: Float[Array, "b *n i"], call: Pass, *, dropout: float = 0.0) -> Float[Array, "b *n o"]:
        """`dropout` is that of the backbone's term."""
        bias = None if self.bias is None else self.bias[...]
        y = call.dropout(linear(x, self.weight[...], bias, rounded=self.rounded), dropout)
        if not self.adapted or call.domain is None:
            return y
        inner, outer, shift = self.adapter_in[...], self.adapter_out[...], self.adapter_bias[...]
        return y + low_rank(x, call.domain, inner, outer) + _by_row(_of_domain(shift, call.domain), x)


def low_rank(
    x: Float[Array, "b *n i"],
    domain: Int[Array, " b"],
    inner: Float[Array, "m i r"],
    outer: Float[Array, "m r o"],
    *,
    side_by_side: bool | None = None,
) -> Float[Array, "b *n o"]:
    """(x A_d) B_d of each row's domain d; zero where there is no such domain.

    `side_by_side` computes x A of all domains at once, which is cheap for few; None decides by their number.
    """
    domains, _, rank = inner.shape
    if domains * rank > SIDE_BY_SIDE if side_by_side is None else not side_by_side:
        a, b = _of_domain(inner, domain), _of_domain(outer, domain)
        return jnp.einsum("b...r,bro->b...o", jnp.einsum("b...i,bir->b...r", x, a), b)
    own = jnp.repeat(jax.nn.one_hot(domain, domains, dtype=x.dtype), rank, axis=1)
    hidden = linear(x, inner.swapaxes(0, 1).reshape(-1, domains * rank), None)
    return linear(hidden * _by_row(own, hidden), outer.reshape(domains * rank, -1), None)


def adapt(module: Module, adapters: DomainAdapters, rngs: Rngs) -> None:
    """Give every dense layer of a module its adapters."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, Dense):
            node.adapt(adapters, rngs)


def round_factors(module: Module) -> None:
    """Make every dense layer of a module a `rounded` one."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, Dense):
            node.rounded = True


def merged(params: Params, domain: int) -> Params:
    """The parameters of the backbone that answers as `domain` does: W + A_d B_d and b + c_d, without adapters.

    Raises `ConfigError` where there is no such domain, or a layer without bias would need one.
    """
    out = {k: merged(dict(v), domain) if isinstance(v, Mapping) else v for k, v in params.items() if k not in _ADAPTER}
    if "adapter_in" in params:
        inner, outer, shift = (params[name] for name in _ADAPTER)
        if not 0 <= domain < len(inner):
            raise ConfigError(f"no adapter for domain {domain}", expected=f"0 to {len(inner) - 1}")
        if "bias" not in out:
            raise ConfigError("a layer without bias cannot take in the bias of a domain")
        out["weight"] = out["weight"] + inner[domain] @ outer[domain]
        out["bias"] = out["bias"] + shift[domain]
    return out


def with_domain(params: Params, key: Key[Array, ""]) -> Params:
    """`params` with adapters for one more domain, as if just made; the others stay as they are."""
    out: Params = {}
    for number, (name, value) in enumerate(sorted(params.items())):
        part = jax.random.fold_in(key, number)
        if isinstance(value, Mapping):
            out[name] = with_domain(dict(value), part)
        elif name in _ADAPTER:
            init = nnx.initializers.glorot_normal() if name == "adapter_in" else nnx.initializers.zeros
            out[name] = jnp.concatenate([value, init(part, value.shape[1:], value.dtype)[None]])
        else:
            out[name] = value
    return out


def _of_domain(x: Array, domain: Int[Array, " b"]) -> Array:
    """The entry of each row's domain, zero where there is none."""
    known = (domain >= 0) & (domain < x.shape[0])
    taken = jnp.take(x, domain, axis=0, mode="clip")
    return jnp.where(known.reshape(-1, *(1,) * (x.ndim - 1)), taken, 0)


def _by_row(per_row: Float[Array, "b o"], like: Array) -> Array:
    """[b, 1, ..., o] to stand beside `like`."""
    return per_row.reshape(per_row.shape[0], *(1,) * (like.ndim - 2), per_row.shape[1])
