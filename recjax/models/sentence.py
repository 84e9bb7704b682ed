"""One vector for a text: a BERT and the mean of its outputs.

The encoder of sentence-transformers such as MiniLM (Reimers and Gurevych 2019, arXiv 1908.10084), whose checkpoints
`recjax.bridge.bert` reads. It makes content vectors of items; nothing here trains it.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from recjax.core.module import Module, Rngs, param
from recjax.core.rows import take_rows
from recjax.nn.config import TransformerConfig
from recjax.nn.embed import PAD
from recjax.nn.layout import Layout
from recjax.nn.norm import Norm, unit
from recjax.nn.transformer import INIT_STD

Pool = Literal["mean", "first"]


def bert_stack(
    *, num_layers: int, width: int, num_heads: int, mlp_width: int, norm_epsilon: float = 1e-12, dropout: float = 0.0
) -> TransformerConfig:
    """The blocks of BERT (Devlin et al. 2018, arXiv 1810.04805): normalised after each part, seen from both sides."""
    return TransformerConfig(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        mlp_width=mlp_width,
        norm_epsilon=norm_epsilon,
        place="post",
        final_norm=False,
        position="learned",
        causal=False,
        dropout=dropout,
    )


class SentenceEncoder(Module):
    """Vectors of texts of up to `max_length` tokens; 0 is padding.

    `pool` "mean" is the mean over the tokens of a text, "first" the vector of its first token. `normalize` makes
    vectors of length one.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        encoder: TransformerConfig,
        max_length: int = 512,
        pool: Pool = "mean",
        normalize: bool = True,
        rngs: Rngs,
    ) -> None:
        c = self.config = encoder
        self.max_length, self.pool, self.normalize = max_length, pool, normalize
        normal = nnx.initializers.normal(INIT_STD)
        self.table = param(rngs, (num_rows, c.width), ("items", "item_width"), normal)
        self.position = param(rngs, (max_length, c.width), (None, "embed"), normal)
        self.entry_norm = Norm(kind="layer", width=c.width, bias=True, epsilon=c.norm_epsilon, rngs=rngs)
        self.encoder = c.make(rngs=rngs)

    def __call__(self, batch: dict[str, Any], *, train: bool, key: Key[Array, ""] | None) -> dict[str, jax.Array]:
        """`hidden` [b, d] float32 of the texts `tokens` [b, t], which are padded on the right."""
        ids = batch["tokens"]
        real = ids != PAD
        x, _ = take_rows(self.table[...], ids)
        x = self.entry_norm(x + self.position[: ids.shape[1]][None])
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        encoder: Any = self.encoder
        hidden = encoder(x, Layout(positions, real.astype(jnp.int32)), train=train, key=key).astype(jnp.float32)
        if self.pool == "first":
            pooled = hidden[:, 0]
        else:
            total = jnp.where(real[..., None], hidden, 0).sum(1)
            pooled = total / jnp.maximum(real.sum(1, keepdims=True), 1)
        return {"hidden": unit(pooled) if self.normalize else pooled}
