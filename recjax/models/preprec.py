"""PrepRec: items described by how popular they have been lately, and by nothing else.

No parameter belongs to an item, a user or a log, so that a model trained on one log ranks the items of any other one
(Wang, Rathi and Sundaram 2024, arXiv 2401.01497). What it reads instead of item vectors are the popularity tables of
`recjax.data.popularity`, which come with the batch as facts. An item has another vector at every time: the model
must be told when the next item is asked for (`query_time`), and cannot be served from histories alone.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from recjax.core.errors import ConfigError
from recjax.core.flops import TokenFlops, per_token
from recjax.core.module import Module, Rngs, param
from recjax.core.sharding import active, constrain
from recjax.nn.layout import Layout
from recjax.nn.transformer import TransformerConfig

GAP_RANKS = ("window", "past", "none")
GAPS = ("before", "after")
ENDS = ("start", "end")


class Tables(NamedTuple):
    """Percentiles [v, periods] as shares of the largest value of their type, and what period a time is in."""

    coarse: jax.Array
    fine: jax.Array
    origin: jax.Array
    coarse_seconds: jax.Array
    fine_seconds: jax.Array

    @classmethod
    def of(cls, batch: dict[str, Any]) -> "Tables":
        """The facts of a batch; raises `ConfigError` where there are none, or where no time is told to use them at."""
        names = [f"item/{name}" for name in ("coarse", "fine", "popularity_origin", "coarse_seconds", "fine_seconds")]
        if not all(name in batch for name in names):
            raise ConfigError(
                "PrepRec knows nothing of how popular items are",
                where="Recipe.facts",
                expected="popularity.Dynamics",
                mend="recipe.Recipe.facts = [@popularity.Dynamics()]",
            )
        if "query_time" not in batch:
            raise ConfigError(
                "PrepRec is not told when the next item is asked for",
                where="Feed.times",
                expected="'target'",
                mend="pipeline.Feed.times = 'target'",
            )
        return cls(*(batch[name] for name in names))

    def periods(self, times: Int[Array, "*n"]) -> tuple[Int[Array, "*n"], Int[Array, "*n"]]:
        """The coarse and the fine period of each time. Differences of 32-bit times are right beyond 2038 too."""
        since = times.astype(jnp.int32) - self.origin
        return jnp.floor_divide(since, self.coarse_seconds), jnp.floor_divide(since, self.fine_seconds)


class PrepRec(Module):
    """Causal model of histories of popularity; packed and padded rows alike.

    An item is its percentiles in the latest `coarse_history` whole coarse periods before a time and in the latest
    whole fine one, each spread over `coarse_bins` + 1 or `fine_bins` + 1 numbers; 0 bins leave a horizon out. Two
    layers make a vector of it, the same for histories, targets and candidates.

    Beside its place, counted from the "start" or from the "end" of the window, each event has the rank of a gap as a
    sinusoid: of the time since the event "before" it or of that until the query "after" it. `gap_rank` "window" ranks
    it among the gaps of the whole window, "past" among those up to the event, and "none" leaves it out. "end" and
    "window" are the published choices: in training an event then knows how many events follow it in its window, and
    how their gaps compare to its own. `num_rows` is not used.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        encoder: TransformerConfig,
        coarse_bins: int = 10,
        fine_bins: int = 5,
        coarse_history: int = 12,
        item_width: int | None = None,
        gap_rank: str = "window",
        gap: str = "before",
        count_from: str = "start",
        rngs: Rngs,
    ) -> None:
        self.features = coarse_history * _numbers(coarse_bins) + _numbers(fine_bins)
        if min(coarse_bins, fine_bins) < 0 or coarse_history < 1 or not self.features:
            raise ConfigError(
                f"PrepRec.coarse_bins = {coarse_bins}, fine_bins = {fine_bins}, coarse_history = {coarse_history}",
                expected="bins of at least one horizon, and a history of at least 1",
            )
        choices = {"gap_rank": (gap_rank, GAP_RANKS), "gap": (gap, GAPS), "count_from": (count_from, ENDS)}
        for name, (chosen, known) in choices.items():
            if chosen not in known:
                raise ConfigError(f"PrepRec.{name} = {chosen!r}", expected=" or ".join(map(repr, known)))
        if encoder.position in ("learned", "learned_rotary"):
            raise ConfigError(
                f"TransformerConfig.position = {encoder.position!r}",
                where="PrepRec.encoder",
                expected='"none" or "rotary": positions of PrepRec are fixed sinusoids',
            )
        self.coarse_bins, self.fine_bins, self.coarse_history = coarse_bins, fine_bins, coarse_history
        self.gap_rank, self.gap, self.count_from, self.config = gap_rank, gap, count_from, encoder
        inner, width = item_width or 2 * encoder.width, encoder.width
        xavier, zeros = nnx.initializers.xavier_normal(), nnx.initializers.zeros
        self.inner = param(rngs, (self.features, inner), (None, "mlp"), xavier)
        self.inner_bias = param(rngs, (inner,), ("mlp",), zeros)
        self.outer = param(rngs, (inner, width), ("mlp", "embed"), xavier)
        self.outer_bias = param(rngs, (width,), (None,), zeros)
        self.encoder = encoder.make(rngs=rngs)

    def __call__(self, batch: dict[str, Any], *, train: bool, key: Key[Array, ""] | None) -> dict[str, Any]:
        """`hidden` [b, l, d], and the `table` it is scored against, whose vectors are those of the time asked for.

        In training the table is an object whose `rows(ids [b, l, n])` gives the vectors [b, l, n, d] of items at each
        slot's `query_time`; otherwise an array [b q, v, d] for the queries at the slots `query_at` [b, q], by default
        the last event of each row. Reads `history_ids`, `history_time`, `query_time`, `positions`, `segment_ids` and
        the facts, and no target.
        """
        ids, positions, segments = batch["history_ids"], batch["positions"], batch["segment_ids"]
        tables = Tables.of(batch)
        times, query_times = batch["history_time"], batch["query_time"]
        x = self.vectors(tables, ids[..., None], times)[:, :, 0]
        places = positions if self.count_from == "start" else from_end(segments)
        x = x + sinusoid(places, self.config.width)
        if self.gap_rank != "none":
            gaps = gaps_before(times, segments) if self.gap == "before" else query_times - times
            x = x + sinusoid(ranks(gaps, segments, is_causal=self.gap_rank == "past"), self.config.width)
        x = constrain(jnp.where((segments > 0)[..., None], x, 0), "batch", "length", None)
        layout = Layout(positions, segments, times, query_times)
        hidden = self.encoder(x, layout, train=train, key=key) * self.config.logit_scale
        if train:
            return {"hidden": hidden, "table": ItemsInTime(self, tables, query_times)}
        at = batch["query_at"] if "query_at" in batch else jnp.sum(segments > 0, axis=1)[:, None] - 1
        asked = jnp.take_along_axis(query_times, jnp.maximum(at, 0), axis=1).reshape(-1)
        return {"hidden": hidden, "table": self.catalogues(tables, asked)}

    def vectors(self, tables: Tables, ids: Int[Array, "b l n"], times: Int[Array, "b l"]) -> Float[Array, "b l n d"]:
        """Vectors of the items `ids` as they were at each slot's time."""
        coarse, fine = tables.periods(times[..., None, None])
        at = coarse - self.coarse_history + jnp.arange(self.coarse_history)[None, None, None]
        rows = ids[..., None]
        known = _at(tables.coarse, rows, at), _at(tables.fine, rows, fine - 1)
        weights = self._weights()
        return item_vectors(weights, self._features(*known))

    def catalogues(self, tables: Tables, times: Int[Array, " b"]) -> Float[Array, "b v d"]:
        """Vectors of all items at each of some times.

        Times of the same two periods share one computation, and rows may lie on several devices.
        """
        weights = self._weights()
        mesh = active()
        if mesh is None:
            return self._catalogues(tables, weights, times)
        batch = P(mesh.axes_of("batch") or None)
        island = jax.shard_map(
            self._catalogues, mesh=mesh.devices, in_specs=(P(), P(), batch), out_specs=batch, check_vma=False
        )
        return island(tables, weights, times)

    def _catalogues(self, tables: Tables, weights: Any, times: jax.Array) -> jax.Array:
        """The hidden layer is a sum over both horizons: that of the coarse one is made once for each coarse period."""
        coarse, fine = tables.periods(times)
        order = jnp.lexsort((fine, coarse))
        coarse, fine = coarse[order], fine[order]
        starts = jnp.arange(times.shape[0]) == 0
        group = _numbered(starts | (coarse != jnp.roll(coarse, 1)))
        pair = _numbered(starts | (coarse != jnp.roll(coarse, 1)) | (fine != jnp.roll(fine, 1)))
        inner, inner_bias, outer, outer_bias = weights
        cut = self.features - _numbers(self.fine_bins)

        def by_coarse(g: jax.Array, out: jax.Array) -> jax.Array:
            first, end = _first(group, g), _first(group, g + 1)
            at = coarse[first] - self.coarse_history + jnp.arange(self.coarse_history)
            lasting = self._part(_columns(tables.coarse, at), self.coarse_bins, inner[:cut]) + inner_bias[None]

            def by_fine(k: jax.Array, out: jax.Array) -> jax.Array:
                before = fine[_first(pair, k)][None] - 1
                hidden = lasting + self._part(_columns(tables.fine, before), self.fine_bins, inner[cut:])
                items = jax.nn.relu(hidden) @ outer + outer_bias[None]
                return jax.lax.dynamic_update_index_in_dim(out, items, k, 0)

            return jax.lax.fori_loop(pair[first], pair[end - 1] + 1, by_fine, out)

        out = jnp.zeros((times.shape[0], tables.coarse.shape[0], self.config.width), jnp.float32)
        out = jax.lax.fori_loop(0, group[-1] + 1, by_coarse, out)
        return out[jnp.zeros_like(pair).at[order].set(pair)]

    def _part(self, percent: jax.Array, bins: int, weights: jax.Array) -> jax.Array:
        """What percentiles [v, n] add to the hidden layer, [v, inner]."""
        if not bins:
            return jnp.zeros((1, weights.shape[1]))
        return spread(percent, bins).reshape(percent.shape[0], -1) @ weights

    def _features(self, coarse: jax.Array, fine: jax.Array) -> jax.Array:
        """[..., features] from percentiles [..., coarse_history] and [..., 1]."""
        parts = [
            spread(percent, bins).reshape(*percent.shape[:-1], -1)
            for percent, bins in ((coarse, self.coarse_bins), (fine, self.fine_bins))
            if bins
        ]
        return jnp.concatenate(parts, axis=-1)

    def _weights(self) -> tuple[jax.Array, ...]:
        return self.inner[...], self.inner_bias[...], self.outer[...], self.outer_bias[...]

    def token_flops(self, length: int) -> TokenFlops:
        """Training FLOPs of one target against one negative in rows of `length`."""
        c = self.config
        item = sum(math.prod(w.shape) for w in (self.inner, self.outer))
        block = c.width * c.head_width * (2 * c.num_heads + 2 * c.kv_heads) + 2 * c.width * c.inner_width
        return per_token(
            parameters=c.num_layers * block + 3 * item,
            layers=c.num_layers,
            length=length,
            width=c.num_heads * c.head_width,
            rows=2,
        )


