"""Optimisers against the published formulas, and the ways in which a run may be cut in two."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recjax.core import optim, schedules, state, switch
from recjax.core.errors import ConfigError
from recjax.core.optim import Group, Optimizer
from recjax.core.schedules import Schedule
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.core.switch import AdamThenSGD

PARAMS = {
    "item": {"table": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)},
    "block": {"up": np.linspace(-2, 1, 9, dtype=np.float32).reshape(3, 3), "norm": {"scale": np.ones(3, np.float32)}},
}
STEPS = 12


def gradients(params, step):
    """A gradient that depends on the parameters, so that a wrong state shows in all later steps."""
    return jax.tree.map(lambda p: jnp.sin(3 * p + step) * (1 + p), params)


@functools.cache
def compiled(config):
    optimizer = optim.make(config, PARAMS, STEPS)

    @jax.jit
    def step(current):
        updates, opt_state = optimizer.update(
            gradients(current.params, current.step), current.opt_state, current.params
        )
        params = optax.apply_updates(current.params, updates)
        return state.TrainState(step=current.step + 1, params=params, opt_state=opt_state)

    return jax.jit(lambda params: state.create(params, optimizer)), step


def train(config, steps=STEPS, start=None, observe=None):
    create, step = compiled(config)
    current = start or create(PARAMS)
    for _ in range(steps):
        current = step(current)
        if observe:
            current = observe(current)
    return current


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def close(a, b):
    """Equal but for what another fusion of the same sums may round differently."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_adamw_is_the_published_formula_with_clipping_decay_mask_and_schedule():
    config = Optimizer(
        kind="adamw", learning_rate=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, clip_norm=1.5,
        schedule=Schedule(kind="cosine", warmup_steps=3, end_factor=0.1),
    )  # fmt: skip
    got = train(config).params
    p = {k: v.astype(np.float64) for k, v in state.by_path(PARAMS).items()}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for t in range(STEPS):
        lr = (t + 1) / 3 if t < 3 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 3) / (STEPS - 3)))
        g = {k: np.sin(3 * x + t) * (1 + x) for k, x in p.items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        for k in p:
            clipped = g[k] * min(1, 1.5 / norm)
            m[k] = 0.8 * m[k] + 0.2 * clipped
            v[k] = 0.9 * v[k] + 0.1 * clipped**2
            step = m[k] / (1 - 0.8 ** (t + 1)) / (np.sqrt(v[k] / (1 - 0.9 ** (t + 1))) + 1e-6)
            p[k] = p[k] - 0.1 * lr * (step + (0.3 * p[k] if k == "block/up" else 0))
    for path, value in state.by_path(got).items():
        np.testing.assert_allclose(value, p[path], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["sgd", "adagrad"])
def test_the_other_kinds_are_the_published_formulas(kind):
    got = train(Optimizer(kind=kind, learning_rate=0.05, momentum=0.7, eps=1e-7)).params
    for path, x in state.by_path(PARAMS).items():
        x = x.astype(np.float64)
        slot = np.zeros_like(x) if kind == "sgd" else np.full_like(x, 0.1)
        for t in range(STEPS):
            g = np.sin(3 * x + t) * (1 + x)
            slot = 0.7 * slot + g if kind == "sgd" else slot + g**2
            x = x - 0.05 * (slot if kind == "sgd" else g / np.sqrt(slot + 1e-7))
        np.testing.assert_allclose(state.by_path(got)[path], x, rtol=2e-4, atol=2e-5)


def test_a_frozen_group_stays_put_holds_no_state_and_does_not_count_in_the_norm():
    config = Optimizer(kind="adam", learning_rate=0.1, clip_norm=0.5, groups=(("^item/", Group(frozen=True)),))
    got = train(config)
    equal(got.params["item"], jax.tree.map(jnp.asarray, PARAMS["item"]))
    assert not [path for path in state.by_path(got.opt_state) if "table" in path]
    without = {"block": PARAMS["block"]}
    optimizer = optim.make(Optimizer(kind="adam", learning_rate=0.1, clip_norm=0.5), without, STEPS)
    params = jax.tree.map(jnp.asarray, without)
    opt_state = optimizer.init(params)
    update = jax.jit(lambda p, s, t: optimizer.update(gradients(p, t), s, p))
    for t in range(STEPS):
        updates, opt_state = update(params, opt_state, t)
        params = optax.apply_updates(params, updates)
    for path, value in state.by_path(params).items():
        np.testing.assert_allclose(state.by_path(got.params)[path], value, rtol=1e-5)


def test_a_group_scales_its_learning_rate_and_the_first_match_wins():
    groups = (("table", Group(learning_rate_scale=0.5)), (".", Group(learning_rate_scale=2.0)))
    base, scaled = (train(Optimizer(kind="sgd", learning_rate=0.1, groups=g), steps=1).params for g in ((), groups))
    for path, start in state.by_path(PARAMS).items():
        moved, by = state.by_path(base)[path] - start, state.by_path(scaled)[path] - start
        np.testing.assert_allclose(by, moved * (0.5 if "table" in path else 2.0), rtol=1e-4, atol=1e-6)


def test_patterns_that_match_nothing_are_named():
    config = Optimizer(groups=(("tabel", Group()), ("table", Group()), ("item/table", Group())))
    with pytest.raises(ConfigError) as error:
        optim.make(config, PARAMS, STEPS)
    assert "'tabel'" in str(error.value) and "'item/table'" in str(error.value)
    assert "'table'" not in str(error.value).replace("'item/table'", "")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Optimizer(kind="adm"),
        lambda: Optimizer(kind="adam", weight_decay=0.1),
        lambda: Optimizer(ema_decay=1.0),
        lambda: Optimizer(groups=(("(", Group()),)),
        lambda: Schedule(kind="cosin"),
        lambda: Schedule(kind="drops"),
        lambda: Schedule(kind="drops", drops=(0.5, 0.4)),
        lambda: Schedule(drops=(0.5,)),
        lambda: AdamThenSGD(),
        lambda: AdamThenSGD(switch_step=3, patience=1),
        lambda: AdamThenSGD(switch_step=3, kind="sgd"),
        lambda: schedules.make(Schedule(kind="linear", warmup_steps=10), 1.0, 10),
    ],
)
def test_a_wrong_config_is_refused(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize("kind", schedules.KINDS)
def test_schedules_rise_to_the_peak_then_follow_their_kind(kind):
    drops = (0.4, 0.7) if kind == "drops" else ()
    rate = schedules.make(Schedule(kind=kind, warmup_steps=4, end_factor=0.2, drops=drops), 3.0, 20)
    np.testing.assert_allclose([rate(t) for t in range(4)], [0.75, 1.5, 2.25, 3.0], rtol=1e-6)
    later = np.array([rate(t) for t in range(4, 30)])
    assert np.all(np.diff(later) <= 1e-6) and later[0] <= 3.0
    expected = {"constant": 3.0, "linear": 0.6, "cosine": 0.6, "rsqrt": 3.0 * math.sqrt(4 / 30), "drops": 0.03}[kind]
    np.testing.assert_allclose(later[-1], expected, rtol=1e-5)


def test_the_average_is_the_recurrence_over_the_parameters_and_evaluation_reads_it():
    average = jax.tree.map(np.asarray, PARAMS)
    current = None
    config = Optimizer(kind="sgd", learning_rate=0.1, ema_decay=0.6)
    for _ in range(4):
        current = train(config, steps=1, start=current)
        average = jax.tree.map(lambda a, p: 0.6 * a + 0.4 * np.asarray(p), average, current.params)
    for path, value in state.by_path(optim.eval_params(current)).items():
        np.testing.assert_allclose(value, state.by_path(average)[path], rtol=1e-5)
    started = optim.with_params(compiled(config)[0](PARAMS), current.params)
    equal(optim.eval_params(started), started.params)
    plain = train(Optimizer(kind="sgd", learning_rate=0.1))
    assert optim.eval_params(plain) is plain.params


SWITCH = AdamThenSGD(
    kind="adam", learning_rate=0.05, sgd_learning_rate=0.02, switch_step=5, clip_norm=2.0, ema_decay=0.9,
    groups=(("table", Group(learning_rate_scale=0.5)),), schedule=Schedule(warmup_steps=2),
    sgd_schedule=Schedule(kind="linear", total_steps=10),
)  # fmt: skip


def test_before_the_switch_it_is_adam_and_after_it_a_fresh_sgd():
    common = {"clip_norm": 2.0, "groups": SWITCH.groups}
    adam = Optimizer(kind="adam", learning_rate=0.05, schedule=Schedule(warmup_steps=2), **common)
    sgd = Optimizer(kind="sgd", learning_rate=0.02, schedule=Schedule(kind="linear", total_steps=10), **common)
    middle = train(adam, steps=5)
    close(train(SWITCH, steps=5).params, middle.params)
    fresh = state.TrainState(
        step=middle.step, params=middle.params, opt_state=optim.make(sgd, PARAMS, STEPS).init(middle.params)
    )
    end = train(SWITCH)
    close(end.params, train(sgd, steps=STEPS - 5, start=fresh).params)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(end.opt_state.inner.adam))


