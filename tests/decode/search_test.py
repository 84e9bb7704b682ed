"""What holds for a beam search whatever the catalogue: batches, vmap, meshes, export, ties, wild logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.sharding import MeshConfig, make_mesh
from recjax.decode.beam import Beams, beam_search
from recjax.decode.build import build_trie
from recjax.index.exact import top_k

SIZES = (6, 5, 4)
BEAMS, K, B = 4, 9, 8


@pytest.fixture(scope="module")
def world(decoding):
    """A trie, a model, and filters and exclusions for eight queries; the search as a function of all of them."""
    rng = np.random.default_rng(0)
    trie = build_trie(decoding.random_codes(rng, 80, SIZES, True), SIZES, dense=1)
    toy = decoding.Toy.random(rng, B, SIZES)
    n = trie.shape.num_ids
    inputs = (toy.table, rng.random((B, n)) < 0.5, rng.integers(-1, n, (B, 5)).astype(np.int32))

    def search(trie, table, allowed, exclude):
        state = jnp.zeros((table.shape[0], 1), jnp.int32)
        return beam_search(toy.step(table), state, trie, beams=BEAMS, k=K, allowed=allowed, exclude=exclude)

    return trie, inputs, search


def same(found: Beams, expected: Beams) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_query_is_answered_alike_in_any_batch(world):
    trie, inputs, search = world
    whole, one = jax.jit(search), jax.jit(search)
    expected = whole(trie, *inputs)
    for q in range(B):
        same(one(trie, *(x[q : q + 1] for x in inputs)), jax.tree.map(lambda x, q=q: x[q : q + 1], expected))


def test_under_vmap_it_is_the_same(world):
    trie, inputs, search = world
    in_pairs = [jnp.asarray(x).reshape(B // 2, 2, *x.shape[1:]) for x in inputs]
    found = jax.jit(jax.vmap(search, in_axes=(None, 0, 0, 0)))(trie, *in_pairs)
    same(jax.tree.map(lambda x: x.reshape(B, K), found), jax.jit(search)(trie, *inputs))


def test_exported_for_any_batch_it_is_the_same(world):
    trie, inputs, search = world
    b, s = jax.export.symbolic_shape("b, s")
    levels, n = inputs[0].shape[1:], trie.shape.num_ids
    shapes = [
        jax.ShapeDtypeStruct((b, *levels), np.float32),
        jax.ShapeDtypeStruct((b, n), bool),
        jax.ShapeDtypeStruct((b, s), np.int32),
    ]

    def from_arrays(arrays, *inputs):
        return tuple(search(type(trie)(arrays, trie.shape), *inputs))

    exported = jax.export.export(jax.jit(from_arrays), platforms=["cpu", "cuda", "tpu"])(dict(trie.arrays), *shapes)
    loaded = jax.export.deserialize(exported.serialize())
    table, allowed, exclude = inputs
    in_process = jax.jit(search)
    for rows, count in ((B, 5), (3, 2), (1, 1)):
        expected = in_process(trie, table, allowed, np.where(np.arange(5)[None] < count, exclude, -1))
        found = loaded.call(dict(trie.arrays), table[:rows], allowed[:rows], exclude[:rows, :count])
        same(Beams(*found), jax.tree.map(lambda x, rows=rows: x[:rows], expected))


@pytest.mark.parametrize("shape", ["data=8", "replica=2,data=4"])
def test_over_a_mesh_it_is_the_same_and_nothing_travels(world, shape):
    trie, inputs, search = world
    expected = jax.jit(search)(trie, *inputs)
    mesh = make_mesh(MeshConfig(shape=shape, preset="data"))
    with mesh.activate():
        placed = [jax.device_put(x, mesh.sharding(("batch",))) for x in inputs]
        compiled = jax.jit(search).lower(jax.device_put(trie, mesh.sharding()), *placed).compile()
        same(compiled(jax.device_put(trie, mesh.sharding()), *placed), expected)
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()


def constant(value, sizes=SIZES):
    return lambda state, codes, level: (
        jnp.full((2, *((1,) if codes is None else codes.shape[1:]), sizes[level]), value),
        state,
    )


@pytest.mark.parametrize("value", [0.0, np.nan, -np.inf, np.inf, 3e38])
def test_equal_or_wild_logits_leave_every_id_in_the_order_of_leaves(value):
    codes = np.stack(np.meshgrid(*map(np.arange, SIZES), indexing="ij"), axis=-1).reshape(-1, 3)
    trie = build_trie(codes, SIZES)
    for beams in (3, 200):
        found = jax.jit(lambda t, beams=beams: beam_search(constant(value), None, t, beams=beams, k=10))(trie)
        assert found.leaf.tolist() == [list(range(10))] * 2 and found.valid.all()
        np.testing.assert_allclose(found.log_prob, -np.log(len(codes)), rtol=1e-6)


def test_one_wild_logit_rules_out_no_other_id():
    trie = build_trie(np.array([[0, 0], [0, 1], [1, 0]]), (2, 2))

    def step(state, codes, level):
        logits = (
            jnp.array([[[jnp.nan, 0.0]]]) if codes is None else jnp.array([[[-jnp.inf, jnp.inf]]]).repeat(2, axis=1)
        )
        return logits, state

    found = jax.jit(lambda t: beam_search(step, None, t, beams=2, k=4))(trie)
    assert found.leaf.tolist() == [[2, 1, 0, -1]] and found.valid.tolist() == [[True, True, True, False]]
    assert found.log_prob[0, 0] == 0 and found.log_prob[0, 2] < found.log_prob[0, 1] < -1e29
    assert found.log_prob[0, 3] == -np.inf


def test_nothing_allowed_gives_nothing():
    trie = build_trie(np.array([[0, 0], [0, 1], [1, 0]]), (2, 2))
    given = [{"allowed": np.zeros(3, bool)}, {"exclude": np.array([[0, 1, 2]] * 2)}]
    for filters in given:
        step = constant(0.0, (2, 2))
        found = jax.jit(lambda t, f, step=step: beam_search(step, None, t, beams=2, **f))(trie, filters)
        assert not found.valid.any() and (found.leaf == -1).all() and (found.log_prob == -np.inf).all()


@pytest.mark.parametrize("width", [1, 4])
def test_whatever_the_state_holds_follows_its_beam(width):
    """A number and a cache, for the one beam there is at first or for all that will be: both tell the whole prefix."""
    sizes, codes = (3, 2, 2), np.array([[2, 1, 0], [2, 0, 1], [0, 1, 1], [1, 1, 1]])
    trie = build_trie(codes, sizes)
    weights = np.random.default_rng(1).normal(size=(3, 8, 3)).astype(np.float32)

    def step(state, written, level):
        number, cache = state
        if level:
            number, cache = number * 2 + written, cache.at[:, :, level - 1, 0].set(written.astype(jnp.float32))
        told = jnp.zeros(number.shape, jnp.int32)
        for at in range(level):
            told = told * 2 + cache[:, :, at, 0].astype(jnp.int32)
        logits = jnp.asarray(weights)[level][number] + jnp.asarray(weights)[level][told]
        return logits[:, : None if level else 1, : sizes[level]], (number, cache)

    state = (jnp.zeros((1, width), jnp.int32), jnp.zeros((1, width, 3, 1)))
    found = jax.jit(lambda trie, state: beam_search(step, state, trie, beams=4))(trie, state)
    expected = {}
    for row, written in enumerate(codes.tolist()):
        total, number, following = 0.0, 0, codes
        for level, code in enumerate(written):
            logits = 2 * weights[level, number].astype(np.float64)
            total += logits[code] - np.log(np.exp(logits[np.unique(following[:, level])]).sum())
            number, following = number * 2 + code, following[following[:, level] == code]
        expected[row] = total
    order = sorted(expected, key=lambda row: -expected[row])
    assert trie.rows_of(found.leaf)[0].tolist() == order
    np.testing.assert_allclose(found.log_prob[0], [expected[row] for row in order], atol=1e-5)


def test_ids_of_one_code_are_the_exact_search():
    rng = np.random.default_rng(2)
    queries, table = rng.integers(-2, 3, (2, 4)).astype(np.float32), rng.integers(-2, 3, (50, 4)).astype(np.float32)
    exclude = jnp.asarray(rng.integers(1, 50, (2, 6)), jnp.int32)
    trie = build_trie(np.arange(50)[:, None], (50,))

    def both(trie, queries, table):
        step = lambda state, codes, level: ((queries @ table.T)[:, None], state)  # noqa: E731
        found = beam_search(step, None, trie, beams=1, k=12, exclude=exclude, allowed=jnp.arange(50) > 0)
        return found, top_k(queries, table, 12, valid=jnp.arange(50) > 0, exclude_ids=exclude)

    found, (scores, rows) = jax.jit(both)(trie, queries, table)
    np.testing.assert_array_equal(found.leaf, rows)
    np.testing.assert_allclose(np.diff(found.log_prob), np.diff(scores), atol=1e-5)


def test_what_does_not_fit_is_refused():
    trie = build_trie(np.array([[0, 0], [1, 1]]), (2, 2))
    with pytest.raises(ValueError, match=r"shape \(2, 1, 3\) at level 0, expected \(2, 1, 2\)"):
        beam_search(constant(0.0, (3, 2)), None, trie, beams=2)
    with pytest.raises(ValueError, match="beams = 0"):
        beam_search(constant(0.0, (2, 2)), None, trie, beams=0)
