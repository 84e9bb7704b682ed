"""Models that spell items in codes: residual k-means, and the RQ-VAE, which learns the space it clusters in.

Both read content vectors (`item/vectors`, a fact of the recipe; see `recjax.data.features`) of the items in
`item_ids`, and both leave behind the same thing, `codes` [b, c]. Neither has a row for any item, so that items that
come later are spelled by the same books. How collisions are told apart is not their matter (`recjax.data.codes`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from recjax.core.errors import ConfigError, UnservableError
from recjax.core.flops import TokenFlops, per_token
from recjax.core.module import SEEN, Module, Rngs, param
from recjax.core.rows import take_rows
from recjax.models.sequence import count_parameters
from recjax.nn.mlp import Mlp
from recjax.nn.norm import unit
from recjax.nn.quantize import Quantized, quantize, residual_kmeans

_VECTORS = "item/vectors"


class ResidualKMeans(Module):
    """Books of k-means over the content vectors, level by level (RQ-k-means); there is nothing to train.

    `content_width` is the length of a content vector, `levels` the number of codes of an item and `size` the number of
    different ones. With `unit_content` only the direction of a content vector counts: it is brought to the length
    sqrt(content_width). `normalize` brings what is left to length 1 before every level. The books are fitted by
    `iterations` of Lloyd over at most `sample` items. `collisions` is the size of a last level that numbers items
    with the same codes; with 0 they are spread over other codes of the last one.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        content_width: int,
        levels: int = 4,
        size: int = 256,
        unit_content: bool = False,
        normalize: bool = False,
        iterations: int = 50,
        sample: int = 65_536,
        collisions: int = 256,
        rngs: Rngs,
        width: int | None = None,
    ) -> None:
        least = (("content_width", content_width, 1), ("levels", levels, 1), ("size", size, 2), ("sample", sample, 1))
        for name, value, at_least in (*least, ("iterations", iterations, 1), ("collisions", collisions, 0)):
            if value < at_least:
                raise ConfigError(f"{type(self).__name__}.{name} = {value}", expected=f"at least {at_least}")
        self.content_width, self.levels, self.size, self.unit_content = content_width, levels, size, unit_content
        self.normalize, self.iterations, self.sample, self.collisions = normalize, iterations, sample, collisions
        shape = (levels, size, width or content_width)
        init = nnx.initializers.uniform(2 / size)
        self.codebooks = param(rngs, shape, (None, None, None), lambda *a: init(*a) - 1 / size)

    def encode(self, x: Float[Array, "n i"]) -> Float[Array, "n d"]:
        """The vectors that are quantised."""
        return x

    def quantize(self, z: Float[Array, "n d"]) -> Quantized:
        """Codes of encoded vectors, and what they are made of."""
        return quantize(z, self.codebooks[...], normalize=self.normalize)

    def __call__(self, batch: dict[str, Any], *, train: bool, key: Key[Array, ""] | None) -> dict[str, jax.Array]:
        """`codes` int32 [b, c], and `content` [b, i], `residuals` and `chosen` [b, c, d] (`nn.quantize`)."""
        x = self.content(batch)
        found = self.quantize(self.encode(x))
        return {
            "content": x,
            "codes": found.codes,
            "residuals": found.inputs,
            "chosen": found.chosen,
            "reconstruction": found.chosen.sum(1),
        }

    def content(self, batch: dict[str, Any]) -> Float[Array, "b i"]:
        """The content vectors of the items of a batch, as they are encoded; `UnservableError` for a batch of users."""
        if "item_ids" not in batch:
            raise UnservableError(f"a {type(self).__name__} spells items and answers no user", mend="infer codes")
        return self._scaled(take_rows(self._checked(batch), batch["item_ids"])[0])

    def fit(self, facts: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """Books by k-means over the encoded vectors of the catalogue; items without content do not count."""
        x = self._checked(facts)
        sample_key, books_key = jax.random.split(key)
        real = jnp.any(x != 0, axis=1)
        if x.shape[0] > self.sample:
            drawn = jnp.where(real, jax.random.uniform(sample_key, real.shape), -1)
            rows = jax.lax.top_k(drawn, self.sample)[1]
            x, real = jnp.take(x, rows, axis=0), jnp.take(real, rows)
        books = residual_kmeans(
            self.encode(self._scaled(x)),
            real.astype(jnp.float32),
            levels=self.levels,
            size=self.size,
            key=books_key,
            iterations=self.iterations,
            normalize=self.normalize,
        )
        return {"codebooks": books}

    def token_flops(self, length: int) -> TokenFlops:
        """Training FLOPs of one item: its weights, and its distances to all codes."""
        parameters = sum(count_parameters(nnx.to_pure_dict(nnx.state(self))).values())
        return per_token(parameters=parameters, layers=0, length=length, width=0, rows=0)

    def _scaled(self, x: jax.Array) -> jax.Array:
        return math.sqrt(self.content_width) * unit(x) if self.unit_content else x

    def _checked(self, facts: Mapping[str, Any]) -> jax.Array:
        if _VECTORS not in facts:
            mend = "Recipe.facts = [@features.TitleVectors()], or features.ItemVectors"
            raise ConfigError("codes are made from content, and the recipe has none", expected=_VECTORS, mend=mend)
        vectors = facts[_VECTORS]
        if vectors.shape[1] != self.content_width:
            raise ConfigError(
                f"{type(self).__name__}.content_width = {self.content_width}",
                expected=f"{vectors.shape[1]}, the length of the content vectors",
            )
        return vectors


class RqVae(ResidualKMeans):
    """An autoencoder with a residual quantiser in its middle (Zeghidour et al. 2021; semantic ids: Rajput et al. 2023).

    Layers of `hidden` units bring content down to `width`, and up again in the opposite order. The decoder is given
    z + sg(sum_l e_l - z). Books start as k-means of what the fresh encoder gives, and move by gradients
    (`losses.codes`); with `ema` they are moving averages, of that decay, of what their codes are given. A code
    that no item of `revive_after` steps in a row has chosen becomes what an item of the batch has left at its level
    (0: never); codes in use are not touched by that.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        content_width: int,
        hidden: Sequence[int] = (512, 256, 128),
        width: int = 32,
        ema: float | None = None,
        revive_after: int = 20,
        rngs: Rngs,
        **books: Any,
    ) -> None:
        super().__init__(num_rows=num_rows, content_width=content_width, width=width, rngs=rngs, **books)
        if self.normalize:
            raise ConfigError("an RqVae adds up what its levels chose", expected="normalize = False")
        if revive_after < 0 or (ema is not None and not 0 <= ema < 1):
            raise ConfigError(
                f"RqVae.revive_after = {revive_after}, ema = {ema}", expected="0 or more; 0 <= ema < 1, or None"
            )
        self.ema, self.revive_after = ema, revive_after
        self.encoder = Mlp((content_width, *hidden, width), rngs=rngs)
        self.decoder = Mlp((width, *tuple(hidden)[::-1], content_width), rngs=rngs)
        zeros, counts = nnx.initializers.zeros, (self.levels, self.size)
        self.idle = param(rngs, counts, (None, None), zeros, trained=False)
        if ema is not None:
            self.count = param(rngs, counts, (None, None), zeros, trained=False)
            self.total = param(rngs, (*counts, width), (None, None, None), zeros, trained=False)

    def encode(self, x: Float[Array, "n i"]) -> Float[Array, "n d"]:
        """z."""
        return self.encoder(x)

    def __call__(self, batch: dict[str, Any], *, train: bool, key: Key[Array, ""] | None) -> dict[str, jax.Array]:
        """As for `ResidualKMeans`, with `reconstruction` [b, i] from the decoder."""
        x = self.content(batch)
        z = self.encode(x)
        found = self.quantize(z)
        through = z + jax.lax.stop_gradient(found.chosen.sum(1) - z)
        out = {
            "content": x,
            "codes": found.codes,
            "residuals": found.inputs,
            "chosen": found.chosen if self.ema is None else jax.lax.stop_gradient(found.chosen),
            "reconstruction": self.decoder(through),
        }
        if train and key is not None:
            out |= {SEEN + name: jax.lax.stop_gradient(value) for name, value in self._seen(found, key).items()}
        return out

    def fit(self, facts: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """As for `ResidualKMeans`; moving averages start as one item on each centre."""
        values = super().fit(facts, key)
        if self.ema is not None:
            values |= {"count": jnp.ones_like(self.count[...]), "total": jnp.copy(values["codebooks"])}
        return values

    def maintain(self, seen: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        """Moving averages, and new rows for codes that nobody has chosen for long."""
        count, books = seen["count"].sum(0), self.codebooks[...]
        idle = jnp.where(count > 0, 0, self.idle[...] + 1)
        values = {}
        if self.ema is not None:
            values["count"] = self.ema * self.count[...] + (1 - self.ema) * count
            values["total"] = self.ema * self.total[...] + (1 - self.ema) * seen["total"].sum(0)
            books = values["total"] / jnp.maximum(values["count"], 1e-6)[..., None]
        if self.revive_after:
            dead = idle >= self.revive_after
            parts, places = seen["drawn"].shape[0], jnp.arange(self.size)
            drawn = seen["drawn"][places % parts, :, places].swapaxes(0, 1)
            books, idle = jnp.where(dead[..., None], drawn, books), jnp.where(dead, 0, idle)
            if self.ema is not None:
                values["count"] = jnp.where(dead, 1, values["count"])
                values["total"] = jnp.where(dead[..., None], drawn, values["total"])
        return {**values, "codebooks": books, "idle": idle}

    def _seen(self, found: Quantized, key: jax.Array) -> dict[str, jax.Array]:
        """How often each code was chosen, what a dead one could become and, for moving averages, what they average."""
        one_hot = jax.nn.one_hot(found.codes, self.size)
        seen = {"count": one_hot.sum(0)}
        if self.revive_after:
            order = jax.vmap(lambda k: jax.random.permutation(k, found.codes.shape[0]))(
                jax.random.split(key, self.levels)
            )
            rows = order[:, jnp.arange(self.size) % order.shape[1]]
            seen["drawn"] = found.inputs[rows, jnp.arange(self.levels)[:, None]]
        if self.ema is not None:
            seen["total"] = jnp.einsum("bcw,bcd->cwd", one_hot, found.inputs, precision=jax.lax.Precision.HIGHEST)
        return seen
