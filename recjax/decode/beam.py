"""Beam search over the ids of a trie: nothing else can come out, and no beam ends where nothing is left.

The probability of an id is the product over its levels of a softmax over the codes that may follow, those below which
at least one allowed id is left: the probabilities of all allowed ids sum to one. Filters and exclusions are exact at
every level, since the ids below a prefix are a range of leaves and what is left of it is counted. All shapes are
static but that of the batch, so the same function runs in evaluation, in `infer` and in an exported bundle.

It knows no model: a function gives the logits of a level. It refuses to sample and to normalise by length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from recjax.core import sharding
from recjax.decode.remaining import Alive, make_alive
from recjax.decode.trie import Trie, take_own

# Logits beyond this count as this: finite, so that a model that rules out every id still leaves them in an order.
BOUND = 1e30

Step = Callable[[Any, Any, int], tuple[jax.Array, Any]]


class Beams(NamedTuple):
    """The best ids of each query, best first, by leaf number (`Trie.rows_of` gives rows); equals by leaf number.

    Where `valid` is False there was no further id: leaf -1, log-probability -inf.
    """

    leaf: Int[Array, "b k"]
    log_prob: Float[Array, "b k"]
    valid: Bool[Array, "b k"]


def beam_search(
    step: Step,
    state: Any,
    trie: Trie,
    *,
    beams: int,
    k: int | None = None,
    allowed: Bool[Array, "*q n"] | None = None,
    exclude: Int[Array, "b s"] | None = None,
) -> Beams:
    """The `k` (default `beams`) most probable ids, from the `beams` most probable prefixes of each level.

    `step(state, codes, level) -> (logits float [b, m, sizes[level]], state)`: the logits of `level` after `codes` int32
    [b, m] of the level before, which is None at level 0, where m = 1. Leaves of `state` are [b, m, ...] and follow
    their beams (m = 1 at first, or the row of every beam equal); what all beams of a row share belongs into the
    function. m is the smaller of `beams` and what can follow so few prefixes. After the end of a short id the logits
    are asked for and not used. A logit that is not a number is as low as one can be.

    `allowed`, [n] or [b, n], says by leaf number which ids may come out; those with leaf numbers `exclude` may not (-1
    is none). With at least as many beams as prefixes of each level the answer is exact.
    """
    last = trie.shape.levels - 1
    k = beams if k is None else k
    if beams < 1 or k < 1:
        raise ValueError(f"beams = {beams}, k = {k}: at least 1 of each")
    alive = make_alive(trie, allowed, exclude)
    logits, state = step(state, None, 0)
    nodes = jnp.zeros(logits.shape[:2], jnp.int32)
    scores = jnp.zeros(logits.shape[:2], jnp.float32)
    for level in range(last):
        candidates = _candidates(trie, level, nodes, scores, logits, alive)
        scores, place = _top_k(candidates.scores, min(beams, candidates.scores.shape[1]))
        # In the order of their prefixes, so that of equals the lower leaf is always the earlier one; no beams last.
        place = jnp.where(scores > -jnp.inf, place, candidates.scores.shape[1] - 1)
        place, scores = jax.lax.sort((place, scores), num_keys=1)
        nodes = jnp.take_along_axis(candidates.nodes, place, axis=1)
        codes = jnp.take_along_axis(candidates.codes, place, axis=1)
        parents = place // trie.shape.branch[level]
        state = jax.tree.map(lambda leaf, parents=parents: take_own(leaf, parents), state)
        logits, state = step(state, codes, level + 1)
    candidates = _candidates(trie, last, nodes, scores, logits, alive)
    scores, place = _top_k(candidates.scores, min(k, candidates.scores.shape[1]))
    missing = ((0, 0), (0, k - scores.shape[1]))
    leaf = jnp.pad(jnp.take_along_axis(candidates.nodes, place, axis=1), missing)
    scores = jnp.pad(scores, missing, constant_values=-jnp.inf)
    valid = scores > -jnp.inf
    return Beams(jnp.where(valid, leaf, -1), scores, valid)


class _Candidates(NamedTuple):
    """All children of the beams of a row: log-probability (-inf where there is none), node, and the code to it."""

    scores: jax.Array
    nodes: jax.Array
    codes: jax.Array


def _candidates(
    trie: Trie, level: int, nodes: jax.Array, scores: jax.Array, logits: jax.Array, alive: Alive
) -> _Candidates:
    """What may follow `nodes` [b, m] of a level, by the `logits` of its codes; each [b, m * branch]."""
    expected = (*nodes.shape, trie.shape.sizes[level])
    if logits.shape[1:] != expected[1:]:
        raise ValueError(f"logits of shape {logits.shape} at level {level}, expected {expected}")
    edges, codes = trie.children(level, nodes)
    is_alive = alive(level + 1, edges, scores > -jnp.inf)
    if codes is None:
        codes = jnp.broadcast_to(jnp.arange(logits.shape[2], dtype=jnp.int32), logits.shape)
    else:
        logits = jnp.take_along_axis(logits, codes, axis=2, mode="promise_in_bounds")
    scores = scores[..., None] + _log_softmax(logits, is_alive)
    flat = (scores.shape[0], -1)
    return _Candidates(scores.reshape(flat), edges[..., :-1].reshape(flat), codes.reshape(flat))


def _log_softmax(logits: jax.Array, is_alive: jax.Array) -> jax.Array:
    """Over the last axis, among what is alive; -inf for the rest."""
    logits = logits.astype(jnp.float32)
    logits = jnp.where(logits >= -BOUND, jnp.minimum(logits, BOUND), -BOUND)  # the latter if it is not a number, too
    logits = jnp.where(is_alive, logits, -jnp.inf)
    logits -= jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), -BOUND)
    total = jnp.sum(jnp.exp(logits), axis=-1, keepdims=True)
    return logits - jnp.log(jnp.maximum(total, 1.0))  # less than 1 only where nothing is alive


def _top_k(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The largest of each row, of equals the first; a device looks at its own rows, which the compiler cannot know."""
    run = partial(jax.lax.top_k, k=k)
    mesh = sharding.active()
    if mesh is not None:
        by_batch = PartitionSpec(mesh.axes_of("batch") or None)
        # Equal on the axes that are left out, so that nothing needs to be checked.
        run = jax.shard_map(run, mesh=mesh.devices, in_specs=by_batch, out_specs=by_batch, check_vma=False)
    best, places = run(scores)
    return best, places