class ItemsInTime(NamedTuple):
    """The item vectors of a model at the `times` [b, l] of a batch's slots; what sampled losses take for a table."""

    model: PrepRec
    tables: Tables
    times: jax.Array

    def rows(self, ids: Int[Array, "b l n"]) -> Float[Array, "b l n d"]:
        """Vectors of items, at each slot's time."""
        return self.model.vectors(self.tables, ids, self.times)


def spread(percent: Float[Array, "*n"], bins: int) -> Float[Array, "*n k"]:
    """A percentile as k = `bins` + 1 numbers that interpolate between 0, 100 / bins, ..., 100; all zero for 0.

    They add up to 1, at most two are not zero, and their mean of bin positions is the percentile.
    """
    places = jnp.arange(bins + 1, dtype=jnp.float32).reshape(*(1 for _ in percent.shape), -1)
    hat = jnp.maximum(0, 1 - jnp.abs(percent[..., None] * np.float32(bins / 100) - places))
    return jnp.where(percent[..., None] > 0, hat, 0)


def item_vectors(weights: tuple[jax.Array, ...], features: Float[Array, "*n f"]) -> Float[Array, "*n d"]:
    """Two layers over the features of items."""
    inner, inner_bias, outer, outer_bias = weights
    flat = features.reshape(-1, features.shape[-1])
    out = jax.nn.relu(flat @ inner + inner_bias[None]) @ outer + outer_bias[None]
    return out.reshape(*features.shape[:-1], -1)


