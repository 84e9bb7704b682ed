"""The sequence model: causality, packing, padding, positions, and what is counted as a parameter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.module import Functional
from recjax.models.sequence import Sequence, count_parameters
from recjax.nn.recurrent import RecurrentConfig
from recjax.nn.transformer import TransformerConfig

ROWS = 128
CONFIG = TransformerConfig(num_layers=2, width=16, num_heads=2)


def _model(transformer: TransformerConfig = CONFIG, **kwargs) -> Functional:
    return Functional(functools.partial(Sequence, num_rows=ROWS, encoder=transformer, max_length=12, **kwargs))


def _batch(*rows: list[list[int]], length: int = 12) -> dict[str, jax.Array]:
    """One row for each argument, which lists the examples packed into it."""
    fields = {name: np.zeros((len(rows), length), np.int32) for name in ("history_ids", "positions", "segment_ids")}
    for i, examples in enumerate(rows):
        at = 0
        for segment, items in enumerate(examples, 1):
            span = slice(at, at + len(items))
            fields["history_ids"][i, span] = items
            fields["positions"][i, span] = np.arange(len(items))
            fields["segment_ids"][i, span] = segment
            at += len(items)
    return {k: jnp.asarray(v) for k, v in fields.items()}


@functools.cache
def _params(model_key: str = "learned") -> tuple[Functional, dict]:
    model = _model(TransformerConfig(num_layers=2, width=16, num_heads=2, position=model_key))
    return model, jax.jit(model.init)(jax.random.key(0))


def _hidden(batch: dict[str, jax.Array], position: str = "learned") -> np.ndarray:
    model, params = _params(position)
    return np.asarray(jax.jit(lambda b: model.apply(params, b, train=False, key=None)["hidden"])(batch))


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_no_gradient_from_the_future_or_another_segment(position: str) -> None:
    model, params = _params(position)
    batch = _batch([[5, 6, 7, 8], [9, 10, 11]])
    # Items differ at every place, so the gradient of a table row is that of one place. Only some of the width is
    # summed, as a normalised vector adds up to zero whatever comes in.
    items = np.asarray(batch["history_ids"][0, :7])

    def hidden_of(table: jax.Array) -> jax.Array:
        return model.apply({**params, "table": table}, batch, train=False, key=None)["hidden"][0, :7, :5].sum(-1)

    reach = np.abs(jax.jit(jax.jacrev(hidden_of))(params["table"])).sum(-1)[:, items] > 0
    segments = np.asarray(batch["segment_ids"][0, :7])
    want = np.tril(np.ones((7, 7), bool)) & (segments[:, None] == segments[None])
    np.testing.assert_array_equal(reach, want)


@pytest.mark.parametrize("position", ["learned", "rotary", "learned_rotary", "none"])
def test_packed_rows_equal_rows_of_their_own(position: str) -> None:
    packed = _hidden(_batch([[5, 6, 7, 8], [9, 10, 11], [12, 13]]), position)[0]
    alone = _hidden(_batch([[5, 6, 7, 8]], [[9, 10, 11]], [[12, 13]]), position)
    np.testing.assert_allclose(packed[:4], alone[0, :4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[4:7], alone[1, :3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[7:9], alone[2, :2], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing() -> None:
    short, long = (_hidden(_batch([[5, 6, 7]], length=n))[0, :3] for n in (3, 12))
    np.testing.assert_allclose(short, long, rtol=1e-4, atol=1e-5)


def test_positions_count_within_an_example_not_along_the_row() -> None:
    batch = _batch([[5, 6], [5, 6]])
    hidden = _hidden(batch)[0]
    np.testing.assert_allclose(hidden[:2], hidden[2:4], rtol=1e-4, atol=1e-5)
    moved = {**batch, "positions": batch["positions"].at[0, 2:4].add(3)}
    assert np.abs(_hidden(moved)[0, 2:4] - hidden[2:4]).max() > 1e-3


def test_dropout_only_in_training() -> None:
    config = TransformerConfig(num_layers=1, width=16, num_heads=2, dropout=0.3, attention_dropout=0.3)
    model = _model(config, embedding_dropout=0.3)
    params, batch = model.init(jax.random.key(0)), _batch([[5, 6, 7]])
    one, two = (model.apply(params, batch, train=True, key=jax.random.key(i))["hidden"] for i in range(2))
    assert np.abs(one - two)[0, :3].max() > 1e-2
    calm = [model.apply(params, batch, train=False, key=key)["hidden"] for key in (None, jax.random.key(1))]
    np.testing.assert_array_equal(*calm)


def test_untied_head_is_a_table_of_its_own() -> None:
    model = _model(TransformerConfig(num_layers=1, width=16, num_heads=2, tied_head=False))
    params = model.init(jax.random.key(0))
    out = model.apply(params, _batch([[5, 6]]), train=False, key=None)
    np.testing.assert_array_equal(out["table"], params["head"])
    assert count_parameters(params)["embedding"] == 2 * ROWS * 16


# Zhang et al. 2023 (arXiv 2311.11351): layers, width, heads, non-embedding parameters.
PUBLISHED = [
    (2, 64, 2, 98_304),
    (4, 128, 4, 786_432),
    (8, 128, 4, 1_572_864),
    (12, 256, 8, 9_437_184),
    (24, 512, 8, 75_497_472),
    (48, 1200, 24, 829_440_000),
]


@pytest.mark.parametrize(("layers", "width", "heads", "backbone"), PUBLISHED)
def test_backbone_is_twelve_n_d_squared(layers: int, width: int, heads: int, backbone: int) -> None:
    model = _model(TransformerConfig(num_layers=layers, width=width, num_heads=heads))
    counts = count_parameters(jax.eval_shape(model.init, jax.random.key(0)))
    assert counts["backbone"] == backbone == 12 * layers * width**2
    assert counts["embedding"] == ROWS * width and counts["position"] == 12 * width
    # Four projections and two products with biases, two norms with scale and bias; and the final norm.
    assert counts["norm_bias"] == layers * ((4 + 4 + 1) * width + 4 * width) + 2 * width


def test_normalised_scores_are_cosines() -> None:
    """`normalize` gives unit vectors with the same directions, in training and evaluation alike."""
    config = TransformerConfig(num_layers=1, width=16, num_heads=2)
    plain = Functional(functools.partial(Sequence, num_rows=128, encoder=config, max_length=8))
    unit = Functional(functools.partial(Sequence, num_rows=128, encoder=config, max_length=8, normalize=True))
    params = plain.init(jax.random.key(0))
    batch = _batch([[5, 6, 7, 8], [9, 10, 11]])
    for train in (False, True):
        a = plain.apply(params, batch, train=train, key=None)
        b = unit.apply(params, batch, train=train, key=None)
        for name in ("hidden", "table"):
            expected = a[name] / np.maximum(np.linalg.norm(a[name], axis=-1, keepdims=True), 1e-6)
            np.testing.assert_allclose(b[name], expected, atol=1e-5)


HSTU = TransformerConfig(
    num_layers=2, width=16, num_heads=2, attention="hstu", ffn="none", relative="position_time", max_length=10
)
GRU = RecurrentConfig(num_layers=2, width=16, hidden=24)


@pytest.mark.parametrize("encoder", [HSTU, GRU], ids=["hstu", "gru"])
def test_any_encoder_keeps_packed_examples_apart(encoder: TransformerConfig | RecurrentConfig) -> None:
    model = Functional(functools.partial(Sequence, num_rows=ROWS, encoder=encoder, max_length=12))
    params = jax.jit(model.init)(jax.random.key(0))
    packed, alone = _batch([[5, 6, 7, 8], [9, 10, 11]]), _batch([[5, 6, 7, 8]], [[9, 10, 11]])
    times = np.arange(12, dtype=np.int32)[None] * 5_000
    packed["history_time"] = jnp.asarray(times)
    alone["history_time"] = jnp.asarray(np.concatenate([times, times + 4 * 5_000]))
    hidden = jax.jit(lambda b: model.apply(params, b, train=False, key=None)["hidden"])
    one, other = hidden(packed), hidden(alone)
    np.testing.assert_allclose(one[0, :4], other[0, :4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one[0, 4:7], other[1, :3], rtol=1e-4, atol=1e-5)


def test_what_an_encoder_is_made_of_decides_length_and_arithmetic() -> None:
    """HSTU tells `max_length` distances apart and attends; a GRU has no bound, no position and no attention."""

    def built(encoder: TransformerConfig | RecurrentConfig):
        model = Functional(functools.partial(Sequence, num_rows=ROWS, encoder=encoder, max_length=12))
        params = jax.eval_shape(model.init, jax.random.key(0))
        return model.bind(params), count_parameters(params)

    hstu, counts = built(HSTU)
    assert hstu.max_length == 10  # the smaller of its own and the learned positions
    assert counts["backbone"] == 2 * (5 * 16 * 16)  # u, v, q, k and out
    # Two norms and a bias of 16, biases by distance and time; and the final norm.
    assert counts["norm_bias"] == 2 * (2 * 2 * 16 + 16 + 10 + 128) + 2 * 16
    assert hstu.token_flops(20).attention == 12 * 2 * 20 * 16
    gru, counts = built(GRU)
    assert gru.max_length is None and counts["position"] == 0
    assert counts["backbone"] == 3 * 24 * (16 + 24 + 24 + 24) + 24 * 16
    assert counts["norm_bias"] == 2 * 6 * 24 + 16
    assert gru.token_flops(20).attention == 0
