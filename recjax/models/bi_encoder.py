"""Two towers on one text encoder: queries and items are both read, and meet as vectors.

The dense retriever that generative search is measured against (Karpukhin et al. 2020, arXiv 2004.04906): a query and a
title go through the same words and the same blocks, and the output at the last word stands for the whole. No item has
a parameter of its own, so that new items can be found at once. What comes of it is one table, and `models.folded.fold`
makes the plain model that has it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from recjax.models.folded import FoldedSequence
from recjax.nn.embed import PAD, lookup_and_pass
from recjax.nn.layout import Layout


class BiEncoder(FoldedSequence):
    """`Sequence` over tokens whose item vectors are what it makes of their titles.

    `item/text` int32 [v, t] are the tokens of the title of every item row (`recjax.data.features.TitleTokens`); a row
    without any keeps a vector of its own, as do the tokens of texts. Every title of the catalogue is read in every
    step. Dropout acts on queries and histories alone. Everything else is as in `Sequence`.
    """

    by_item = False  # titles are spelt in rows of the table that items are rows of

    def item_table(self, batch: dict[str, Any]) -> jax.Array:
        """[v, d]: titles as the output at their last token, the other rows as they are."""
        ids = batch["item/text"]
        real = ids != PAD
        x, own = lookup_and_pass(self.table[...], ids)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        layout = Layout(jnp.where(real, positions, 0), real.astype(jnp.int32))
        read, _ = self._encode(x, real, layout, train=False, key=None)
        last = jnp.maximum(real.sum(1) - 1, 0)
        titles = jnp.take_along_axis(read, last[:, None, None], axis=1)[:, 0].astype(own.dtype)
        items = jnp.where(real.any(1)[:, None], titles, own[: len(ids)])
        return jnp.concatenate([items, own[len(ids) :]])
