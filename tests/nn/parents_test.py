"""Segments with a parent: the mask by brute force, all kernels alike, and a candidate that cannot tell it shares a row.

The numbers that count are those of each candidate alone after the prompt; a shared row is only a cheaper way to them.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional
from recjax.models.sequence import Sequence
from recjax.nn.attention import Masks, allowed, allowed_at, attend, attend_dense, attend_library
from recjax.nn.config import TransformerConfig

# Two prompts in a row, each with two candidates of its own, an example without any, and padding.
SEGMENTS = np.array([1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6, 7, 7, 7, 0, 0, 0])
PARENTS = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 4, 4, 4, 0, 0, 0, 0, 0, 0])
LENGTH = len(SEGMENTS)


def brute_force(segments: np.ndarray, parents: np.ndarray, causal: bool) -> np.ndarray:
    out = np.zeros((LENGTH, LENGTH), bool)
    for q in range(LENGTH):
        for k in range(LENGTH):
            related = segments[q] == segments[k] or (parents[q] > 0 and segments[k] == parents[q])
            out[q, k] = related and (k <= q or not causal)
    return out


def masks(rows: int = 2) -> Masks:
    segments = jnp.asarray(np.stack([SEGMENTS] * rows), jnp.int32)
    parents = jnp.asarray(np.stack([PARENTS, np.zeros_like(PARENTS)][:rows]), jnp.int32)
    return Masks(segments, segments, parents=parents)


@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_by_brute_force(causal: bool) -> None:
    these, place = masks(), jnp.arange(LENGTH)[None]
    got = allowed(place, place, *these[:2], causal=causal, parents=these.parents)
    want = np.stack([brute_force(SEGMENTS, p, causal) for p in (PARENTS, 0 * PARENTS)])
    np.testing.assert_array_equal(got, want)
    at = np.array([[6, 0, 21, 9], [15, 5, 12, 3]])
    few = allowed_at(jnp.asarray(at), these, causal=causal)
    np.testing.assert_array_equal(few, np.take_along_axis(want, at[..., None], axis=1))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_kernels_and_their_gradients_agree(groups: int) -> None:
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(size=(2, LENGTH, n, 8)), jnp.float32) for n in (4, groups, groups))

    def outcome(function, **more):
        loss = jax.value_and_grad(lambda *x: (function(*x, masks(), **more) ** 2).sum(), (0, 1, 2))
        return jax.jit(loss)(q, k, v)

    want = outcome(attend_dense)
    for got in (outcome(attend, block=8), outcome(attend), outcome(attend_library)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


def llama(**more) -> TransformerConfig:
    llama = {"num_layers": 2, "width": 16, "num_heads": 4, "num_kv_heads": 2, "position": "rotary", "norm": "rms"}
    return TransformerConfig(**{**llama, "bias": False, "ffn": "swiglu", **more})


def shared_row(prompts: list[np.ndarray], candidates: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
    """All prompts one after another, each followed by its candidates, whose positions go on where it ends."""
    columns: dict[str, list[np.ndarray]] = {n: [] for n in ("history_ids", "positions", "segment_ids", "parents")}
    number = 0
    for prompt, own in zip(prompts, candidates, strict=True):
        head = number + 1
        for part, start, parent in [(prompt, 0, 0)] + [(c, len(prompt), head) for c in own]:
            number += 1
            columns["history_ids"].append(part)
            columns["positions"].append(start + np.arange(len(part)))
            columns["segment_ids"].append(np.full(len(part), number))
            columns["parents"].append(np.full(len(part), parent))
    return {n: np.concatenate(parts)[None].astype(np.int32) for n, parts in columns.items()}


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_a_candidate_in_a_shared_row_is_what_it_is_alone(position: str) -> None:
    draw = np.random.default_rng(1)
    prompts = [draw.integers(2, 60, n) for n in (9, 6)]
    candidates = [[draw.integers(2, 60, n) for n in lengths] for lengths in ((3, 1, 4), (2, 5))]
    model = Functional(partial(Sequence, num_rows=128, encoder=llama(position=position), max_length=32))
    params = jax.tree.map(lambda x: x * 1.5 + 0.01, model.init(jax.random.key(0)))
    run = partial(jax.jit(partial(model.apply, train=False, key=None)), params)
    row = shared_row(prompts, candidates)
    hidden, at = run(row)["hidden"][0], 0
    ends, alone = [], []
    for prompt, own in zip(prompts, candidates, strict=True):
        at += len(prompt)
        for candidate in own:
            whole = np.concatenate([prompt, candidate])[None].astype(np.int32)
            batch = {"history_ids": whole, "positions": np.arange(whole.size, dtype=np.int32)[None]}
            alone.append(run({**batch, "segment_ids": np.ones_like(whole)})["hidden"][0, len(prompt) :])
            np.testing.assert_allclose(hidden[at : at + len(candidate)], alone[-1], rtol=1e-5, atol=1e-5)
            at += len(candidate)
            ends.append(at - 1)
    asked = run({**row, "query_at": np.array([ends], np.int32)})["query"][0]
    np.testing.assert_allclose(asked, np.stack([a[-1] for a in alone]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("relative", ["t5", "position"])
def test_biases_by_distance_in_the_row_are_refused(relative: str) -> None:
    other = {"attention": "hstu", "ffn": "none", "num_kv_heads": None} if relative == "position" else {}
    model = Functional(partial(Sequence, num_rows=128, encoder=llama(position="none", relative=relative, **other)))
    row = shared_row([np.arange(2, 5)], [[np.arange(4, 6)]])
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ConfigError, match="biases by distance"):
        jax.eval_shape(partial(model.apply, train=False, key=None), params, row)
