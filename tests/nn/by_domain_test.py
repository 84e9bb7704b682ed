"""What is by domain: forms of adapters, towers and gates, and what low rank gives back of a planted change."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Module, Params, Rngs
from recjax.core.state import by_path
from recjax.data.fields import FieldShape
from recjax.models.ranker import Head, Ranker
from recjax.models.sequence import count_parameters
from recjax.nn.by_domain import ByDomain, DomainGate
from recjax.nn.crossing import Cross
from recjax.nn.dense import Dense, DomainAdapters, Pass, adapt, merged
from recjax.nn.experts import Mmoe, Ple
from recjax.nn.factorization import FactorizationMachine
from recjax.nn.field_attention import FieldAttention
from recjax.nn.field_vectors import FieldConfig
from recjax.nn.interaction import Flat
from recjax.nn.tower import TowerConfig

B, DOMAINS, INPUTS = 8, 3, 5
TOWER = TowerConfig(widths=(6, 4))
DRAW = np.random.default_rng(0)
X = jnp.float32(DRAW.normal(size=(B, INPUTS)))
DOMAIN = jnp.asarray([0, 1, 2, 0, 2, 1, 1, 0], jnp.int32)
UNKNOWN = jnp.full(B, DOMAINS, jnp.int32)


class Model(Module):
    def __init__(self, adapters: DomainAdapters | None, *, rngs: Rngs) -> None:
        self.tower = TOWER.make(INPUTS, rngs=rngs)
        if adapters:
            adapt(self, adapters, rngs)

    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        return self.tower(batch["x"], Pass(False, None, batch.get("domain"), {}))


def drawn(model: Functional, seed: int = 1) -> Params:
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.float32(draw.normal(size=s.shape)), shapes)


@pytest.mark.parametrize("form", ["low_rank", "full", "star"])
def test_every_form_begins_as_the_backbone_and_is_its_merged_one(form: Any) -> None:
    rule = DomainAdapters(domains=DOMAINS, form=form, rank=2)
    plain, adapted = (Functional(lambda rngs, a=a: Model(a, rngs=rngs)) for a in (None, rule))
    fresh, backbone = adapted.init(jax.random.key(3)), plain.init(jax.random.key(3))
    np.testing.assert_array_equal(adapted.apply(fresh, {"x": X, "domain": DOMAIN}), plain.apply(backbone, {"x": X}))
    params = drawn(adapted)
    mixed = adapted.apply(params, {"x": X, "domain": DOMAIN})
    for d in range(DOMAINS):
        alone = plain.apply(merged(params, d), {"x": X})
        np.testing.assert_allclose(np.asarray(mixed)[DOMAIN == d], np.asarray(alone)[DOMAIN == d], rtol=1e-4, atol=1e-4)
    stripped = {k: {n: v for n, v in x.items() if "adapter" not in n} for k, x in params["tower"].items()}
    unknown = adapted.apply(params, {"x": X, "domain": UNKNOWN})
    np.testing.assert_array_equal(unknown, plain.apply({"tower": stripped}, {"x": X}))
    wider = Functional(lambda rngs: Model(DomainAdapters(domains=DOMAINS + 1, form=form, rank=2), rngs=rngs))
    more = jax.tree.map(
        lambda old, new: old if old.shape == new.shape else jnp.concatenate([old, new[DOMAINS:]]),
        params,
        wider.init(jax.random.key(0)),
    )
    np.testing.assert_allclose(wider.apply(more, {"x": X, "domain": DOMAIN}), mixed, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(wider.apply(more, {"x": X, "domain": UNKNOWN}), unknown)


@pytest.mark.parametrize("form", ["low_rank", "full", "star"])
def test_a_row_of_several_domains_adds_up_and_one_of_a_single_one_is_that(form: Any) -> None:
    class One(Module):
        def __init__(self, *, rngs: Rngs) -> None:
            self.layer = Dense(INPUTS, 4, rngs=rngs)
            adapt(self, DomainAdapters(domains=DOMAINS, form=form, rank=2), rngs)

        def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
            return self.layer(batch["x"], Pass(False, None, batch["domain"], {}))

    model = Functional(lambda rngs: One(rngs=rngs))
    params = drawn(model)
    one_by_one = [model.apply(params, {"x": X, "domain": jnp.full(B, d, jnp.int32)}) for d in range(DOMAINS)]
    none = model.apply(params, {"x": X, "domain": UNKNOWN})
    mix = jnp.float32(DRAW.dirichlet(np.ones(DOMAINS), B))
    want = none + sum(mix[:, d : d + 1] * (one_by_one[d] - none) for d in range(DOMAINS))
    np.testing.assert_allclose(model.apply(params, {"x": X, "domain": mix}), want, rtol=1e-4, atol=1e-4)
    hard = jax.nn.one_hot(DOMAIN, DOMAINS)
    a, b = (model.apply(params, {"x": X, "domain": d}) for d in (hard, DOMAIN))
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("experts", [None, Mmoe(experts=2, expert=TOWER), Ple(expert=TOWER)])
def test_towers_of_other_domains_are_not_reached(experts: Any) -> None:
    class Whole(Module):
        def __init__(self, *, rngs: Rngs) -> None:
            self.inside = ByDomain(domains=DOMAINS, tower=TOWER, experts=experts).make(INPUTS, 2, rngs=rngs)

        def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
            return self.inside(batch["x"], Pass(False, None, batch["domain"], {}))

    model = Functional(lambda rngs: Whole(rngs=rngs))
    params = drawn(model)
    out = model.apply(params, {"x": X, "domain": DOMAIN})
    assert out.shape == (B, 2, 4)
    np.testing.assert_array_equal(out[:, 0], out[:, 1])
    only = jnp.full(B, 1, jnp.int32)
    gradient = jax.grad(lambda p: jnp.square(model.apply(p, {"x": X, "domain": only})).sum())(params)
    for path, g in by_path(gradient).items():
        others = any(part in ("tower0", "tower2", "gate0", "gate2") or part.startswith(("task0", "task2"))
                     for part in path.split("/"))  # fmt: skip
        assert np.any(np.asarray(g)) != others, path
    each = [model.apply(params, {"x": X, "domain": jnp.full(B, d, jnp.int32)}) for d in range(DOMAINS)]
    mean = model.apply(params, {"x": X, "domain": UNKNOWN})
    np.testing.assert_allclose(mean, sum(each) / DOMAINS, rtol=1e-4, atol=1e-4)


def test_a_fresh_gate_is_on_the_side_of_the_own_domain_whatever_it_reads() -> None:
    class Gate(Module):
        def __init__(self, *, rngs: Rngs) -> None:
            self.inside = DomainGate(INPUTS, DOMAINS, rngs=rngs)

        def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
            return self.inside(batch["x"], Pass(False, None, batch["domain"], {}))

    model = Functional(lambda rngs: Gate(rngs=rngs))
    mix = np.asarray(model.apply(model.init(jax.random.key(0)), {"x": X, "domain": DOMAIN}))
    np.testing.assert_array_equal(mix.argmax(1), DOMAIN)
    np.testing.assert_allclose(mix.max(1), np.exp(4) / (np.exp(4) + DOMAINS - 1), rtol=1e-5)
    none = model.apply(model.init(jax.random.key(0)), {"x": X, "domain": UNKNOWN})
    np.testing.assert_array_equal(none, 0)


FIELDS = tuple(
    FieldShape(name=name, kind="categorical", rows=40, offset=2 + 40 * k)
    for k, name in enumerate(("user", "item", "a"))
)
DEEP = TowerConfig(widths=(256, 128, 64))
BACKBONES = (Flat(deep=DEEP), FactorizationMachine(deep=DEEP), Cross(deep=DEEP), FieldAttention(deep=DEEP))


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda b: type(b).__name__)
def test_adapters_of_a_domain_are_a_small_share_of_any_backbone_and_change_it(backbone: Any) -> None:
    model = Functional(
        lambda rngs: Ranker(
            num_rows=128,
            fields=FIELDS,
            heads=(Head(name="click"),),
            interaction=backbone,
            inputs=FieldConfig(width=16),
            adapters=DomainAdapters(domains=2, rank_divisor=16, mixed=True),
            rngs=rngs,
        )
    )
    params = drawn(model)
    counts = count_parameters(params)
    assert 0 < counts["adapters"] / 2 <= 0.18 * counts["backbone"]
    batch = {f"field/{f.name}": jnp.arange(f.offset + 2, f.offset + 2 + B, dtype=jnp.int32) for f in FIELDS}
    said = [
        model.apply(params, {**batch, "domain": jnp.full(B, d, jnp.int32)}, train=False, key=None)["logit/click"]
        for d in (0, 1, 2)
    ]
    assert np.any(said[0] != said[1]) and np.any(said[0] != said[2])


def test_a_planted_change_of_rank_four_comes_back_by_rank_four_and_not_by_rank_one() -> None:
    """A linear backbone, moved in every domain by a matrix of rank 4: how much of what it misses is made good."""
    draw, inner, outer, rows, domains = np.random.default_rng(2), 12, 8, 96, 2
    x = jnp.float32(draw.normal(size=(domains * rows, inner)))
    domain = jnp.repeat(jnp.arange(domains, dtype=jnp.int32), rows)
    weight = draw.normal(size=(inner, outer))
    change = np.stack([draw.normal(size=(inner, 4)) @ draw.normal(size=(4, outer)) / 2 for _ in range(domains)])
    target = jnp.float32(np.einsum("bi,bio->bo", np.asarray(x), (weight[None] + change)[np.asarray(domain)]))

    def left(rank: int) -> float:
        """The share of the squared error of the backbone that is left."""

        class One(Module):
            def __init__(self, *, rngs: Rngs) -> None:
                self.layer = Dense(inner, outer, rngs=rngs)
                adapt(self, DomainAdapters(domains=domains, rank=rank), rngs)

            def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
                return self.layer(batch["x"], Pass(False, None, batch["domain"], {}))

        model = Functional(lambda rngs: One(rngs=rngs))
        params = model.init(jax.random.key(0))
        frozen = {"weight": jnp.float32(weight), "bias": jnp.zeros(outer)}

        def loss(adapters: Params) -> jax.Array:
            said = model.apply({"layer": {**frozen, **adapters}}, {"x": x, "domain": domain})
            return jnp.square(said - target).mean()

        adapters = {name: value for name, value in params["layer"].items() if "adapter" in name}
        optimizer, before = optax.adam(3e-2), loss(adapters)

        def step(carry: Any, _: None) -> Any:
            adapters, state = carry
            updates, state = optimizer.update(jax.grad(loss)(adapters), state)
            return (optax.apply_updates(adapters, updates), state), None

        (adapters, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=600))(
            (adapters, optimizer.init(adapters))
        )
        return float(loss(adapters) / before)

    four, one = left(4), left(1)
    assert four < 0.1 and left(6) < 0.1 and one > 0.3


def test_what_cannot_be_says_so() -> None:
    with pytest.raises(ConfigError, match="domains"):
        DomainAdapters(domains=0)
    with pytest.raises(ConfigError, match="towers"):
        ByDomain(domains=2, tower=TowerConfig(widths=()))