@pytest.mark.parametrize("cut", [3, 5, 6])
def test_a_run_cut_on_either_side_of_the_switch_ends_in_the_same_bits(cut):
    half = jax.tree.map(np.asarray, train(SWITCH, steps=cut))  # through the host, as a checkpoint goes
    equal(train(SWITCH, steps=STEPS - cut, start=jax.tree.map(jnp.asarray, half)), train(SWITCH))


def test_patience_switches_after_the_update_that_saw_no_better_loss_and_survives_a_restart():
    config = AdamThenSGD(kind="adam", learning_rate=0.05, sgd_learning_rate=0.02, patience=2)
    losses = [5.0, 4.0, 4.5, 3.5, 3.5, float("nan"), 1.0, 9.0, 9.0, 9.0, 9.0, 9.0]

    def observe(current):
        loss = losses[int(current.step) - 1]
        return state.TrainState(
            step=current.step, params=current.params, opt_state=switch.observe(config, current.opt_state, loss)
        )

    whole = train(config, observe=observe)
    assert int(whole.opt_state.switch_step) == 6 and switch.is_switched(whole.opt_state)
    fixed = AdamThenSGD(kind="adam", learning_rate=0.05, sgd_learning_rate=0.02, switch_step=6)
    equal(whole.params, train(fixed).params)
    half = jax.tree.map(np.asarray, train(config, steps=5, observe=observe))
    equal(train(config, steps=7, start=jax.tree.map(jnp.asarray, half), observe=observe), whole)


