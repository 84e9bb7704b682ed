"""Dense layers of rankers, each of which may be corrected for every domain by an adapter, of low rank or not.

An adapter (MLoRA, Yang et al. 2024, arXiv 2408.08913) belongs to a layer that has been made: `adapt` adds it to every
`Dense` of a module, so that whatever is built of `Dense` can be adapted and draws the same numbers as without. A
batch may mix domains, and a row may be of several in parts (`nn.by_domain`). An adapter starts as nothing: every
domain is then the backbone to the last bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from recjax.core.errors import ConfigError
from recjax.core.module import Initializer, Module, Params, Rngs, param
from recjax.nn.composed import Composed
from recjax.nn.dropout import dropout
from recjax.nn.linear import linear

# Up to so many ranks over all domains they are computed side by side and all but one set to zero; beyond, each row
# gathers the adapter of its domain.
SIDE_BY_SIDE = 1024
_ADAPTER = "adapter_"  # how the names of parameters begin that each domain has for itself


Domain = Int[Array, " b"] | Float[Array, "b m"]


class Pass(NamedTuple):
    """What a layer is told about a call besides its input.

    `domain` int32 [b] chooses adapters, float [b, m] mixes those of m domains; a row whose domain has none is left to
    the backbone. Batch norms put what they saw into `seen`.
    """

    train: bool
    key: Key[Array, ""] | None
    domain: Domain | None
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

    `form` "low_rank" adds (x A_d) B_d + c_d; the rank of a layer of o outputs is max(1, o // `rank_divisor`), as in the
    published code of MLoRA, or `rank`. "full" adds x D_d + c_d, which on a frozen backbone is what fine-tuning a whole
    network for each domain adds. "star" multiplies W by S_d, entry by entry, and adds c_d (STAR, Sheng et al. 2021,
    arXiv 2101.11427). With `normalise` what the interaction reads is normalised by domain before (`nn.domain_norm`).

    With `mixed` a gate that reads the fields mixes the adapters of all domains, its own one foremost at first
    (MoE-MLoRA: `nn.by_domain.DomainGate`).
    """

    domains: int
    form: Literal["low_rank", "full", "star"] = "low_rank"
    rank: int | None = None
    rank_divisor: int = 16
    mixed: bool = False
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.form not in ("low_rank", "full", "star"):
            raise ConfigError(f"no adapters of the form {self.form!r}", expected="low_rank, full, star")
        for name in ("domains", "rank", "rank_divisor"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"DomainAdapters.{name} = {getattr(self, name)}", expected="at least 1")

    def rank_of(self, outputs: int) -> int:
        """The rank of a layer's adapters."""
        return self.rank or max(1, outputs // self.rank_divisor)


class Dense(Module):
    """drop(x W + b) + (x A_d) B_d + c_d, d being the domain of a row; the last two terms once it is adapted, and the
    one before the last as the form of its `DomainAdapters` says.

    Factors of x W are rounded to bfloat16 where it is `rounded` (`nn.linear`).
    """

    adapted = rounded = False
    form = ""

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
        """Add A, drawn, and B and c, which are zero; or a matrix of zeros, or factors of one."""
        (inner, outer), domains = self.weight.shape, adapters.domains
        rank, zeros = adapters.rank_of(outer), nnx.initializers.zeros
        glorot = nnx.initializers.glorot_normal(batch_axis=(0,))
        if adapters.form == "full":
            self.adapter_matrix = param(rngs, (domains, inner, outer), (None, *self.axes), zeros)
        elif adapters.form == "star":
            self.adapter_factor = param(rngs, (domains, inner, outer), (None, *self.axes), nnx.initializers.ones)
        else:
            self.adapter_in = param(rngs, (domains, inner, rank), (None, self.axes[0], None), glorot)
            self.adapter_out = param(rngs, (domains, rank, outer), (None, None, self.axes[1]), zeros)
        self.adapter_bias = param(rngs, (domains, outer), (None, self.axes[1]), zeros)
        self.adapted, self.form = True, adapters.form

    def __call__(
        self, x: Float[Array, "b *n i"] | Composed, call: Pass, *, dropout: float = 0.0
    ) -> Float[Array, "b *n o"]:
        """`dropout` is that of the backbone's term."""
        bias = None if self.bias is None else self.bias[...]
        multiply = x.product if isinstance(x, Composed) else functools.partial(linear, x)
        y = call.dropout(multiply(self.weight[...], bias, rounded=self.rounded), dropout)
        if not self.adapted or call.domain is None:
            return y
        x = x.whole() if isinstance(x, Composed) else x
        if self.form == "low_rank":
            own = low_rank(x, call.domain, self.adapter_in[...], self.adapter_out[...])
        elif self.form == "full":
            own = of_domain(x, call.domain, self.adapter_matrix[...])
        else:
            own = of_domain(x, call.domain, (self.adapter_factor[...] - 1) * self.weight[...][None])
        return y + own + _by_row(_of_domain(self.adapter_bias[...], call.domain), x)


def low_rank(
    x: Float[Array, "b *n i"],
    domain: Domain,
    inner: Float[Array, "m i r"],
    outer: Float[Array, "m r o"],
    *,
    side_by_side: bool | None = None,
) -> Float[Array, "b *n o"]:
    """(x A_d) B_d of each row's domain d; zero where there is no such domain, a sum where there are several.

    `side_by_side` computes x A of all domains at once, which is cheap for few; None decides by their number.
    """
    domains, _, rank = inner.shape
    if domain.ndim == 1 and (domains * rank > SIDE_BY_SIDE if side_by_side is None else not side_by_side):
        a, b = _of_domain(inner, domain), _of_domain(outer, domain)
        return jnp.einsum("b...r,bro->b...o", jnp.einsum("b...i,bir->b...r", x, a), b)
    own = jnp.repeat(shares(domain, domains), rank, axis=1)
    hidden = linear(x, inner.swapaxes(0, 1).reshape(-1, domains * rank), None)
    return linear(hidden * _by_row(own, hidden), outer.reshape(domains * rank, -1), None)


def of_domain(x: Float[Array, "b *n i"], domain: Domain, weight: Float[Array, "m i o"]) -> Float[Array, "b *n o"]:
    """x W_d of each row's domain d, zero where there is no such domain; every domain's product is computed."""
    made = jnp.einsum("b...i,mio->bm...o", x, weight)
    own = shares(domain, len(weight))
    return (made * own.reshape(*own.shape, *(1,) * (made.ndim - 2))).sum(1)


def shares(domain: Domain, domains: int) -> Float[Array, "b m"]:
    """How much of a row belongs to each domain: 1 to its own one, nothing where it has none."""
    return jax.nn.one_hot(domain, domains) if domain.ndim == 1 else domain


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
    """The parameters of the backbone that answers as `domain` does: W + A_d B_d and b + c_d, without adapters (or
    W + D_d, or W S_d).

    Raises `ConfigError` where there is no such domain, a layer without bias would need one, or a norm is by domain.
    """
    if "adapter_mean" in params:
        raise ConfigError("a norm by domain cannot be merged into a backbone that has none")
    kept = {name: value for name, value in params.items() if not name.startswith(_ADAPTER)}
    out = {name: merged(dict(value), domain) if isinstance(value, Mapping) else value for name, value in kept.items()}
    if "adapter_bias" in params:
        shift = params["adapter_bias"]
        if not 0 <= domain < len(shift):
            raise ConfigError(f"no adapter for domain {domain}", expected=f"0 to {len(shift) - 1}")
        if "bias" not in out:
            raise ConfigError("a layer without bias cannot take in the bias of a domain")
        if "adapter_in" in params:
            out["weight"] = out["weight"] + params["adapter_in"][domain] @ params["adapter_out"][domain]
        elif "adapter_matrix" in params:
            out["weight"] = out["weight"] + params["adapter_matrix"][domain]
        else:
            out["weight"] = out["weight"] * params["adapter_factor"][domain]
        out["bias"] = out["bias"] + shift[domain]
    return out


def _of_domain(x: Array, domain: Domain) -> Array:
    """The entry of each row's domain, zero where there is none, or the sum of its shares of all."""
    if domain.ndim == 2:
        return jnp.einsum("bm,m...->b...", domain, x)
    known = (domain >= 0) & (domain < x.shape[0])
    taken = jnp.take(x, domain, axis=0, mode="clip")
    return jnp.where(known.reshape(-1, *(1,) * (x.ndim - 1)), taken, 0)


def _by_row(per_row: Float[Array, "b o"], like: Array) -> Array:
    """[b, 1, ..., o] to stand beside `like`."""
    return per_row.reshape(per_row.shape[0], *(1,) * (like.ndim - 2), per_row.shape[1])
