"""Adapters by domain: what MLoRA promises of them, exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Module, Params, Rngs
from recjax.nn.dense import DomainAdapters, Pass, adapt, low_rank, merged
from recjax.nn.tower import TowerConfig

B, DOMAINS, INPUTS = 9, 3, 5
TOWER = TowerConfig(widths=(16, 8))


class Model(Module):
    def __init__(self, adapters: DomainAdapters | None, *, rngs: Rngs) -> None:
        self.tower = TOWER.make(INPUTS, rngs=rngs)
        if adapters:
            adapt(self, adapters, rngs)

    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        return self.tower(batch["x"], Pass(False, None, batch.get("domain"), {}))


def model_of(domains: int = DOMAINS) -> Functional:
    adapters = DomainAdapters(domains=domains, rank_divisor=4) if domains else None
    return Functional(lambda rngs: Model(adapters, rngs=rngs))


def drawn(model: Functional, seed: int = 0) -> Params:
    draw, shapes = np.random.default_rng(seed), jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.float32(draw.normal(size=s.shape)), shapes)


def batch() -> dict[str, jax.Array]:
    draw = np.random.default_rng(1)
    return {"x": jnp.float32(draw.normal(size=(B, INPUTS))), "domain": jnp.arange(B, dtype=jnp.int32) % DOMAINS}


def test_ranks_are_those_of_the_published_rule() -> None:
    rule = DomainAdapters(domains=2, rank_divisor=16)
    assert [rule.rank_of(width) for width in (256, 128, 64, 16, 8, 1)] == [16, 8, 4, 1, 1, 1]
    assert DomainAdapters(domains=2, rank=32).rank_of(64) == 32


def test_a_fresh_domain_is_the_backbone_to_the_last_bit() -> None:
    adapted, plain, data = model_of(), model_of(0), batch()
    params, key = adapted.init(jax.random.key(3)), jax.random.key(3)
    backbone = plain.init(key)
    for layer in ("layer0", "layer1"):  # the backbone draws what it draws without adapters
        np.testing.assert_array_equal(params["tower"][layer]["weight"], backbone["tower"][layer]["weight"])
        assert np.any(np.asarray(params["tower"][layer]["adapter_in"]))
    np.testing.assert_array_equal(adapted.apply(params, data), plain.apply(backbone, data))


def test_a_mixed_batch_is_its_domains_one_by_one_and_their_merged_backbones() -> None:
    model, plain, data = model_of(), model_of(0), batch()
    params = drawn(model)
    got = np.asarray(model.apply(params, data))
    for d in range(DOMAINS):
        own = {"x": data["x"], "domain": jnp.full(B, d, jnp.int32)}
        alone = np.asarray(model.apply(params, own))
        np.testing.assert_allclose(got[d::DOMAINS], alone[d::DOMAINS], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(plain.apply(merged(params, d), {"x": data["x"]}), alone, rtol=2e-6, atol=2e-5)


def test_a_layer_is_its_formula() -> None:
    params, data = drawn(model_of())["tower"], batch()
    x, domain = np.float64(data["x"]), np.asarray(data["domain"])
    for layer in ("layer0", "layer1"):
        p = {k: np.float64(v) for k, v in params[layer].items()}
        rows = [
            x[i] @ p["weight"] + p["bias"] + x[i] @ p["adapter_in"][d] @ p["adapter_out"][d] + p["adapter_bias"][d]
            for i, d in enumerate(domain)
        ]
        x = np.maximum(np.stack(rows), 0)
    np.testing.assert_allclose(model_of().apply({"tower": params}, data), x, rtol=1e-4, atol=1e-4)


def test_both_ways_to_compute_give_the_same_also_over_sequences() -> None:
    draw = np.random.default_rng(0)
    inner, outer = jnp.float32(draw.normal(size=(3, 5, 2))), jnp.float32(draw.normal(size=(3, 2, 4)))
    domain = jnp.asarray([0, 2, 1, 7, -1], jnp.int32)
    for shape in ((5, 5), (5, 3, 5)):
        x = jnp.float32(draw.normal(size=shape))
        a, b = (low_rank(x, domain, inner, outer, side_by_side=way) for way in (True, False))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(b)[3:], 0)  # a domain that is not there has no adapter
        np.testing.assert_array_equal(np.asarray(a)[3:], 0)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_no_gradient_reaches_another_domain(side_by_side: bool) -> None:
    draw = np.random.default_rng(0)
    x, inner, outer = (jnp.float32(draw.normal(size=s)) for s in ((B, 5), (3, 5, 2), (3, 2, 4)))

    def loss(inner: jax.Array, outer: jax.Array) -> jax.Array:
        domain = jnp.asarray([0, 2] * B, jnp.int32)[:B]
        return jnp.square(low_rank(x, domain, inner, outer, side_by_side=side_by_side)).sum()

    for gradient in jax.grad(loss, argnums=(0, 1))(inner, outer):
        np.testing.assert_array_equal(gradient[1], 0)
        assert np.any(np.asarray(gradient[0])) and np.any(np.asarray(gradient[2]))


def test_domains_may_change_places_with_their_slices() -> None:
    model, data = model_of(), batch()
    params, order = drawn(model), np.asarray([2, 0, 1])
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x: x[order] if str(path[-1].key).startswith("adapter") else x, params
    )
    there = {"x": data["x"], "domain": jnp.asarray(np.argsort(order), jnp.int32)[data["domain"]]}
    np.testing.assert_allclose(model.apply(moved, there), model.apply(params, data), rtol=1e-5, atol=1e-5)


def test_one_more_domain_leaves_the_others_and_begins_as_the_backbone() -> None:
    model, data = model_of(), batch()
    params = drawn(model)
    fresh = model_of(DOMAINS + 1).init(jax.random.key(0))
    more = jax.tree.map(  # as `core.warm_start` lets them grow
        lambda old, new: old if old.shape == new.shape else jnp.concatenate([old, new[DOMAINS:]]), params, fresh
    )
    np.testing.assert_allclose(model_of(DOMAINS + 1).apply(more, data), model.apply(params, data), rtol=1e-6, atol=1e-6)
    new = {"x": data["x"], "domain": jnp.full(B, DOMAINS, jnp.int32)}
    unknown = {"x": data["x"], "domain": jnp.full(B, -1, jnp.int32)}
    np.testing.assert_array_equal(model_of(DOMAINS + 1).apply(more, new), model.apply(params, unknown))
    assert jax.tree.map(jnp.shape, more) == jax.tree.map(jnp.shape, drawn(model_of(DOMAINS + 1)))


def test_what_cannot_be_says_so() -> None:
    with pytest.raises(ConfigError, match="rank"):
        DomainAdapters(domains=2, rank=0)
    with pytest.raises(ConfigError, match="no adapter for domain 3"):
        merged(drawn(model_of()), 3)
