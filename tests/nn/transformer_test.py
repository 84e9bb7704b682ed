"""The block against a numpy transcription, its variants against each other, and mistakes in its config."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.nn.dropout import LayerwiseDropout
from recjax.nn.layout import Layout
from recjax.nn.rotary import rotary
from recjax.nn.transformer import Transformer, TransformerConfig

TINY = TransformerConfig(num_layers=2, width=8, num_heads=2, mlp_width=12)
ROWS, LENGTH = 3, 7
POSITIONS = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, 1))
SEGMENTS = jnp.ones((ROWS, LENGTH), jnp.int32)


def _model(config: TransformerConfig) -> tuple[Functional, dict, jax.Array]:
    model = Functional(functools.partial(Transformer, config))
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + noise.normal(scale=0.3, size=p.shape).astype(np.float32), model.init(jax.random.key(0))
    )
    return model, params, jnp.asarray(noise.normal(size=(ROWS, LENGTH, config.width)), jnp.float32)


def _apply(config: TransformerConfig, params: dict, x: jax.Array, **kwargs) -> jax.Array:
    model = Functional(functools.partial(Transformer, config))
    options = {"train": False, "key": None, **kwargs}
    return jax.jit(lambda p, x: model.apply(p, x, Layout(POSITIONS, SEGMENTS), **options))(params, x)


def _transcribe(c: TransformerConfig, params: dict, x: np.ndarray) -> np.ndarray:
    """The same computation, one layer and one head at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def normalise(n: dict, y: np.ndarray) -> np.ndarray:
        if c.norm == "layer":
            y = y - y.mean(-1, keepdims=True)
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + c.norm_epsilon) * n["scale"] + n.get("bias", 0)

    def attention(a: dict, y: np.ndarray) -> np.ndarray:
        out = a.get("out_bias", 0) + np.zeros_like(y)
        for head in range(c.num_heads):
            group = head * c.kv_heads // c.num_heads
            q = y @ a["query"][:, head] + a.get("query_bias", np.zeros((9, 1)))[head]
            k = y @ a["key"][:, group] + a.get("key_bias", np.zeros((9, 1)))[group]
            v = y @ a["value"][:, group] + a.get("value_bias", np.zeros((9, 1)))[group]
            if c.position == "rotary":
                q, k = (np.asarray(rotary(jnp.asarray(t[:, :, None], jnp.float32), POSITIONS))[:, :, 0] for t in (q, k))
            s = np.einsum("bqk,bsk->bqs", q, k) / np.sqrt(c.head_width)
            if c.causal:
                s = np.where(np.tril(np.ones((LENGTH, LENGTH), bool)), s, -np.inf)
            w = np.exp(s - s.max(-1, keepdims=True))
            out = out + (w / w.sum(-1, keepdims=True)) @ v @ a["out"][head]
        return out

    def feed_forward(f: dict, y: np.ndarray) -> np.ndarray:
        tanh_gelu = lambda t: 0.5 * t * (1 + np.tanh(np.sqrt(2 / np.pi) * (t + 0.044715 * t**3)))  # noqa: E731
        act = {
            "relu": lambda t: np.maximum(t, 0),
            "gelu": lambda t: t * 0.5 * (1 + erf(t / np.sqrt(2))),
            "gelu_tanh": tanh_gelu,
            "gated_gelu": tanh_gelu,
            "swiglu": lambda t: t / (1 + np.exp(-t)),
        }[c.ffn]
        inner = y @ f["inner"] + f.get("inner_bias", 0)
        inner = act(y @ f["gate"]) * inner if "gate" in f else act(inner)
        return inner @ f["outer"] + f.get("outer_bias", 0)

    def gate(g: dict, y: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(y @ g["weight"] + g.get("bias", 0))))

    for i in range(c.num_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        for part, n, f in (("attention", "attention_norm", attention), ("ffn", "ffn_norm", feed_forward)):
            if part not in layer:
                continue
            if c.residual == "gated":
                x = x + gate(layer[f"{part}_gate"], x) * f(layer[part], normalise(layer[n], x))
            elif c.place == "pre":
                x = x + f(layer[part], normalise(layer[n], x))
            else:
                x = normalise(layer[n], x + f(layer[part], x))
    return normalise(p["final_norm"], x)


VARIANTS = [
    *(
        {"norm": n, "place": p, "bias": b}
        for n, p, b in itertools.product(("layer", "rms"), ("pre", "post"), (True, False))
    ),
    *({"ffn": f} for f in ("relu", "gelu_tanh", "gated_gelu", "swiglu")),
    {"position": "rotary", "num_kv_heads": 1, "norm": "rms", "ffn": "swiglu", "bias": False},
    {"head_dim": 6},
    {"residual": "gated", "ffn": "swiglu"},
    {"residual": "gated", "bias": False},
    {"causal": False},
    {"causal": False, "kernel": "library"},
    {"ffn": "none"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_equals_the_transcription(variant: dict) -> None:
    config = dataclasses.replace(TINY, **variant)
    _, params, x = _model(config)
    got = _apply(config, params, x)
    np.testing.assert_allclose(got, _transcribe(config, params, np.asarray(x, np.float64)), rtol=2e-4, atol=2e-4)


def test_scan_remat_and_unrolled_agree() -> None:
    config = dataclasses.replace(TINY, dropout=LayerwiseDropout(), attention_dropout=0.1)
    _, params, x = _model(config)

    def outcome(**change):
        c = dataclasses.replace(config, **change)
        return jax.value_and_grad(lambda p: (_apply(c, p, x, train=True, key=jax.random.key(2)) ** 2).sum())(params)

    want = outcome(unroll=True)
    for change in ({"unroll": False}, {"unroll": False, "remat": "full"}):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), outcome(**change), want)


def test_each_layer_has_its_own_rate() -> None:
    """With rate 0 everywhere but in the first layer, dropout in the first layer alone changes the result."""
    _, params, x = _model(TINY)
    plain = _apply(TINY, params, x)
    some = dataclasses.replace(TINY, dropout=(0.5, 0.0))
    none = dataclasses.replace(TINY, dropout=(0.0, 0.0))
    key = jax.random.key(0)
    assert np.abs(_apply(some, params, x, train=True, key=key) - plain).max() > 1e-2
    np.testing.assert_allclose(_apply(none, params, x, train=True, key=key), plain, rtol=1e-6)
    np.testing.assert_array_equal(_apply(some, params, x, train=False, key=key), _apply(some, params, x))


def test_bfloat16_computes_close_to_float32_with_float32_parameters() -> None:
    low = dataclasses.replace(TINY, dtype="bfloat16")
    _, params, x = _model(low)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    got = _apply(low, params, x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), _apply(TINY, params, x), atol=0.15)


