"""T5 1.1 against Hugging Face's, on random weights."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.bridge.t5 import Sizes, pieces
from recjax.core.saved import nested

SIZES = Sizes(rows=64, width=16, num_heads=4, head_dim=6, mlp_width=24, encoder_layers=2, decoder_layers=3)


def test_pieces_fill_every_parameter_once() -> None:
    for world in ("hf", "t5x"):
        filled: dict[str, list[Any]] = {}
        for piece in pieces(SIZES, world):
            filled.setdefault(piece.path, []).append(piece.layer)
        signature = SIZES.signature()
        assert set(filled) == set(signature)
        for path, layers in filled.items():
            assert layers == ([None] if "/layers/" not in path else list(range(signature[path][1][0])))


@pytest.mark.parametrize("world", ["hf", "t5x"])
def test_writing_undoes_reading(world) -> None:
    draw = np.random.default_rng(0)
    for piece in pieces(SIZES, world):
        there = draw.normal(size=piece.shape)
        np.testing.assert_array_equal(piece.write(piece.read(there)), there)


@pytest.mark.filterwarnings("ignore")
def test_logits_equal_those_of_hugging_face() -> None:
    """Two prompts of different lengths, teacher forced; the head is set by hand, as a fresh model has it tied."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=SIZES.rows,
        d_model=SIZES.width,
        d_kv=SIZES.head_dim,
        d_ff=SIZES.mlp_width,
        num_layers=SIZES.encoder_layers,
        num_decoder_layers=SIZES.decoder_layers,
        num_heads=SIZES.num_heads,
        feed_forward_proj="gated-gelu",
    )
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn(SIZES.rows, SIZES.width))
    theirs.config.scale_decoder_outputs = False
    with torch.no_grad():  # biases and norms that are not what they are at first
        for name, parameter in theirs.named_parameters():
            if "relative" in name or "norm" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    tensors = {name: p.detach().numpy() for name, p in theirs.state_dict().items()}
    params: dict[str, Any] = {path: np.empty(shape, np.float32) for path, (_, shape) in SIZES.signature().items()}
    for piece in pieces(SIZES, "hf"):
        params[piece.path][... if piece.layer is None else piece.layer] = piece.read(tensors[piece.name])
    draw = np.random.default_rng(0)
    prompt, answer = draw.integers(1, SIZES.rows, (2, 40)), draw.integers(1, SIZES.rows, (2, 30))
    answer[:, 0], real = 0, np.arange(40) < np.array([[40], [25]])
    with torch.no_grad():
        want = theirs(
            input_ids=torch.tensor(prompt * real),
            attention_mask=torch.tensor(real.astype(np.int64)),
            decoder_input_ids=torch.tensor(answer),
        ).logits.numpy()
    place = functools.partial(np.broadcast_to, shape=(2, 40))
    batch = {
        "history_ids": prompt * real,
        "positions": place(np.arange(40)),
        "segment_ids": real,
        "decoder_ids": answer,
        "decoder_positions": np.tile(np.arange(30), (2, 1)),
        "decoder_segment_ids": np.ones((2, 30)),
    }
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
    ours = jax.tree.map(jnp.asarray, nested(params))
    out = jax.jit(functools.partial(SIZES.model().apply, train=False, key=None))(ours, batch)
    np.testing.assert_allclose(out["hidden"] @ out["table"].T, want, rtol=1e-4, atol=1e-4)
