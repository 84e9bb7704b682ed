"""A prompt read as a whole, an answer written token by token: the encoder-decoder of T5.

The prompt may be a history, a query or both, as rows of one table of tokens; the answer are rows of the same table.
With `t5_stack` on both sides it is T5 1.1 (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202), whose
checkpoints `recjax.bridge` reads. It returns hidden vectors and the table they are scored against, as every model.
"""

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Key

from recjax.core.errors import ConfigError
from recjax.core.flops import TokenFlops, per_token
from recjax.core.module import Module, Rngs, param
from recjax.core.rows import take_rows
from recjax.core.sharding import constrain
from recjax.models.sequence import Memory, count_parameters
from recjax.nn.cached import Kept
from recjax.nn.config import TransformerConfig
from recjax.nn.dropout import dropout
from recjax.nn.layout import Layout, Source
from recjax.nn.transformer import Transformer

# The row that begins every answer; T5 starts with its padding token, whose vector is learned.
START = 0


def t5_stack(
    *,
    is_decoder: bool = False,
    num_layers: int = 8,
    width: int = 512,
    num_heads: int = 6,
    head_dim: int = 64,
    mlp_width: int = 1024,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    remat: Literal["none", "full"] = "none",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> TransformerConfig:
    """One of the two stacks of T5 1.1, in the sizes of "small" unless given."""
    return TransformerConfig(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        head_dim=head_dim,
        mlp_width=mlp_width,
        norm="rms",
        position="none",
        relative="t5",
        score_scale=1.0,
        ffn="gated_gelu",
        bias=False,
        dropout=dropout,
        attention_dropout=attention_dropout,
        causal=is_decoder,
        cross=is_decoder,
        remat=remat,
        init="t5",
        dtype=dtype,
        tied_head=False,
    )


class EncoderDecoder(Module):
    """Model of answers to prompts; several of either may be packed into a row, matched by their segment numbers.

    `encoder` sees the prompt from both sides; `decoder` is causal and has `cross`. Both read vectors from one table,
    N(0, 1) at first; `decoder.tied_head` False scores by another, `head`. `embedding_dropout` acts on what goes into
    both stacks. Positions are the business of the stacks ("t5", "rotary" or none at all): none are added here.
    """

    causal: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    max_length = None

    def __init__(
        self,
        *,
        num_rows: int,
        encoder: TransformerConfig,
        decoder: TransformerConfig,
        embedding_dropout: float = 0.0,
        rngs: Rngs,
    ) -> None:
        _check(encoder, decoder)
        if not 0 <= embedding_dropout < 1:
            raise ConfigError(f"EncoderDecoder.embedding_dropout = {embedding_dropout}", expected="a rate in [0, 1)")
        self.config, self.embedding_dropout = decoder, embedding_dropout
        shape, axes, normal = (num_rows, decoder.width), ("items", "item_width"), nnx.initializers.normal
        self.table = param(rngs, shape, axes, normal(1.0))
        self.head = None if decoder.tied_head else param(rngs, shape, axes, normal(decoder.width**-0.5))
        self.encoder = Transformer(encoder, rngs=rngs)
        self.decoder = Transformer(decoder, rngs=rngs)

    def __call__(self, batch: dict[str, Any], *, train: bool, key: Key[Array, ""] | None) -> dict[str, jax.Array]:
        """`hidden` [b, t, d] and `table` [v, d], the rows it is scored against.

        Reads `history_ids`, `positions` and `segment_ids` of the prompts, and `decoder_ids`, `decoder_positions` and
        `decoder_segment_ids` of the answers so far, which begin with row 0. A batch without these asks for the first
        token of an answer: to the prompts that the slots `query_at` [b, q] are of, as `query` [b, q, d], or, without
        `query_at` too, to the prompt at the start of each row, as `hidden` [b, 1, d].
        """
        keys = (None,) * 4 if not train or key is None else tuple(jax.random.split(key, 4))
        source, table = self._read(batch, train, keys[:2])
        ids, layout = _answers(batch)
        x, table = take_rows(table, ids)
        hidden = self.decoder(self._enter(x, keys[2]), layout, train=train, key=keys[3], source=source)
        asks = "decoder_ids" not in batch and "query_at" in batch
        return {"query" if asks else "hidden": self._score(hidden), "table": self._scored(table)}

    def prefill(self, batch: dict[str, Any]) -> tuple[Array, Memory]:
        """The output [b, d] at the start of an answer to each row's prompt, and what continues from there.

        The prompt is the one that slot `query_at` [b, 1] is of, or without `query_at` the one at the start of the row.
        """
        source, table = self._read(batch, False, (None, None))
        ids, layout = _answers({k: v for k, v in batch.items() if not k.startswith("decoder_")})
        x, table = take_rows(table, ids)
        slot = jnp.zeros(ids.shape[0], jnp.int32)
        hidden, prompt = self.decoder.prefill(self._enter(x, None), layout, slot, source=source)
        return self._score(hidden), Memory(prompt, table, self._scored(table))

    def start(self, memory: Memory, beams: int, steps: int) -> Kept:
        """As `Sequence.start`."""
        return self.decoder.start(memory.prompt, beams, steps)

    def extend(self, memory: Memory, suffix: Kept, ids: Array, step: ArrayLike) -> tuple[Array, Kept]:
        """As `Sequence.extend`."""
        x, _ = take_rows(memory.items, ids)
        hidden, suffix = self.decoder.extend(memory.prompt, suffix, self._enter(x, None), step)
        return self._score(hidden), suffix

    def token_flops(self, length: int, *, answers: int = 1) -> TokenFlops:
        """Training FLOPs of one target where a row has `length` slots of prompts and `answers` targets."""
        params = nnx.to_pure_dict(nnx.state(self))
        layers, width = self.config.attention_shape
        rows, row_width = self.table.shape

        def of(part: str, layers: int, rows: int) -> TokenFlops:
            parameters = count_parameters({part: params[part]})["backbone"]
            return per_token(
                parameters=parameters, layers=layers, length=length, width=width, rows=rows, row_width=row_width
            )

        encoder, decoder = of("encoder", self.encoder.config.num_layers, 0), of("decoder", layers, rows)
        share = length / answers
        return TokenFlops(
            weights=decoder.weights + share * encoder.weights,
            attention=decoder.attention + share * encoder.attention,
            softmax=decoder.softmax,
        )

    def _read(self, batch: dict[str, Any], train: bool, keys: Any) -> tuple[Source, jax.Array]:
        """The prompts as the decoder sees them, and the table for its next use."""
        layout = Layout(batch["positions"], batch["segment_ids"])
        x, table = take_rows(self.table[...], batch["history_ids"])
        hidden = self.encoder(self._enter(x, keys[0]), layout, train=train, key=keys[1])
        return Source(hidden, layout.segments), table

    def _enter(self, x: jax.Array, key: Any) -> jax.Array:
        """What goes into a stack."""
        x = constrain(x, "batch", "length", None)
        return x if key is None else dropout(x, self.embedding_dropout, key)

    def _score(self, hidden: jax.Array) -> jax.Array:
        return hidden * self.config.logit_scale

    def _scored(self, table: jax.Array) -> jax.Array:
        return table if self.head is None else self.head[...]


def _answers(batch: dict[str, Any]) -> tuple[jax.Array, Layout]:
    """The decoder's rows; where none are given the starts of answers, one of each prompt that is asked about."""
    if "decoder_ids" in batch:
        return batch["decoder_ids"], Layout(batch["decoder_positions"], batch["decoder_segment_ids"])
    segments = batch["segment_ids"]
    at = jnp.maximum(batch["query_at"], 0) if "query_at" in batch else jnp.zeros((segments.shape[0], 1), jnp.int32)
    first = jnp.full(at.shape, START, jnp.int32)
    return first, Layout(jnp.zeros_like(first), jnp.take_along_axis(segments, at, axis=1))


def _check(encoder: TransformerConfig, decoder: TransformerConfig) -> None:
    for name, config, wanted in (
        ("encoder", encoder, {"causal": False, "cross": False}),
        ("decoder", decoder, {"causal": True, "cross": True, "attention": "softmax"}),
    ):
        for field, value in wanted.items():
            if getattr(config, field) != value:
                found = getattr(config, field)
                raise ConfigError(f"EncoderDecoder.{name} has {field} = {found!r}", expected=repr(value))
        if config.has_positions:
            raise ConfigError(
                f"EncoderDecoder.{name} wants learned positions, which this model does not have",
                expected='position "none" with relative "t5", or position "rotary"',
            )
    if encoder.width != decoder.width:
        raise ConfigError(
            f"EncoderDecoder: an encoder of width {encoder.width} and a decoder of width {decoder.width}",
            expected="one width, that of the table",
        )