def test_initial_scales() -> None:
    """1 / sqrt(fan in), over sqrt(2n) for what is added to the residual stream."""
    config = TransformerConfig(num_layers=8, width=64, num_heads=2)
    params = jax.jit(Functional(functools.partial(Transformer, config)).init)(jax.random.key(0))["layers"]
    for weights, want in (
        (params["attention"]["query"], 1 / 8),
        (params["ffn"]["inner"], 1 / 8),
        (params["attention"]["out"], 1 / 8 / 4),
        (params["ffn"]["outer"], 1 / 16 / 4),
    ):
        assert float(jnp.std(weights)) == pytest.approx(want, rel=0.03)


def test_rotary_scores_depend_on_distance_alone() -> None:
    draw = np.random.default_rng(0)
    q, k = (jnp.asarray(draw.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(i: int, j: int) -> float:
        return float((rotary(q, jnp.full((1, 1), i)) * rotary(k, jnp.full((1, 1), j))).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 3},
        {"num_kv_heads": 3, "num_heads": 4},
        {"dropout": (0.1,)},
        {"dropout": 1.0},
        {"kernel": "library", "attention_dropout": 0.1},
        {"position": "rotary", "head_dim": 5},
        {"residual": "gated", "place": "post"},
        {"relative": "position"},
    ],
    ids=str,
)
def test_mistakes_are_config_errors(change: dict) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(TINY, **change)
