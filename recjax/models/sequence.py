"""A user's history to the next item: item table, positions, encoder.

One composition serves SASRec, LSRM, HSTU, GRU4Rec and every other id-based sequence model that reads from left to
right; one that fills in gaps is in `recjax.models.masked`. It returns hidden vectors and the table
they are scored against, never logits over the catalogue: an objective or an evaluator makes those in chunks.
"""

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Key

from recjax.core.errors import ConfigError
from recjax.core.flops import TokenFlops, per_token
from recjax.core.module import Module, Params, Rngs, param
from recjax.core.sharding import constrain
from recjax.nn.cached import Kept, Prompt
from recjax.nn.dropout import dropout
from recjax.nn.embed import PAD, lookup, lookup_and_pass
from recjax.nn.layout import Layout
from recjax.nn.norm import unit
from recjax.nn.recurrent import RecurrentConfig
from recjax.nn.transformer import INIT_STD, Transformer, TransformerConfig

Encoder = TransformerConfig | RecurrentConfig


class Memory(NamedTuple):
    """What continuations of a prompt need of it, the same for all beams of a row.

    `items` [v, d] are the vectors of tokens on the way in, `table` [v, d] what an output is scored against.
    """

    prompt: Prompt
    items: Array
    table: Array


class Sequence(Module):
    """Causal model of item histories; packed and padded rows alike.

    `max_length` is the number of learned positions, counted within an example; the attribute is the longest history
    that the model can tell apart, None where there is no bound. `scale_embedding` multiplies item vectors by
    sqrt(width) before positions are added (SASRec). `normalize` scores by cosine: `hidden` and `table` come as unit
    vectors, in training, evaluation and bundle alike; an objective then wants a temperature.

    An answer of several tokens is made one at a time: `prefill` reads the prompt, `start` makes room for the answers
    of some beams, `extend` adds a token to each; `branch` reads several continuations that are known, at once.
    Outputs are those of calling the model on the whole row.
    """

    causal: ClassVar[bool] = True
    # Users may share a row in evaluation, and only the slots in `query_at` are asked for.
    packs: ClassVar[bool] = True

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
        if not 0 <= embedding_dropout < 1 or max_length < 1:
            raise ConfigError(
                f"Sequence.embedding_dropout = {embedding_dropout}, max_length = {max_length}",
                expected="a rate in [0, 1) and a length of at least 1",
            )
        if encoder.causal != self.causal:
            raise ConfigError(
                f"the encoder of a {type(self).__name__} has causal = {encoder.causal}",
                expected=f"causal = {self.causal}",
                mend="models.masked.MaskedSequence fills in gaps with an encoder that sees both sides; "
                "models.sequence.Sequence predicts what comes next",
            )
        c = self.config = encoder
        self.embedding_dropout, self.scale_embedding = embedding_dropout, scale_embedding
        self.normalize = normalize
        normal = nnx.initializers.normal(INIT_STD)
        self.table = param(rngs, (num_rows, c.width), ("items", "item_width"), normal)
        self.head = None if c.tied_head else param(rngs, (num_rows, c.width), ("items", "item_width"), normal)
        bounds = [c.longest, max_length if c.has_positions else None]
        self.max_length = min((n for n in bounds if n is not None), default=None)
        self.position = param(rngs, (max_length, c.width), (None, "embed"), normal) if c.has_positions else None
        self.encoder = c.make(rngs=rngs)

    def __call__(self, batch: dict[str, Any], *, train: bool, key: Key[Array, ""] | None) -> dict[str, jax.Array]:
        """`hidden` [b, l, d] (normalised, of the compute dtype) and `table` [v, d], the rows it is scored against.

        Reads `history_ids`, `positions` and `segment_ids`, and no target. Where the batch of an evaluation says with
        `query_at` [b, q] which slots it is about, a transformer makes `query` [b, q, d], `hidden` at those, instead.
        Experts add what their routers did: `router/counts`, `router/chances` [n, b, e], `router/z` [n, b]
        (`nn.moe.Routing`).
        """
        ids, at = batch["history_ids"], batch.get("query_at")
        x, table = lookup_and_pass(self.item_table(batch), ids)
        if at is None or train or not isinstance(self.encoder, Transformer):
            hidden, routing = self._encode(x, ids != PAD, layout_of(batch), train, key)
            return self._score(hidden, table) | routing
        query, _ = self._encode(x, ids != PAD, layout_of(batch), train, key, query_at=jnp.maximum(at, 0))
        out = self._score(query, table)
        return {"query": out["hidden"], "table": out["table"]}

    def prefill(self, batch: dict[str, Any]) -> tuple[Array, Memory]:
        """The output [b, d] at the one slot of each row that `query_at` [b, 1] names, and what continues from there.

        Raises `ConfigError` where the encoder keeps nothing that later tokens could use.
        """
        ids = batch["history_ids"]
        x, table = lookup_and_pass(self.item_table(batch), ids)
        layout = layout_of(batch)
        encoder = self._decoder()
        x = self._embed(x, ids != PAD, layout.positions)
        hidden, prompt = encoder.prefill(x, layout, jnp.maximum(batch["query_at"][:, 0], 0))
        out = self._score(hidden[:, None], table)
        return out["hidden"][:, 0], Memory(prompt, table, out["table"])

    def remember(self, kept: Kept, lengths: Array) -> Memory:
        """What `prefill` gave for prompts that lie alone in their rows, `lengths` [b] tokens from the first slot on.

        Out of the keys and values alone: for whoever keeps these between calls.
        """
        table = self.item_table({})
        slots = jnp.arange(kept.keys.shape[2], dtype=jnp.int32)[None]
        prompt = Prompt(kept, slots < lengths[:, None], lengths - 1, lengths - 1)
        return Memory(prompt, table, self._score(jnp.zeros((1, 1, table.shape[-1])), table)["table"])

    def start(self, memory: Memory, beams: int, steps: int) -> Kept:
        """What is kept for each beam, still empty: leaves [b, beams, ...] with room for `steps` tokens."""
        return self._decoder().start(memory.prompt, beams, steps)

    def extend(self, memory: Memory, suffix: Kept, ids: Array, step: ArrayLike) -> tuple[Array, Kept]:
        """The outputs [b, m, d] after one more token for each beam, `ids` [b, m], and the suffix with it.

        `step` counts the tokens that a beam has already.
        """
        position = jnp.broadcast_to(memory.prompt.position[:, None] + 1 + step, ids.shape)
        x = self._embed(lookup(memory.items, ids), ids != PAD, position)
        hidden, suffix = self._decoder().extend(memory.prompt, suffix, x, step)
        return self._score(hidden, memory.items)["hidden"], suffix

    def branch(self, memory: Memory, ids: Array, slots: Array) -> Array:
        """The outputs [b, m, d] at one token of each of m continuations `ids` [b, m, t]: number `slots` [b, m].

        They are those of calling the model on rows of the prompt and one continuation each; tokens after the slot,
        padding among them, make no difference.
        """
        flat, tokens = ids.reshape(ids.shape[0], -1), ids.shape[2]
        place = jnp.arange(flat.shape[1], dtype=jnp.int32)[None] % tokens
        x = self._embed(lookup(memory.items, flat), flat != PAD, memory.prompt.position[:, None] + 1 + place)
        hidden = self._decoder().branch(memory.prompt, x, slots)
        return self._score(hidden, memory.items)["hidden"]

    def _decoder(self) -> Transformer:
        if not self.causal or not isinstance(self.encoder, Transformer):
            raise ConfigError(
                f"a {type(self).__name__} with a {type(self.encoder).__name__} cannot answer token by token",
                expected="models.sequence.Sequence with a transformer of causal softmax attention",
            )
        return self.encoder

    def item_table(self, batch: dict[str, Any]) -> jax.Array:
        """[v, d]: the vectors of items on the way in; a subclass may make them of what it finds in the batch."""
        return self.table[...]

    def _encode(
        self, x: jax.Array, real: jax.Array, layout: Layout, train: bool, key: Any, **more: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What the encoder makes of item vectors [b, l, d], and outputs `router/...` where it has experts.

        Positions are added where a slot is `real` [b, l].
        """
        x = self._embed(x, real, layout.positions)
        keys = (None, None) if not train or key is None else jax.random.split(key)
        if keys[0] is not None:
            x = dropout(x, self.embedding_dropout, keys[0])
        if more or not isinstance(self.encoder, Transformer):
            return self.encoder(x, layout, train=train, key=keys[1], **more), {}
        hidden, routing = self.encoder.routed(x, layout, train=train, key=keys[1])
        return hidden, {} if routing is None else {f"router/{n}": y for n, y in routing._asdict().items()}

    def _embed(self, x: jax.Array, real: jax.Array, positions: jax.Array) -> jax.Array:
        """What goes into the encoder."""
        if self.scale_embedding:
            x = x * math.sqrt(self.config.width)
        if self.position is not None:
            place = jnp.take(self.position[...], positions, axis=0, mode="clip")
            x = x + jnp.where(real[..., None], place, 0)
        return constrain(x, "batch", "length", None)

    def _score(self, hidden: jax.Array, table: jax.Array) -> dict[str, jax.Array]:
        """The outputs; `table` is what `lookup_and_pass` gave back."""
        hidden = hidden * self.config.logit_scale
        table = table if self.head is None else self.head[...]
        return {"hidden": unit(hidden), "table": unit(table)} if self.normalize else {"hidden": hidden, "table": table}

    def token_flops(self, length: int) -> TokenFlops:
        """Training FLOPs of one target in rows of `length`, with a full softmax over the table.

        Of experts those count that a token meets.
        """
        params = nnx.to_pure_dict(nnx.state(self))
        layers, width = self.config.attention_shape
        idle = self.config.idle_parameters if isinstance(self.config, TransformerConfig) else 0
        return per_token(
            parameters=count_parameters(params)["backbone"] - idle,
            layers=layers,
            length=length,
            width=width,
            rows=self.table.shape[0],
            row_width=self.table.shape[1],
        )


def layout_of(batch: dict[str, Any]) -> Layout:
    """Where the slots of a batch lie, when they were, which are a prefix and whom they see besides, if it says so."""
    prefix = batch.get("prefix")
    return Layout(
        batch["positions"],
        batch["segment_ids"],
        batch.get("history_time"),
        batch.get("query_time"),
        None if prefix is None else prefix > 0,
        batch.get("parents"),
    )


def count_parameters(params: Params) -> dict[str, int]:
    """Number of parameters by kind; `backbone` is the N of scaling laws, weight matrices of the blocks alone.

    `embedding`: item tables and mask; `position`: learned positions; `norm_bias`: norms and biases; `adapters`, where
    there are any: what dense layers have for each domain. With softmax
    attention, a feed-forward part of four times the width and ungrouped heads, `backbone` = 12 n d^2.
    """
    counts = {"embedding": 0, "position": 0, "norm_bias": 0, "backbone": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(getattr(p, "key", p)) for p in path]
        kind = _kind(names)
        counts[kind] = counts.get(kind, 0) + math.prod(leaf.shape)
    return counts


def _kind(names: list[str]) -> str:
    if names[0] in ("table", "head", "mask"):
        return "embedding"
    if names[0] == "position":
        return "position"
    if names[-1].startswith("adapter_"):
        return "adapters"
    is_vector = names[-1].endswith("bias") or any(n.endswith("norm") for n in names)
    return "norm_bias" if is_vector else "backbone"