def gaps_before(times: Int[Array, "b l"], segments: Int[Array, "b l"]) -> Int[Array, "b l"]:
    """Time since the event before, 0 for the first event of a segment."""
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    times = times.astype(jnp.int32)
    return jnp.where(starts, 0, times - jnp.roll(times, 1, axis=1))


def ranks(gaps: Int[Array, "b l"], segments: Int[Array, "b l"], *, is_causal: bool = False) -> Int[Array, "b l"]:
    """1 + how many gaps of the same segment are shorter than the event's own; 0 where padded.

    Equal gaps have equal ranks, and only their order matters, not their lengths. With `is_causal` only the gaps of
    events up to this one count.
    """
    shorter = (segments[:, :, None] == segments[:, None, :]) & (gaps[:, None, :] < gaps[:, :, None])
    if is_causal:
        shorter &= jnp.tri(gaps.shape[1], dtype=bool)[None]
    return jnp.where(segments > 0, 1 + shorter.sum(-1, dtype=jnp.int32), 0)


def from_end(segments: Int[Array, "b l"]) -> Int[Array, "b l"]:
    """How many events of the same segment come after each; 0 for the last one of a segment."""
    after = jnp.triu(jnp.ones((segments.shape[1],) * 2, bool), 1)[None]
    return (after & (segments[:, :, None] == segments[:, None, :])).sum(-1, dtype=jnp.int32)