def test_a_requested_switch_takes_place_once_and_keeps_the_layout():
    mesh = make_mesh(MeshConfig())
    config = AdamThenSGD(kind="adam", patience=3, ema_decay=0.5)
    opt_state = jax.device_put(optim.make(config, PARAMS, STEPS).init(PARAMS), mesh.sharding())
    asked = switch.request_switch(opt_state, 7)
    assert int(asked.inner.switch_step) == 7 and not switch.is_switched(asked)
    assert asked.inner.switch_step.sharding == mesh.sharding()
    now = switch.request_switch(opt_state, -1)
    assert switch.is_switched(now) and int(switch.request_switch(now, 9).inner.switch_step) == 0


def test_optimiser_slots_lie_where_their_parameters_lie():
    axes = {"item": {"table": ("items", None)}, "block": {"up": ("embed", "mlp"), "norm": {"scale": (None,)}}}
    shapes = {
        "item": {"table": (16, 6)},
        "block": {"up": (8, 12), "norm": {"scale": (6,)}},
    }
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    config = AdamThenSGD(switch_step=3, ema_decay=0.9, groups=(("table", Group()),), clip_norm=1.0)
    optimizer = optim.make(config, params, STEPS)
    shape_of = jax.eval_shape(lambda p: state.create(p, optimizer), params)
    got = state.by_path(state.shardings(mesh, shape_of, axes))
    assert got.keys() == state.by_path(shape_of).keys()
    by_name = {"table": ("items", None), "up": ("embed", "mlp"), "scale": (None,)}
    for path, sharding in got.items():
        assert sharding == mesh.sharding(by_name.get(path.rsplit("/", 1)[-1], ())), path
    assert sum(path.endswith("table") for path in got) == 5  # parameter, two moments, momentum, average


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 6), ("items", "embed")),
        ((16,), ("items",)),
        ((16, 1), ("items", None)),
        ((), ()),
        ((6,), (None,)),
        ((16, 7), (None, None)),
    ],
)
def test_a_slot_of_leading_dimensions_takes_their_axes(shape, expected):
    assert state.slot_axes(shape, (16, 6), ("items", "embed")) == expected
