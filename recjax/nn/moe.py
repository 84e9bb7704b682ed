"""Mixture of experts in the place of the feed-forward part, as Mixtral has it (Jiang et al. 2024, arXiv 2401.04088).

Dropless: every token reaches all of its experts, whatever the others choose, so that packed rows give what single
examples give and a checkpoint of another program gives what it gives there. A capacity, with which a token's output
depends on its neighbours, is refused by not being here. What a router does is handed out as sums (`Routing`); losses
on it are `recjax.losses.router`.

On a mesh the experts lie over the axes of "experts" and never move: a `shard_map` island brings the tokens of the
devices that share a set of experts together (all-gather), every device runs its own experts on them, and the sums go
back (reduce-scatter). The hidden width of an expert may be split as well ("mlp").
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from recjax.core.errors import ConfigError
from recjax.core.module import Initializer, Module, Rngs, param
from recjax.core.sharding import Mesh, active
from recjax.nn.ffn import ACTIVATIONS, FfnKind
from recjax.nn.grouped import grouped_product, permute, rows_of_groups, spread

_KERNELS = ("ragged_dot", "megablox", "blocks", "tokamax", "dense")
Act = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """`top_k` of `num_experts` feed-forward parts for each token, each of the stack's `ffn` and `mlp_width`.

    `kernel` is how the experts are computed. Tokens are sorted by expert for "ragged_dot" (TPU, GPU), "megablox" (TPU,
    whose gradients skip what a device has no expert for), "blocks" (CPU) and "tokamax", that library's kernels (GPU,
    TPU); "dense" runs every expert on every token, num_experts / top_k
    times the arithmetic, and is what the others are tested against.
    """

    num_experts: int = 8
    top_k: int = 2
    kernel: Literal["ragged_dot", "megablox", "blocks", "tokamax", "dense"] = "ragged_dot"

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"MoeConfig: {self.top_k} of {self.num_experts} experts", expected="1 <= top_k <= num_experts"
            )
        if self.kernel not in _KERNELS:
            raise ConfigError(f"MoeConfig.kernel = {self.kernel!r}", expected=f"one of {_KERNELS}")


class Routing(NamedTuple):
    """Sums over the real tokens of each row of what a router did with them.

    `counts`: how many of their choices fell on each expert; `chances`: the probability that a softmax over all
    experts gives each; `z`: the square of the logarithm of that softmax's denominator.
    """

    counts: Float[Array, "*n b e"]
    chances: Float[Array, "*n b e"]
    z: Float[Array, "*n b"]


class Moe(Module):
    """sum over the chosen experts e of w_e FFN_e(x), w the softmax over the `top_k` largest of x W_router.

    The router computes in float32.
    """

    def __init__(
        self,
        config: MoeConfig,
        *,
        kind: FfnKind,
        width: int,
        mlp_width: int,
        init: Initializer,
        out_init: Initializer,
        rngs: Rngs,
    ) -> None:
        self.config, self.kind = config, kind
        inward, outward = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
        shape = (config.num_experts, width, mlp_width)
        self.router = param(rngs, (width, config.num_experts), ("embed", None), init)
        self.gate = param(rngs, shape, inward, _each(init))
        self.inner = param(rngs, shape, inward, _each(init))
        self.outer = param(rngs, (shape[0], mlp_width, width), outward, _each(out_init))

    def __call__(
        self, x: Float[Array, "b l d"], real: Bool[Array, "b l"] | None = None
    ) -> tuple[Float[Array, "b l d"], Routing]:
        """The outcome, of the dtype of `x`, and what the router did; slots that are not `real` give zero."""
        scores = jnp.einsum("bld,de->ble", x.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST)
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        top, choice = jax.lax.top_k(scores, self.config.top_k)
        choice = jnp.where(real[..., None], choice, self.config.num_experts)
        return self._experts(x, choice, jax.nn.softmax(top, axis=-1)), _routing(scores, choice, real)

    def _experts(self, x: jax.Array, choice: jax.Array, share: jax.Array) -> jax.Array:
        act, kernel = ACTIVATIONS[self.kind], self.config.kernel
        weights = tuple(w[...].astype(x.dtype) for w in (self.gate, self.inner, self.outer))
        mesh = active()
        if mesh is None or mesh.devices.size == 1:
            return _mix(x, choice, share, weights, act, kernel)
        return _island(mesh, functools.partial(_mix, act=act, kernel=kernel))(x, choice, share, weights)


def _routing(scores: Float[Array, "b l e"], choice: Int[Array, "b l k"], real: Bool[Array, "b l"]) -> Routing:
    counts = sum(jax.nn.one_hot(choice[..., i], scores.shape[-1]).sum(1) for i in range(choice.shape[-1]))
    chances = jnp.where(real[..., None], jax.nn.softmax(scores, axis=-1), 0).sum(1)
    z = jnp.where(real, jnp.square(jax.nn.logsumexp(scores, axis=-1)), 0).sum(1)
    return Routing(jnp.asarray(counts), chances, z)


def _mix(
    x: Float[Array, "b l d"],
    choice: Int[Array, "b l k"],
    share: Float[Array, "b l k"],
    weights: tuple[jax.Array, jax.Array, jax.Array],
    act: Act,
    kernel: str,
) -> Float[Array, "b l d"]:
    """The experts at hand on all tokens; a choice that is none of them adds nothing."""
    flat, k = x.reshape(-1, x.shape[-1]), choice.shape[-1]
    run: Any = _dense if kernel == "dense" else functools.partial(_sorted, kernel=kernel)
    return run(flat, choice.reshape(-1, k), share.reshape(-1, k), weights, act=act).reshape(x.shape)


def _dense(x: jax.Array, choice: jax.Array, share: jax.Array, weights: tuple[jax.Array, ...], *, act: Act) -> jax.Array:
    """Every expert on every token, most of them for nothing."""
    gate, inner, outer = weights
    chosen = jax.nn.one_hot(choice, gate.shape[0], dtype=jnp.float32)
    by_expert = jnp.einsum("tk,tke->te", share, chosen).astype(x.dtype)
    hidden = act(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, inner)
    return jnp.einsum("tef,efd->td", hidden * by_expert[..., None], outer)


def _sorted(
    x: jax.Array, choice: jax.Array, share: jax.Array, weights: tuple[jax.Array, ...], *, act: Act, kernel: Any
) -> jax.Array:
    """Tokens sorted by expert; each meets its own."""
    gate, inner, outer = weights
    flat = choice.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.bincount(flat, length=gate.shape[0] + 1)[:-1].astype(jnp.int32)
    rows = rows_of_groups(spread(x, order, inverse), sizes)
    hidden = act(grouped_product(rows, gate, sizes, kernel)) * grouped_product(rows, inner, sizes, kernel)
    made = grouped_product(rows_of_groups(hidden, sizes), outer, sizes, kernel)
    back = permute(rows_of_groups(made, sizes), order=inverse, inverse=order).reshape(*choice.shape, -1)
    return jnp.einsum("tkd,tk->td", back, share.astype(jnp.float32), preferred_element_type=jnp.float32).astype(x.dtype)


def _island(mesh: Mesh, mix: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`mix` with every device's own experts, of tokens brought to them."""
    experts, mlp, batch, width = (mesh.axes_of(name) for name in ("experts", "mlp", "batch", "expert_embed"))
    shared = tuple(a for a in experts if a in batch)
    summed = tuple(a for a in (*experts, *mlp) if a not in batch)

    def local(x: jax.Array, choice: jax.Array, share: jax.Array, weights: tuple[jax.Array, ...]) -> jax.Array:
        if shared:
            x, choice, share = (jax.lax.all_gather(a, shared, axis=0, tiled=True) for a in (x, choice, share))
        if width:  # here and not before, so that gradients come back as a reduce-scatter
            weights = tuple(
                jax.lax.all_gather(w, width, axis=axis, tiled=True) for w, axis in zip(weights, (1, 1, 2), strict=True)
            )
        here = weights[0].shape[0]
        own = choice - (jax.lax.axis_index(experts) * here if experts else 0)
        out = mix(x, jnp.where((own >= 0) & (own < here), own, here), share, weights)
        if summed:
            out = jax.lax.psum(out, summed)
        return jax.lax.psum_scatter(out, shared, scatter_dimension=0, tiled=True) if shared else out

    rows = PartitionSpec(batch or None)
    inward, outward = (
        PartitionSpec(*(axes or None for axes in x)) for x in ((experts, width, mlp), (experts, mlp, width))
    )
    return jax.shard_map(
        local,
        mesh=mesh.devices,
        in_specs=(rows, rows, rows, (inward, inward, outward)),
        out_specs=rows,
        check_vma=False,
    )


def _each(init: Initializer) -> Initializer:
    """Every expert drawn by itself."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.vmap(lambda one: init(one, shape[1:], dtype))(jax.random.split(key, shape[0]))

    return draw
