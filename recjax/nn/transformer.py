"""The one transformer: a stack of equal blocks described by a frozen config.

T5 1.1, Llama, SASRec and LSRM are rows of the table that `TransformerConfig` spans. The stack works on vectors; the
tables at its two ends (items, learned positions) belong to the models.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from recjax.core.errors import ConfigError
from recjax.core.module import Initializer, Module, Rngs, param, scan, stack
from recjax.core.sharding import active, constrain
from recjax.nn.attention import attend, attend_library
from recjax.nn.dropout import LayerwiseDropout, dropout
from recjax.nn.ffn import ACTIVATIONS, FeedForward, FfnKind
from recjax.nn.layout import Layout
from recjax.nn.linear import linear
from recjax.nn.norm import Norm, NormKind
from recjax.nn.rotary import rotary

INIT_STD = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What a stack of blocks is made of.

    `dropout` acts on what attention and feed-forward add to the residual stream: one rate, one rate per layer from
    the lowest up, or a `LayerwiseDropout`. `attention_dropout` acts on the attention weights. `unroll` writes the
    layers out instead of scanning over them (faster steps, slower compilation); None does so up to four layers.
    `dtype` is that of the computation; parameters, norms and softmax stay float32.
    """

    num_layers: int = 2
    width: int = 64
    num_heads: int = 2
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    norm: NormKind = "layer"
    norm_epsilon: float = 1e-6
    place: Literal["pre", "post"] = "pre"
    position: Literal["learned", "rotary", "learned_rotary", "none"] = "learned"
    ffn: FfnKind = "gelu"
    bias: bool = True
    dropout: float | tuple[float, ...] | LayerwiseDropout = 0.0
    attention_dropout: float = 0.0
    attention: Literal["blocks", "library"] = "blocks"
    remat: Literal["none", "full"] = "none"
    unroll: bool | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    logit_scale: float = 1.0
    tied_head: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices = _CHOICES.get(field.name)
            if choices and getattr(self, field.name) not in choices:
                raise ConfigError(
                    f"TransformerConfig.{field.name} = {getattr(self, field.name)!r}", expected=f"one of {choices}"
                )
        for name in ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ConfigError(f"TransformerConfig.{name} = {size}", expected="at least 1")
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"TransformerConfig: {self.num_heads} heads cannot share {self.kv_heads} key heads",
                expected="num_heads divisible by num_kv_heads",
            )
        if self.head_dim is None and self.width % self.num_heads:
            raise ConfigError(
                f"TransformerConfig: width {self.width} does not divide into {self.num_heads} heads",
                mend="change width or num_heads, or set head_dim",
            )
        if "rotary" in self.position and self.head_width % 2:
            raise ConfigError(f"TransformerConfig: rotary positions need an even head width, not {self.head_width}")
        if self.attention == "library" and self.attention_dropout:
            raise ConfigError(
                "TransformerConfig: the library's attention has no attention_dropout",
                mend='attention = "blocks", or attention_dropout = 0',
            )
        if not all(0 <= r < 1 for r in (*self.dropout_rates, self.attention_dropout)):
            raise ConfigError("TransformerConfig: a dropout rate is outside [0, 1)", where=f"dropout = {self.dropout}")

    def make(self, *, rngs: Rngs) -> "Transformer":
        """The stack of blocks."""
        return Transformer(self, rngs=rngs)

    @property
    def kv_heads(self) -> int:
        """Number of key heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.width // self.num_heads

    @property
    def inner_width(self) -> int:
        """Width inside the feed-forward part."""
        return self.mlp_width or 4 * self.width

    @property
    def dropout_rates(self) -> tuple[float, ...]:
        """Residual dropout rate of each layer."""
        if isinstance(self.dropout, LayerwiseDropout):
            return self.dropout.rates(self.num_layers)
        if isinstance(self.dropout, tuple):
            if len(self.dropout) != self.num_layers:
                raise ConfigError(f"TransformerConfig: {len(self.dropout)} dropout rates for {self.num_layers} layers")
            return self.dropout
        return (self.dropout,) * self.num_layers


_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("layer", "rms"),
    "place": ("pre", "post"),
    "position": ("learned", "rotary", "learned_rotary", "none"),
    "ffn": tuple(ACTIVATIONS),
    "attention": ("blocks", "library"),
    "remat": ("none", "full"),
    "dtype": ("float32", "bfloat16"),
}


class Attention(Module):
    """Multi-head causal self-attention within segments."""

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        c = self.config = config
        init, out_init = initializers(c)
        zeros = nnx.initializers.zeros
        axes = ("embed", "heads", "head_dim")
        heads, groups, width = c.num_heads, c.kv_heads, c.head_width
        self.query = param(rngs, (c.width, heads, width), axes, init)
        self.key = param(rngs, (c.width, groups, width), axes, init)
        self.value = param(rngs, (c.width, groups, width), axes, init)
        self.out = param(rngs, (heads, width, c.width), ("heads", "head_dim", "embed"), out_init)
        if c.bias:
            self.query_bias = param(rngs, (heads, width), ("heads", "head_dim"), zeros)
            self.key_bias = param(rngs, (groups, width), ("heads", "head_dim"), zeros)
            self.value_bias = param(rngs, (groups, width), ("heads", "head_dim"), zeros)
            self.out_bias = param(rngs, (c.width,), (None,), zeros)

    def __call__(self, x: Float[Array, "b l d"], layout: Layout, rate: Any, key: Any) -> Float[Array, "b l d"]:
        """`rate` is the dropout of the attention weights and `key` its key, None when not training."""
        c = self.config
        q, k, v = self._project(x)
        if "rotary" in c.position:
            q, k = rotary(q, layout.positions), rotary(k, layout.positions)
        q = constrain(q, "batch", "length", "heads", "head_dim")
        if c.attention == "library":
            out = attend_library(q, k, v, layout.segments)
        else:
            out = attend(q, k, v, layout.segments, dropout=rate, key=key)
        out = out.reshape(*x.shape[:2], -1)
        return linear(out, self.out[...].reshape(-1, c.width), self.out_bias[...] if c.bias else None)

    def _project(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values [b, l, heads, k]; one product unless the heads lie on several devices."""
        weights = [w[...] for w in (self.query, self.key, self.value)]
        biases = [b[...] for b in (self.query_bias, self.key_bias, self.value_bias)] if self.config.bias else []
        mesh = active()
        if mesh is not None and mesh.size_of("heads") > 1:
            return [_heads(x, w, b) for w, b in zip(weights, biases or (None,) * 3, strict=True)]
        ends = (self.config.num_heads, self.config.num_heads + self.config.kv_heads)
        y = _heads(x, jnp.concatenate(weights, axis=1), jnp.concatenate(biases) if biases else None)
        return jnp.split(y, ends, axis=2)


