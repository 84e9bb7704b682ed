"""What a stack of blocks is made of: the table that T5 1.1, Llama, Mixtral, SASRec, BERT4Rec and HSTU are rows of."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax

from recjax.core.errors import ConfigError
from recjax.core.module import Initializer, Module, Rngs
from recjax.nn.dropout import LayerwiseDropout
from recjax.nn.ffn import ACTIVATIONS, GATED, FfnKind
from recjax.nn.moe import MoeConfig
from recjax.nn.norm import NormKind
from recjax.nn.rotary import THETA, RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A stack of equal blocks.

    `attention` "softmax", or "hstu" for pointwise attention with a gate (Zhai et al. 2024; see
    `recjax.nn.pointwise`), which as published has `ffn` "none" and adds a bias to its scores by `relative`: of the
    distance in the row, and with "position_time" of the time between two events as well. `max_length` is the longest
    history: hstu has a bias for that many distances and divides by it. Softmax attention takes `relative` "t5", the
    biases of T5 by buckets of distance, and multiplies scores by `score_scale`, head_dim^-1/2 unless given (T5: 1).
    With rotary positions pair i of a head turns by `rope_theta`^(-2i / head_dim) a position, and `rope_scaling` slows
    that down for texts longer than those trained on; it has no parameters and may be set on a finished model.
    `qkv_bias` (as `bias` unless given) is the bias of queries, keys and values; `qk_norm` normalises each head of
    queries and keys before it is turned (Qwen3). `moe` puts a mixture of experts in the place of the feed-forward
    part, each of width `mlp_width` and without bias.

    `causal` False lets every event see those after it. `cross` is a third part of each block, between the other two,
    that looks at the output of another stack. `kernel` is how softmax attention is computed ("blocks" and "library"
    anywhere, "splash" and "tokamax" on accelerators, for long rows; see `recjax.nn.flash`). `residual` "gated"
    multiplies what a part adds to the stream x by sigmoid(W x) (LiGR, arXiv 2502.03417; eSASRec). `final_norm` is that
    after the last block, which a stack with `place` "post" may do without (BERT).

    `dropout` acts on what the parts add to the residual stream (hstu: before the output weights): one rate, one rate
    per layer from the lowest up, or a `LayerwiseDropout`. `attention_dropout` acts on the softmax's weights. `unroll`
    writes the layers out instead of scanning over them (faster steps, slower compilation); None does so up to four
    layers. `init` is how weights are drawn (see `initializers`). `dtype` is that of the computation; parameters, norms
    and softmax stay float32.
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
    final_norm: bool = True
    residual: Literal["plain", "gated"] = "plain"
    position: Literal["learned", "rotary", "learned_rotary", "none"] = "learned"
    relative: Literal["none", "position", "position_time", "t5"] = "none"
    rope_theta: float = THETA
    rope_scaling: RopeScaling | None = None
    score_scale: float | None = None
    max_length: int = 200
    ffn: FfnKind | Literal["none"] = "gelu"
    moe: MoeConfig | None = None
    bias: bool = True
    qkv_bias: bool | None = None
    qk_norm: bool = False
    dropout: float | tuple[float, ...] | LayerwiseDropout = 0.0
    attention_dropout: float = 0.0
    attention: Literal["softmax", "hstu"] = "softmax"
    causal: bool = True
    cross: bool = False
    kernel: Literal["blocks", "library", "splash", "tokamax"] = "blocks"
    remat: Literal["none", "full"] = "none"
    unroll: bool | None = None
    init: Literal["fan_in", "t5"] = "fan_in"
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
        for name in ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "max_length"):
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
        if self.rope_theta <= 1:
            raise ConfigError(f"TransformerConfig.rope_theta = {self.rope_theta}", expected="above 1")
        if self.rope_scaling is not None and "rotary" not in self.position:
            raise ConfigError("TransformerConfig.rope_scaling goes with rotary positions", where=self.position)
        if "rotary" in self.position and (self.head_width % 2 or (self.rope_scaling and self.head_width < 4)):
            raise ConfigError(
                f"TransformerConfig: rotary positions with heads of width {self.head_width}", expected="even"
            )
        if self.moe is not None and (self.ffn not in GATED or self.bias):
            raise ConfigError(
                f"TransformerConfig: experts with ffn = {self.ffn!r}, bias = {self.bias}",
                expected=f"one of {GATED} and bias = False",
            )
        if self.residual == "gated" and self.place == "post":
            raise ConfigError("TransformerConfig: gated residuals go with place = 'pre'")
        if not all(0 <= r < 1 for r in (*self.dropout_rates, self.attention_dropout)):
            raise ConfigError("TransformerConfig: a dropout rate is outside [0, 1)", where=f"dropout = {self.dropout}")
        if self.place == "pre" and not self.final_norm:
            raise ConfigError('TransformerConfig: final_norm = False goes with place = "post"')
        self._check_kinds()

    def _check_kinds(self) -> None:
        """Raise `ConfigError` for what one kind of attention has and the other has not."""
        kinds = ("none", "t5") if self.attention == "softmax" else ("none", "position", "position_time")
        if self.relative not in kinds:
            raise ConfigError(
                f"TransformerConfig: {self.attention} attention has no bias by relative {self.relative}",
                expected=f"one of {kinds}",
            )
        if self.kernel != "blocks" and self.attention_dropout:
            raise ConfigError(
                f"TransformerConfig: the attention of kernel = {self.kernel!r} has no attention_dropout",
                mend='kernel = "blocks", or attention_dropout = 0',
            )
        if self.kernel == "splash" and self.relative != "none":
            raise ConfigError(f"TransformerConfig: splash attention has no bias by relative {self.relative}")
        if self.attention == "hstu":
            for name, value, only in (
                ("attention_dropout", self.attention_dropout, 0.0),
                ("causal", self.causal, True),
                ("cross", self.cross, False),
                ("score_scale", self.score_scale, None),
                ("kernel", self.kernel, "blocks"),
                ("num_kv_heads", self.kv_heads, self.num_heads),
                ("qkv_bias", self.has_qkv_bias, self.bias),
                ("qk_norm", self.qk_norm, False),
            ):
                if value != only:
                    raise ConfigError(f"TransformerConfig.{name} = {value!r} with hstu attention", expected=repr(only))

    def make(self, *, rngs: Rngs) -> Module:
        """The stack of blocks."""
        from recjax.nn.transformer import Transformer

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
    def idle_parameters(self) -> int:
        """Weights, of all layers, of the experts that a token does not meet."""
        if self.moe is None:
            return 0
        return self.num_layers * (self.moe.num_experts - self.moe.top_k) * 3 * self.width * self.inner_width

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_positions(self) -> bool:
        """Whether vectors of absolute positions are to be added to what goes into the stack."""
        return self.position in ("learned", "learned_rotary")

    @property
    def longest(self) -> int | None:
        """The longest history that the stack can tell apart; None where there is no bound."""
        return self.max_length if self.attention == "hstu" else None

    @property
    def attention_shape(self) -> tuple[int, int]:
        """Layers that attend, and the width of their heads together."""
        return self.num_layers, self.num_heads * self.head_width

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
    "residual": ("plain", "gated"),
    "position": ("learned", "rotary", "learned_rotary", "none"),
    "relative": ("none", "position", "position_time", "t5"),
    "ffn": (*ACTIVATIONS, "none"),
    "attention": ("softmax", "hstu"),
    "kernel": ("blocks", "library", "splash", "tokamax"),
    "remat": ("none", "full"),
    "init": ("fan_in", "t5"),
    "dtype": ("float32", "bfloat16"),
}


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Weights [in, ...out]: normal of standard deviation 1/sqrt(in)."""
    return jax.random.normal(key, shape, dtype) / math.sqrt(shape[0])


class Initializers(NamedTuple):
    """How weights are drawn: of queries [d, h, k], into a part of a block [in, ...out], and out of it [...in, out]."""

    query: Initializer
    inner: Initializer
    outer: Initializer


def initializers(config: TransformerConfig) -> Initializers:
    """Normal, of standard deviation 1/sqrt(fan in).

    "fan_in": over sqrt(2n) where the product is added to the residual stream (Radford et al. 2019). "t5": without
    that, and for queries 1/sqrt(d k), which stands for the scale that their scores do not have.
    """

    def outer(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        depth = 1 if config.init == "t5" else 2 * config.num_layers
        return jax.random.normal(key, shape, dtype) / math.sqrt(depth * math.prod(shape[:-1]))

    def t5_query(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) / math.sqrt(shape[0] * shape[-1])

    return Initializers(t5_query if config.init == "t5" else fan_in_normal, fan_in_normal, outer)
