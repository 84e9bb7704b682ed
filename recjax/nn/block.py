"""One block of a transformer: attention, cross-attention and feed-forward, each of them added to the stream.

The same block is called on whole rows, asked about a few slots of them, extended by single tokens, and branched into
several continuations.
"""

import functools
from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from recjax.core.module import Module, Rngs, param
from recjax.core.sharding import constrain
from recjax.nn.cached import Added, Branches, Kept
from recjax.nn.config import TransformerConfig, initializers
from recjax.nn.dropout import dropout
from recjax.nn.ffn import FeedForward
from recjax.nn.heads import CrossAttention, SelfAttention
from recjax.nn.hstu import PointwiseAttention
from recjax.nn.layout import Layout, Source
from recjax.nn.linear import linear
from recjax.nn.moe import Moe, Routing
from recjax.nn.norm import Norm
from recjax.nn.projections import take_slots


class Gate(Module):
    """sigmoid(x W + b), by which what is added to x is multiplied."""

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        width = config.width
        self.weight = param(rngs, (width, width), ("embed", None), initializers(config).inner)
        self.bias = param(rngs, (width,), (None,), nnx.initializers.zeros) if config.bias else None

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Between 0 and 1, of the dtype of `x`."""
        return jax.nn.sigmoid(linear(x, self.weight[...], None if self.bias is None else self.bias[...]))


class Block(Module):
    """Attention, with `cross` that to another stack, and unless `ffn` is "none" feed-forward.

    Each is added to the stream, normalised before or after. `shared` in all methods is what the layers of a stack have
    in common about pairs of slots: buckets of time (hstu) or a bias (t5).
    """

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        c = self.config = config
        init = initializers(c)
        make_norm = functools.partial(Norm, kind=c.norm, width=c.width, bias=c.bias, epsilon=c.norm_epsilon, rngs=rngs)
        is_gated = c.residual == "gated"
        self.attention_norm = make_norm()
        self.attention: Any = (SelfAttention if c.attention == "softmax" else PointwiseAttention)(c, rngs=rngs)
        self.attention_gate = Gate(c, rngs=rngs) if is_gated else None
        if c.cross:
            self.cross_norm = make_norm()
            self.cross = CrossAttention(c, rngs=rngs)
            self.cross_gate = Gate(c, rngs=rngs) if is_gated else None
        if c.ffn != "none":
            self.ffn_norm = make_norm()
            sizes: Any = {"kind": c.ffn, "width": c.width, "mlp_width": c.inner_width}
            sizes |= {"init": init.inner, "out_init": init.outer, "rngs": rngs}
            self.ffn = FeedForward(bias=c.bias, **sizes) if c.moe is None else Moe(c.moe, **sizes)
            self.ffn_gate = Gate(c, rngs=rngs) if is_gated else None

    def __call__(
        self, x: Float[Array, "b l d"], layout: Layout, shared: Any, source: Source | None, rate: Any, keys: Any
    ) -> tuple[Float[Array, "b l d"], tuple[Kept | None, Kept | None], Routing | None]:
        """The stream, and what later tokens need of this one's and of the `source`'s (hstu keeps nothing).

        The third is what the router of experts did, if there is one.

        `rate` is the residual dropout of this layer, `keys` its dropout keys or None when not training: two for each
        attention, one for the feed-forward.
        """
        c = self.config
        keys = (None,) * 5 if keys is None else tuple(keys)
        rate, crossed = rate if any(c.dropout_rates) else 0.0, None
        # hstu drops inside, before its output weights
        inner_rate, out_rate = (rate, 0.0) if c.attention == "hstu" else (c.attention_dropout, rate)
        y, kept = self.attention(self._view(x, self.attention_norm), layout, shared, inner_rate, keys[0])
        x = self._add(x, _drop(y, out_rate, keys[1]), self.attention_norm, self.attention_gate)
        if source is not None:
            y, crossed = self.cross(self._view(x, self.cross_norm), layout, source, c.attention_dropout, keys[3])
            x = self._add(x, _drop(y, rate, keys[4]), self.cross_norm, self.cross_gate)
        x, routing = self._feed_forward(x, rate, keys[2], layout.segments > 0)
        return constrain(x, "batch", "length", None), (kept, crossed), routing

    def at(
        self, x: Float[Array, "b l d"], layout: Layout, shared: Any, source: Source | None, slots: Int[Array, "b q"]
    ) -> Float[Array, "b q d"]:
        """What calling it gives at some slots when not training; only they go through what follows the attention."""
        y = self.attention.at(self._view(x, self.attention_norm), layout, shared, slots)
        here = self._add(take_slots(x, slots), y, self.attention_norm, self.attention_gate)
        if source is not None:
            y, _ = self.cross(self._view(here, self.cross_norm), layout.at(slots), source, 0.0, None)
            here = self._add(here, y, self.cross_norm, self.cross_gate)
        return self._feed_forward(here, 0.0, None)[0]

    def kept(self, x: Float[Array, "b l d"], layout: Layout, source: Source | None) -> tuple[Kept | None, Kept | None]:
        """What later tokens need, alone."""
        crossed = None if source is None else self.cross.kept(source.hidden)
        return self.attention.kept(self._view(x, self.attention_norm), layout), crossed

    def extend(
        self,
        x: Float[Array, "b m d"],
        positions: Int[Array, "b m"],
        kept: tuple[Kept, Kept, Kept | None],
        step: ArrayLike,
        added: Added,
    ) -> tuple[Float[Array, "b m d"], Kept]:
        """One more token for each beam, and the beams' own kept tokens with it.

        `kept` are the beams' own, those of the prompt, and those of the source.
        """
        own, prompt, crossed = kept
        y, own = self.attention.extend(self._view(x, self.attention_norm), positions, prompt, own, step, added)
        x = self._add(x, y, self.attention_norm, self.attention_gate)
        if crossed is not None and added.source is not None:
            y = self.cross.recall(self._view(x, self.cross_norm), crossed, added.source)
            x = self._add(x, y, self.cross_norm, self.cross_gate)
        return self._feed_forward(x, 0.0, None)[0], own

    def branch(
        self, x: Float[Array, "b n d"], branches: Branches, prompt: Kept, slots: Int[Array, "b m"] | None = None
    ) -> Float[Array, "b _ d"]:
        """The tokens of continuations whose prompt was kept: all of them, or one of each, that at `slots`."""
        y = self.attention.branch(self._view(x, self.attention_norm), branches, prompt, slots)
        here = x if slots is None else take_slots(x, slots)
        return self._feed_forward(self._add(here, y, self.attention_norm, self.attention_gate), 0.0, None)[0]

    def _feed_forward(
        self, x: jax.Array, rate: Any, key: Any, real: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        if self.config.ffn == "none":
            return x, None
        view, routing = self._view(x, self.ffn_norm), None
        if isinstance(self.ffn, Moe):
            y, routing = self.ffn(view, real)
        else:
            y = self.ffn(view)
        return self._add(x, _drop(y, rate, key), self.ffn_norm, self.ffn_gate), routing

    def _view(self, x: jax.Array, norm: Norm) -> jax.Array:
        """The stream as a part sees it."""
        return x if self.config.place == "post" else norm(x)

    def _add(self, x: jax.Array, y: jax.Array, norm: Norm, gate: Gate | None) -> jax.Array:
        """The stream with what a part makes of it."""
        x = x + (y if gate is None else gate(x) * y)
        return norm(x) if self.config.place == "post" else x


def _drop(x: jax.Array, rate: Any, key: Any) -> jax.Array:
    return x if key is None else dropout(x, rate, key)