def _heads(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """[b, l, h, k] from weights [d, h, k]."""
    flat = linear(x, weight.reshape(x.shape[-1], -1), None if bias is None else bias.reshape(-1))
    return flat.reshape(*x.shape[:2], *weight.shape[1:])


class Block(Module):
    """Attention and feed-forward, each added to the residual stream, normalised before or after."""

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        c = self.config = config
        init, out_init = initializers(c)
        make_norm = functools.partial(Norm, kind=c.norm, width=c.width, bias=c.bias, epsilon=c.norm_epsilon, rngs=rngs)
        self.attention_norm = make_norm()
        self.attention = Attention(c, rngs=rngs)
        self.ffn_norm = make_norm()
        self.ffn = FeedForward(
            kind=c.ffn, width=c.width, mlp_width=c.inner_width, bias=c.bias, init=init, out_init=out_init, rngs=rngs
        )

    def __call__(self, x: Float[Array, "b l d"], layout: Layout, rate: Any, keys: Any) -> Float[Array, "b l d"]:
        """`rate` is the residual dropout of this layer, `keys` its three dropout keys or None when not training."""
        attention_key, out_key, ffn_key = (None,) * 3 if keys is None else keys
        rate = rate if any(self.config.dropout_rates) else 0.0

        def attention(y: jax.Array) -> jax.Array:
            y = self.attention(y, layout, self.config.attention_dropout, attention_key)
            return y if out_key is None else dropout(y, rate, out_key)

        def feed_forward(y: jax.Array) -> jax.Array:
            y = self.ffn(y)
            return y if ffn_key is None else dropout(y, rate, ffn_key)

        if self.config.place == "pre":
            x = x + attention(self.attention_norm(x))
            x = x + feed_forward(self.ffn_norm(x))
        else:
            x = self.attention_norm(x + attention(x))
            x = self.ffn_norm(x + feed_forward(x))
        return constrain(x, "batch", "length", None)


class Transformer(Module):
    """`num_layers` blocks and a final norm."""

    def __init__(self, config: TransformerConfig, *, rngs: Rngs) -> None:
        c = self.config = config
        self.layers = stack(lambda r: Block(c, rngs=r), c.num_layers, rngs)
        self.final_norm = Norm(kind=c.norm, width=c.width, bias=c.bias, epsilon=c.norm_epsilon, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        layout: Layout,
        *,
        train: bool,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b l d"]:
        """Contextual vectors, normalised; `key` seeds the dropout and may be None when not training."""
        c = self.config
        x = x.astype(c.dtype)
        rates = jnp.asarray(c.dropout_rates, jnp.float32)
        keys = jax.random.split(key, (c.num_layers, 3)) if train and key is not None else None

        def call(block: Block, x: jax.Array, per_layer: Any) -> jax.Array:
            rate, layer_keys = per_layer
            return block(x, layout, rate, layer_keys)

        unroll = c.num_layers <= 4 if c.unroll is None else c.unroll
        x = scan(self.layers, call, x, (rates, keys), remat=c.remat == "full", unroll=unroll)
        return self.final_norm(x)


def initializers(config: TransformerConfig) -> tuple[Initializer, Initializer]:
    """For weights [in, ...out]: normal of standard deviation 1/sqrt(in); and for those whose product is added to the
    residual stream, [...in, out]: the same over sqrt(2n) (Radford et al. 2019)."""

    def into(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) / math.sqrt(shape[0])

    def out_of(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        fan_in = math.prod(shape[:-1])
        return jax.random.normal(key, shape, dtype) / math.sqrt(2 * config.num_layers * fan_in)

    return into, out_of
