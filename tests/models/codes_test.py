"""RQ-VAE and residual k-means: identities, what revives and what does not, and the same on many devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core import optim, state
from recjax.core.errors import ConfigError
from recjax.core.module import Functional, with_facts
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.core.step import make_train_step
from recjax.losses.codes import ResidualQuantization
from recjax.models.codes import ResidualKMeans, RqVae

ITEMS, CONTENT, WIDTH, LEVELS, SIZE = 64, 6, 4, 3, 8
KEY = jax.random.key(0)
VECTORS = np.random.default_rng(0).normal(size=(ITEMS, CONTENT)).astype(np.float32)
VECTORS[:2] = 0
FACTS = {"item/vectors": jnp.asarray(VECTORS)}


def model(**changes: Any) -> Functional:
    settings = {"hidden": (8,), "width": WIDTH, "levels": LEVELS, "size": SIZE, "revive_after": 0, **changes}
    settings |= {"iterations": 5}
    return Functional(functools.partial(RqVae, num_rows=ITEMS, content_width=CONTENT, **settings))


def fitted(of: Functional) -> Any:
    return jax.jit(of.fit)(of.init(KEY), FACTS, jax.random.key(1))


def batches(count: int, size: int = 16) -> list[dict[str, jax.Array]]:
    rng = np.random.default_rng(1)
    ids = [jnp.asarray(rng.integers(2, ITEMS, size), jnp.int32) for _ in range(count)]
    return [{"item_ids": i, "weight": jnp.ones(size)} for i in ids]


def trained(of: Functional, count: int, *, accumulate: int = 1, mesh: str = "data=1", preset: str = "data") -> Any:
    made = make_mesh(MeshConfig(shape=mesh, preset=preset), jax.devices()[: 1 if mesh == "data=1" else 8])
    with made.activate():
        params = fitted(of)
        transform = optim.make(optim.sparing(optim.Optimizer(kind="adam"), of.untrained), params, 10)
        step = jax.jit(make_train_step(of, [ResidualQuantization()], transform, seed=0, accumulate=accumulate))
        now, losses = state.create(params, transform), []
        for batch in batches(count):
            now, metrics = step(now, made.put_batch(jax.device_get(batch)), FACTS)
            losses.append(float(metrics["loss"]))
    return jax.device_get(now.params), losses


def test_what_is_chosen_and_what_is_left_make_the_vector() -> None:
    of = model()
    params = fitted(of)
    out = of.apply(params, {**batches(1)[0], **FACTS}, train=False, key=None)
    module: Any = of.bind(params)
    z = module.encode(out["content"])
    left = z - out["chosen"].sum(1)
    np.testing.assert_allclose(out["residuals"][:, -1] - out["chosen"][:, -1], left, atol=1e-5)
    books = np.asarray(params["codebooks"])
    for level in range(LEVELS):
        np.testing.assert_array_equal(out["chosen"][:, level], books[level][np.asarray(out["codes"])[:, level]])
    np.testing.assert_allclose(out["reconstruction"], module.decoder(out["chosen"].sum(1)), atol=1e-5)
    np.testing.assert_array_equal(out["content"], VECTORS[batches(1)[0]["item_ids"]])


def test_the_decoder_s_gradient_goes_straight_through_to_the_encoder() -> None:
    """As if the quantiser were the identity at the point it gives; and none of it goes to the books."""
    of = model()
    params = fitted(of)
    target = jnp.ones((16, CONTENT))

    def miss(params: Any) -> jax.Array:
        return (
            (of.apply(params, {**batches(1)[0], **FACTS}, train=False, key=None)["reconstruction"] - target) ** 2
        ).sum()

    got = jax.grad(miss)(params)
    assert not np.asarray(got["codebooks"]).any()
    x = FACTS["item/vectors"][batches(1)[0]["item_ids"]]
    module: Any = of.bind(params)
    z, pull = jax.vjp(lambda encoder: of.bind({**params, "encoder": encoder}).encode(x), params["encoder"])
    at = module.quantize(z).chosen.sum(1)
    want = pull(jax.grad(lambda z: ((module.decoder(z) - target) ** 2).sum())(at))[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got["encoder"], want)


def test_dead_codes_become_what_items_have_left_and_codes_in_use_stay() -> None:
    of = model(revive_after=2)
    params = fitted(of)
    books = np.asarray(params["codebooks"]) + 0
    books[:, 5:] = 50.0  # where nobody goes
    params = {**params, "codebooks": jnp.asarray(books)}
    for step in range(2):
        batch = {**batches(2, size=64)[step], **FACTS}
        out = of.apply(params, batch, train=True, key=jax.random.key(step))
        seen = {name.removeprefix("seen/"): value[None] for name, value in out.items() if name.startswith("seen/")}
        params = of.maintain(params, seen, jax.random.key(0))
        idle = np.asarray(params["idle"])
        used = np.asarray(seen["count"][0]) > 0
        np.testing.assert_array_equal(np.asarray(params["codebooks"])[used], books[used])
        assert used[:, :5].any() and not used[:, 5:].any() and (idle[used] == 0).all()
        if step == 0:
            np.testing.assert_array_equal(params["codebooks"], books)
            assert (idle[~used] == 1).all()
    revived, left = np.asarray(params["codebooks"]), np.asarray(out["residuals"])
    for level in range(LEVELS):
        for code in range(5, SIZE):
            assert (revived[level, code] == left[:, level]).all(1).any()
        assert len(np.unique(revived[level, 5:], axis=0)) == 3  # of different items
    assert (np.asarray(params["idle"])[:, 5:] == 0).all()


def test_revived_codes_are_drawn_from_every_micro_batch() -> None:
    of = model(revive_after=1)
    module: Any = of.bind(fitted(of))
    drawn = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((1, LEVELS, SIZE, WIDTH), np.float32)
    count = np.zeros((4, LEVELS, SIZE), np.float32)
    books = module.maintain({"count": jnp.asarray(count), "drawn": jnp.asarray(drawn)}, KEY)["codebooks"]
    assert sorted(set(np.asarray(books).ravel().tolist())) == [0, 1, 2, 3]


def test_moving_averages_are_those_of_a_loop() -> None:
    of = model(ema=0.9)
    params = fitted(of)
    count, total = np.ones((LEVELS, SIZE)), np.asarray(params["codebooks"], np.float64)
    for step in range(3):
        out = of.apply(params, {**batches(3)[step], **FACTS}, train=True, key=jax.random.key(step))
        codes, left = np.asarray(out["codes"]), np.asarray(out["residuals"], np.float64)
        count, total = 0.9 * count, 0.9 * total
        for item, level in np.ndindex(codes.shape):
            count[level, codes[item, level]] += 0.1
            total[level, codes[item, level]] += 0.1 * left[item, level]
        seen = {name.removeprefix("seen/"): value[None] for name, value in out.items() if name.startswith("seen/")}
        params = of.maintain(params, seen, KEY)
        np.testing.assert_allclose(params["codebooks"], total / count[..., None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_micro_batches_and_devices_change_nothing(ema: float | None) -> None:
    of = model(ema=ema)
    params, losses = trained(of, 3)
    assert of.untrained == (("idle",) if ema is None else ("count", "idle", "total"))
    for how in ({"accumulate": 4}, {"accumulate": 2, "mesh": "data=4,model=2", "preset": "fsdp_model"}):
        got, other = trained(of, 3, **how)
        np.testing.assert_allclose(other, losses, rtol=1e-4)
        np.testing.assert_allclose(got["codebooks"], params["codebooks"], rtol=1e-3, atol=1e-4)


def test_it_learns_to_rebuild_content() -> None:
    """With nothing but four clusters to tell, it tells them."""
    place = np.random.default_rng(2).integers(0, 4, ITEMS)
    clusters = (3 * np.eye(CONTENT)[place]).astype(np.float32)
    facts = {"item/vectors": jnp.asarray(clusters)}
    of = model(levels=1, size=4, revive_after=5)
    params = of.fit(of.init(KEY), facts, KEY)
    transform = optim.make(optim.sparing(optim.Optimizer(kind="adam", learning_rate=0.01), of.untrained), params, 10)
    step = jax.jit(make_train_step(of, [ResidualQuantization()], transform, seed=0))
    now, metrics = state.create(params, transform), {}
    for batch in batches(200):
        now, metrics = step(now, batch, facts)
    assert float(metrics["codes/reconstruction"]) < 0.1
    out = of.apply(now.params, {"item_ids": jnp.arange(2, ITEMS), **facts}, train=False, key=None)
    assert len(set(zip(place[2:].tolist(), np.asarray(out["codes"])[:, 0].tolist(), strict=True))) == 4


def test_residual_k_means_is_the_model_without_an_autoencoder() -> None:
    make = functools.partial(ResidualKMeans, num_rows=ITEMS, content_width=CONTENT, levels=2, size=SIZE)
    of = Functional(make)
    params = of.fit(of.init(KEY), FACTS, KEY)
    assert set(params) == {"codebooks"} and of.untrained == () and not of.maintains
    out = of.apply(with_facts(params, FACTS), {"item_ids": jnp.arange(2, ITEMS)}, train=False, key=None)
    assert ((out["content"] - out["reconstruction"]) ** 2).mean() < 0.5 * (out["content"] ** 2).mean()
    sampled = Functional(functools.partial(make, sample=20))  # of items that have content
    books = sampled.fit(of.init(KEY), FACTS, KEY)["codebooks"]
    assert np.isfinite(books).all() and not np.array_equal(books, params["codebooks"])


def test_only_the_direction_of_unit_content_counts() -> None:
    of = model(unit_content=True)
    params = fitted(of)
    scale = np.random.default_rng(0).uniform(0.1, 10, (ITEMS, 1)).astype(np.float32)
    scaled = {"item/vectors": FACTS["item/vectors"] * scale}
    ids = {"item_ids": jnp.arange(ITEMS)}
    one, other = (of.apply(params, {**ids, **facts}, train=False, key=None) for facts in (FACTS, scaled))
    np.testing.assert_allclose(one["content"], other["content"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((one["content"][2:] ** 2).mean(1), 1, rtol=1e-4)
    assert not np.asarray(one["content"][:2]).any()  # nothing stays nothing
    books = jax.jit(of.fit)(of.init(KEY), scaled, jax.random.key(1))["codebooks"]
    np.testing.assert_allclose(books, params["codebooks"], atol=1e-4)


def test_what_cannot_be_is_told() -> None:
    of = model()
    with pytest.raises(ConfigError, match="the recipe has none"):
        of.fit(of.init(KEY), {}, KEY)
    with pytest.raises(ConfigError, match="content_width = 6") as error:
        of.fit(of.init(KEY), {"item/vectors": jnp.ones((ITEMS, 9))}, KEY)
    assert error.value.expected.startswith("9")
    for wrong in ({"levels": 0}, {"size": 1}, {"ema": 1.0}, {"revive_after": -1}, {"normalize": True}):
        with pytest.raises(ConfigError):
            model(**wrong)


def test_flops_count_weights_and_books() -> None:
    of = model()
    module: Any = of.bind(of.init(KEY))
    parameters = sum(x.size for path, x in state.by_path(of.init(KEY)).items() if path != "idle")
    assert dataclasses.asdict(module.token_flops(1))["weights"] >= 6 * parameters
