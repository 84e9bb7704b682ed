"""A user's history with gaps, filled in from both sides (BERT4Rec: Sun et al. 2019, arXiv 1904.06690).

The same composition as `recjax.models.sequence`, but for what stands in a gap. Which items are hidden is decided when
feeding (`Feed.mask_rate`); the next item is a gap after the last event, which the model adds by itself.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from recjax.core.module import Rngs, param
from recjax.models.sequence import Encoder, Sequence, layout_of
from recjax.nn.embed import PAD, lookup_and_pass
from recjax.nn.layout import Layout
from recjax.nn.transformer import INIT_STD


class MaskedSequence(Sequence):
    """Model of hidden items; its encoder must have `causal` False, other arguments are those of `Sequence`.

    In training `hidden` at a slot stands for the item hidden there. Otherwise (no `masked` in the batch) a row is one
    history, and `hidden` at its last event stands for the item after it, as in any other sequence model; what it is
    at earlier slots has no use.
    """

    causal: ClassVar[bool] = False
    packs: ClassVar[bool] = False

    def __init__(
        self,
        *,
        num_rows: int,
        encoder: Encoder,
        max_length: int = 200,
        embedding_dropout: float = 0.0,
        scale_embedding: bool = False,
        normalize: bool = False,
        rngs: Rngs,
    ) -> None:
        super().__init__(
            num_rows=num_rows,
            encoder=encoder,
            max_length=max_length,
            embedding_dropout=embedding_dropout,
            scale_embedding=scale_embedding,
            normalize=normalize,
            rngs=rngs,
        )
        self.mask = param(rngs, (encoder.width,), (None,), nnx.initializers.normal(INIT_STD))

    def __call__(self, batch: dict[str, Any], *, train: bool, key: Key[Array, ""] | None) -> dict[str, jax.Array]:
        """`hidden` [b, l, d] and `table` [v, d]; reads `history_ids`, `positions`, `segment_ids` and `masked`."""
        if "masked" in batch:
            return self._fill(batch["history_ids"], batch["masked"] > 0, layout_of(batch), train, key)
        ids, segments = batch["history_ids"], batch["segment_ids"]
        events = (segments > 0).sum(1, keepdims=True)
        slots = jnp.arange(ids.shape[1] + 1, dtype=jnp.int32)[None]
        # A full history gives its oldest event for the mask, which then has the last position known from training.
        cut = events >= (self.max_length or ids.shape[1] + 1)
        positions = jnp.maximum(slots - cut, 0)
        kept = (slots <= events) & ((slots > 0) | ~cut)
        ids = jnp.pad(ids, ((0, 0), (0, 1)))
        out = self._fill(ids, slots == events, Layout(positions, kept.astype(jnp.int32)), train, key)
        return {**out, "hidden": out["hidden"][:, 1:]}

    def _fill(self, ids: jax.Array, masked: jax.Array, layout: Layout, train: bool, key: Any) -> dict[str, jax.Array]:
        x, table = lookup_and_pass(self.table[...], ids)
        x = jnp.where(masked[..., None], self.mask[...][None, None].astype(x.dtype), x)
        hidden, routing = self._encode(x, (ids != PAD) | masked, layout, train, key)
        return self._score(hidden, table) | routing
