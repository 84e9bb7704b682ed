"""A norm by domain: in a mixed batch every domain is normalised as a batch norm of its own rows would do it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Module, Params, Rngs
from recjax.nn.dense import Pass, merged
from recjax.nn.domain_norm import DomainNorm
from recjax.nn.interaction import Inputs
from recjax.nn.tower import BatchNorm, moved, name_norms

B, WIDTH, DOMAINS = 24, 6, 3
DRAW = np.random.default_rng(0)
X = jnp.float32(DRAW.normal(size=(B, WIDTH)) * [1, 2, 3, 1, 1, 5] + 2)
DOMAIN = jnp.asarray(DRAW.permutation(np.repeat([0, 0, 1], B // 3)), jnp.int32)  # 16 rows, 8 and none


class Model(Module):
    def __init__(self, domains: int, *, rngs: Rngs) -> None:
        self.norm = DomainNorm(WIDTH, domains, rngs=rngs) if domains else BatchNorm(WIDTH, rngs=rngs)
        name_norms(self)

    def __call__(self, batch: dict[str, jax.Array], train: bool = False) -> dict[str, jax.Array]:
        call = Pass(train, None, batch.get("domain"), {})
        return {"y": self.norm(batch["x"], call), **call.seen}

    def maintain(self, seen: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        return moved(self, seen)


def model_of(domains: int = DOMAINS) -> Functional:
    return Functional(lambda rngs: Model(domains, rngs=rngs))


def drawn(domains: int = DOMAINS) -> Params:
    draw, shapes = np.random.default_rng(1), jax.eval_shape(model_of(domains).init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.float32(np.abs(draw.normal(size=s.shape)) + 0.1), shapes)


def alone(params: Params, d: int) -> Params:
    """The batch norm that the norm by domain is for domain `d`."""
    p = params["norm"]
    own = {name: p[f"adapter_{name}"][d] for name in ("mean", "variance", "batches")}
    own |= {"scale": p["scale"] * p["adapter_scale"][d], "bias": p["bias"] + p["adapter_shift"][d]}
    return {"norm": own}


@pytest.mark.parametrize("train", [True, False])
def test_every_domain_is_normalised_as_by_a_batch_norm_of_its_own(train: bool) -> None:
    params = drawn()
    got = np.asarray(model_of().apply(params, {"x": X, "domain": DOMAIN}, train=train)["y"])
    for d in (0, 1):
        own = model_of(0).apply(alone(params, d), {"x": X[DOMAIN == d]}, train=train)["y"]
        np.testing.assert_allclose(got[DOMAIN == d], own, rtol=1e-5, atol=1e-5)


def test_running_moments_are_those_of_the_domains_own_batches() -> None:
    params = drawn()
    wanted = {d: alone(params, d) for d in range(DOMAINS)}
    for step in range(12):
        draw = np.random.default_rng(step)
        domain = draw.integers(0, 2 if step < 11 else 1, B)  # nobody is ever of the last domain
        batch = {"x": jnp.float32(draw.normal(size=(B, WIDTH))), "domain": jnp.asarray(domain, jnp.int32)}
        out = model_of().apply(params, batch, train=True)
        seen = {name: x[None] for name, x in out.items() if name != "y"}
        params = model_of().maintain(params, seen, jax.random.key(0))
        for d in np.unique(domain).tolist():
            out = model_of(0).apply(wanted[d], {"x": batch["x"][domain == d]}, train=True)
            seen = {name: x[None] for name, x in out.items() if name != "y"}
            wanted[d] = model_of(0).maintain(wanted[d], seen, jax.random.key(0))
    for d, one in wanted.items():
        for name in ("mean", "variance", "batches"):
            got = params["norm"][f"adapter_{name}"][d]
            np.testing.assert_allclose(got, one["norm"][name], rtol=1e-5, atol=1e-6)


def test_micro_batches_without_a_domain_do_not_count_for_it() -> None:
    params, model = drawn(), model_of()
    outs = [model.apply(params, {"x": X, "domain": d}, train=True) for d in (DOMAIN, jnp.zeros(B, jnp.int32))]
    seen = {name: jnp.stack([out[name] for out in outs]) for name in outs[0] if name != "y"}
    both = model.maintain(params, seen, jax.random.key(0))["norm"]
    first = model.maintain(params, {name: x[:1] for name, x in seen.items()}, jax.random.key(0))["norm"]
    np.testing.assert_array_equal(both["adapter_mean"][1:], first["adapter_mean"][1:])
    np.testing.assert_array_equal(both["adapter_mean"][2], params["norm"]["adapter_mean"][2])
    assert np.any(np.asarray(both["adapter_mean"][0] != first["adapter_mean"][0]))
    assert set(model.untrained) == {f"norm/adapter_{name}" for name in ("mean", "variance", "batches")}


def test_no_gradient_reaches_another_domain() -> None:
    params = drawn()

    def loss(params: Params) -> jax.Array:
        y = model_of().apply(params, {"x": X, "domain": DOMAIN}, train=True)["y"]
        return jnp.square(y[DOMAIN == 0]).sum()

    found = jax.grad(loss)(params)["norm"]
    for name in ("adapter_scale", "adapter_shift"):
        assert np.any(np.asarray(found[name][0]))
        np.testing.assert_array_equal(found[name][1:], 0)


def test_a_row_of_no_known_domain_is_given_the_mean_of_all() -> None:
    params = drawn()
    p = jax.tree.map(np.float64, params)["norm"]
    mean, variance = p["adapter_mean"].mean(0), p["adapter_variance"].mean(0)
    scale, bias = (p["scale"] * p["adapter_scale"]).mean(0), (p["bias"] + p["adapter_shift"]).mean(0)
    want = (np.float64(X) - mean) / np.sqrt(variance + 1e-5) * scale + bias
    got = model_of().apply(params, {"x": X, "domain": jnp.full(B, DOMAINS, jnp.int32)})["y"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_another_domain_leaves_the_others_as_they_are() -> None:
    params, fresh = drawn(), model_of(DOMAINS + 1).init(jax.random.key(0))
    more = jax.tree.map(
        lambda old, new: old if old.shape == new.shape else jnp.concatenate([old, new[DOMAINS:]]), params, fresh
    )
    batch = {"x": X, "domain": DOMAIN}
    np.testing.assert_array_equal(model_of(DOMAINS + 1).apply(more, batch)["y"], model_of().apply(params, batch)["y"])
    with pytest.raises(ConfigError, match="merged"):
        merged(params, 0)


def test_what_interactions_read_is_normalised_field_by_field_and_nothing_else_moves() -> None:
    norm = DomainNorm(WIDTH, DOMAINS, rngs=Rngs(jax.random.key(0)))
    inputs, call = Inputs(X[:, :4].reshape(B, 2, 2), X[:, 4:], X[:, 0]), Pass(True, None, DOMAIN, {})
    got = norm.of_inputs(inputs, call)
    np.testing.assert_array_equal(got.flat(), norm(X, call))
    assert got.vectors.shape == (B, 2, 2) and got.alike is None
    np.testing.assert_array_equal(got.first, inputs.first)
