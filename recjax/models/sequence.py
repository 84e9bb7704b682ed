"""A user's history to the next item: item table, positions, transformer.

One composition serves SASRec, LSRM and every other id-based sequence model. It returns hidden vectors and the table
they are scored against, never logits over the catalogue: an objective or an evaluator makes those in chunks.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from recjax.core.errors import ConfigError
from recjax.core.flops import TokenFlops, per_token
from recjax.core.module import Module, Params, Rngs, param
from recjax.core.sharding import constrain
from recjax.nn.dropout import dropout
from recjax.nn.embed import PAD, lookup_and_pass
from recjax.nn.layout import Layout
from recjax.nn.norm import unit
from recjax.nn.transformer import INIT_STD, TransformerConfig


class Sequence(Module):
    """Causal model of item histories; packed and padded rows alike.

    `max_length` is the number of learned positions, counted within an example; the attribute is None where positions
    are not learned. `scale_embedding` multiplies item vectors by sqrt(width) before positions are added (SASRec).
    `normalize` scores by cosine: `hidden` and `table` come as unit vectors, in training, evaluation and bundle alike;
    an objective then wants a temperature.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        encoder: TransformerConfig,
        max_length: int = 200,
        embedding_dropout: float = 0.0,
        scale_embedding: bool = False,
        normalize: bool = False,
        rngs: Rngs,
    ) -> None:
        if not 0 <= embedding_dropout < 1 or max_length < 1:
            raise ConfigError(
                f"Sequence.embedding_dropout = {embedding_dropout}, max_length = {max_length}",
                expected="a rate in [0, 1) and a length of at least 1",
            )
        c = self.config = encoder
        self.embedding_dropout, self.scale_embedding = embedding_dropout, scale_embedding
        self.normalize = normalize
        normal = nnx.initializers.normal(INIT_STD)
        self.table = param(rngs, (num_rows, c.width), ("items", None), normal)
        self.head = None if c.tied_head else param(rngs, (num_rows, c.width), ("items", None), normal)
        learned = c.position in ("learned", "learned_rotary")
        self.max_length = max_length if learned else None
        self.position = param(rngs, (max_length, c.width), (None, "embed"), normal) if learned else None
        self.encoder = c.make(rngs=rngs)

    def __call__(self, batch: dict[str, Any], *, train: bool, key: Key[Array, ""] | None) -> dict[str, jax.Array]:
        """`hidden` [b, l, d] (normalised, of the compute dtype) and `table` [v, d], the rows it is scored against.

        Reads `history_ids`, `positions` and `segment_ids`, and no target.
        """
        ids, positions, segments = batch["history_ids"], batch["positions"], batch["segment_ids"]
        x, table = lookup_and_pass(self.table[...], ids)
        if self.scale_embedding:
            x = x * math.sqrt(self.config.width)
        if self.position is not None:
            place = jnp.take(self.position[...], positions, axis=0, mode="clip")
            x = x + jnp.where((ids == PAD)[..., None], 0, place)
        x = constrain(x, "batch", "length", None)
        keys = (None, None) if not train or key is None else jax.random.split(key)
        if keys[0] is not None:
            x = dropout(x, self.embedding_dropout, keys[0])
        layout = Layout(positions, segments, batch.get("history_time"), batch.get("query_time"))
        hidden = self.encoder(x, layout, train=train, key=keys[1])
        hidden = hidden * self.config.logit_scale
        table = table if self.head is None else self.head[...]
        return {"hidden": unit(hidden), "table": unit(table)} if self.normalize else {"hidden": hidden, "table": table}

    def token_flops(self, length: int) -> TokenFlops:
        """Training FLOPs of one target in rows of `length`, with a full softmax over the table."""
        c, params = self.config, nnx.to_pure_dict(nnx.state(self))
        return per_token(
            parameters=count_parameters(params)["backbone"],
            layers=c.num_layers,
            length=length,
            width=c.num_heads * c.head_width,
            rows=self.table.shape[0],
        )


def count_parameters(params: Params) -> dict[str, int]:
    """Number of parameters by kind; `backbone` is the N of scaling laws, weight matrices of the blocks alone.

    `embedding`: item tables; `position`: learned positions; `norm_bias`: norms and biases. With a feed-forward part
    of four times the width and ungrouped heads, `backbone` = 12 n d^2.
    """
    counts = {"embedding": 0, "position": 0, "norm_bias": 0, "backbone": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(getattr(p, "key", p)) for p in path]
        counts[_kind(names)] += math.prod(leaf.shape)
    return counts


def _kind(names: list[str]) -> str:
    if names[0] in ("table", "head"):
        return "embedding"
    if names[0] == "position":
        return "position"
    is_vector = names[-1].endswith("bias") or any(n.endswith("norm") for n in names)
    return "norm_bias" if is_vector else "backbone"