def sinusoid(places: Int[Array, "b l"], width: int) -> Float[Array, "b l d"]:
    """sin and cos of a place over 10000^(2i / width), one after the other (Vaswani et al. 2017, section 3.5)."""
    rates = np.power(10000.0, -np.arange(0, width, 2) / width).astype(np.float32)
    angles = places.astype(jnp.float32)[..., None] * rates[None, None]
    both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return both.reshape(*places.shape, -1)[..., :width]


def _numbers(bins: int) -> int:
    return bins + 1 if bins else 0


def _numbered(starts: jax.Array) -> jax.Array:
    """The number, from 0, of the run that each element is in, where `starts` says that a new one begins."""
    return jnp.cumsum(starts) - 1


def _first(numbers: jax.Array, number: jax.Array) -> jax.Array:
    """Where `number` begins in sorted `numbers`; unlike `searchsorted` also where their count is not known yet."""
    return jnp.sum(numbers < number)


def _at(table: jax.Array, rows: jax.Array, periods: jax.Array) -> jax.Array:
    """Percentiles of `rows` at the end of `periods` (broadcast together): 0 before the log, the last one after it."""
    found = table[jnp.broadcast_to(rows, jnp.broadcast_shapes(rows.shape, periods.shape)), _inside(table, periods)]
    return jnp.where(periods >= 0, _percent(found), 0)


def _columns(table: jax.Array, periods: jax.Array) -> jax.Array:
    """[v, len(periods)]: `_at` for all rows."""
    found = jnp.take(table, _inside(table, periods), axis=1)
    return jnp.where((periods >= 0)[None], _percent(found), 0)


def _inside(table: jax.Array, periods: jax.Array) -> jax.Array:
    return jnp.clip(periods, 0, table.shape[1] - 1)


def _percent(shares: jax.Array) -> jax.Array:
    return shares.astype(jnp.float32) * np.float32(100 / np.iinfo(shares.dtype).max)
