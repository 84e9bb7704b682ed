"""Self-auxiliary and teacher distillation: what the two papers' spec cards list as exact."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recjax.core import state
from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Params
from recjax.core.step import make_train_step
from recjax.data.fields import FieldShape
from recjax.losses.binary_heads import BinaryHead
from recjax.losses.head_distillation import (
    SELECTORS,
    Adaptor,
    Curriculum,
    GroupCalibration,
    Mix,
    SelfDistillation,
    TeacherDistillation,
    Told,
    selector,
)
from recjax.losses.objective import Objective
from recjax.models.ranker import Head, Ranker
from recjax.nn.field_vectors import FieldConfig
from recjax.nn.interaction import Flat
from recjax.nn.tower import TowerConfig

B = 12
FIELDS = (FieldShape(name="user", kind="categorical", rows=6, offset=2), FieldShape(name="age", kind="numeric"))
CLICK, SOFT = Head(name="click"), Head(name="soft", beside="click")
HARD = BinaryHead(name="click", head="click")
TOLD = Told(jnp.int32(0))


def ranker(*heads: Head) -> Functional:
    interaction = Flat(deep=TowerConfig(widths=(8, 4), norm="batch", dropout=0.3))
    given: dict[str, Any] = {"inputs": FieldConfig(width=4), "table_scale": 1.0}
    return Functional(
        lambda rngs: Ranker(num_rows=8, fields=FIELDS, interaction=interaction, heads=heads, rngs=rngs, **given)
    )


def batch(seed: int = 0) -> dict[str, jax.Array]:
    draw = np.random.default_rng(seed)
    return {
        "field/user": jnp.asarray(draw.integers(2, 8, B), jnp.int32),
        "field/age": jnp.float32(draw.normal(size=B)),
        "domain": jnp.asarray(draw.integers(0, 2, B), jnp.int32),
        "label/click": jnp.float32(draw.random(B) < 0.4),
        "teacher/click": jnp.float32(draw.normal(size=B)),
        "weight": jnp.float32(draw.random(B) + 0.5),
    }


def trained(model: Functional, objectives: list[Objective], steps: int = 3, optimizer: Any = None) -> Params:
    """The parameters after a few steps; `head_soft` aside, the same whether there is such a head or not."""
    optimizer = optimizer or optax.adam(1e-2)
    step = jax.jit(make_train_step(model, objectives, optimizer, seed=0))
    now = state.create(model.init(jax.random.key(0)), optimizer)
    for number in range(steps):
        now, _ = step(now, batch(number), {})
    return now.params


def without(params: Params, *names: str) -> Params:
    return {name: part for name, part in params.items() if name not in names}


def same(a: Params, b: Params) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differs(a: Params, b: Params) -> bool:
    return any(np.any(np.asarray(x) != np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def gradients(objective: Objective, model: Functional, step: int = 7) -> Params:
    """Of the loss with respect to all parameters, in training."""

    def loss(params: Params) -> jax.Array:
        out = model.apply(params, batch(), train=True, key=jax.random.key(0))
        return objective(out, batch(), {"step": jnp.int32(step)}, jax.random.key(0)).total

    return jax.grad(loss)(model.init(jax.random.key(0)))


def test_selectors_are_what_they_are_called() -> None:
    hard, soft = jnp.float32([0, 0, 1, 1]), jnp.float32([0.2, 0.9, 0.2, 0.9])
    want = {
        "max": [0.2, 0.9, 1, 1],
        "soft_neg": [0.2, 0.9, 1, 1],
        "hard": [0, 0, 1, 1],
        "soft": [0.2, 0.9, 0.2, 0.9],
        "inverse": [0, 0, 0.2, 0.9],
        "mix": [0.1, 0.45, 0.6, 0.95],
        "curriculum": [0, 0, 1, 1],
        "adaptor": [0.05, 0.225, 0.8, 0.975],
    }
    assert set(want) == set(SELECTORS)
    told = Told(jnp.int32(0), jnp.full(4, 0.75))
    for name, values in want.items():
        np.testing.assert_allclose(SELECTORS[name](hard, soft, told), values, rtol=1e-6)
    np.testing.assert_array_equal(SELECTORS["max"](hard, soft, TOLD), SELECTORS["soft_neg"](hard, soft, TOLD))
    np.testing.assert_array_equal(Mix(share=1.0)(hard, soft, TOLD), hard)


def test_a_curriculum_begins_with_labels_and_ends_with_its_selector() -> None:
    hard, soft = jnp.float32([0, 1]), jnp.float32([0.5, 0.5])
    rule = Curriculum(start=10, steps=10, then="soft")
    for step, share in ((0, 0), (10, 0), (15, 0.5), (20, 1), (99, 1)):
        np.testing.assert_allclose(rule(hard, soft, Told(jnp.int32(step))), hard + share * (soft - hard), rtol=1e-6)


def test_selectors_that_cannot_be_say_so() -> None:
    for make in (lambda: selector("nobody"), lambda: Mix(share=2.0), lambda: Curriculum(start=0, then="nobody")):
        with pytest.raises(ConfigError):
            make()
    with pytest.raises(ConfigError, match="gates"):
        Adaptor()(jnp.zeros(1), jnp.zeros(1), TOLD)


@pytest.mark.parametrize("name", sorted(set(SELECTORS) - {"adaptor"}))
def test_nothing_flows_back_through_a_soft_label(name: str) -> None:
    objective = SelfDistillation(head="click", student="soft", selector=name)

    def loss(main: jax.Array) -> jax.Array:
        out = {"logit/click": main, "logit/soft": jnp.linspace(-1, 1, B)}
        return objective(out, batch(), {"step": jnp.int32(5)}, jax.random.key(0)).total

    np.testing.assert_array_equal(jax.grad(loss)(jnp.linspace(-2, 2, B)), 0)


def test_the_loss_is_its_formula() -> None:
    draw = np.random.default_rng(1)
    z, a, data = draw.normal(size=B), draw.normal(size=B), batch()
    out = {"logit/click": jnp.float32(z), "logit/soft": jnp.float32(a)}
    got = SelfDistillation(head="click")(out, data, {"step": jnp.int32(0)}, jax.random.key(0))
    p, q = (1 / (1 + np.exp(-x)) for x in (z, a))
    target, weight = np.maximum(np.asarray(data["label/click"]), p), np.asarray(data["weight"])
    want = -weight * (target * np.log(q) + (1 - target) * np.log(1 - q))
    np.testing.assert_allclose(got.total, want.sum(), rtol=1e-5)
    np.testing.assert_allclose(got.weight, weight.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    "objective", [SelfDistillation(head="click"), TeacherDistillation(head="click")], ids=["self", "teacher"]
)
def test_teaching_moves_the_trunk_and_never_the_head_that_is_served(objective: Objective) -> None:
    gradient = gradients(objective, ranker(CLICK, SOFT))
    for leaf in jax.tree.leaves(gradient["head_click"]):
        np.testing.assert_array_equal(leaf, 0)
    assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradient["interaction"]))
    assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradient["head_soft"]))


@pytest.mark.parametrize(
    "objective",
    [SelfDistillation(head="click", scale=0.0), TeacherDistillation(head="click", scale=0.0)],
    ids=["self", "teacher"],
)
def test_with_a_scale_of_nothing_training_is_the_baseline_to_the_last_bit(objective: Objective) -> None:
    baseline = trained(ranker(CLICK), [HARD])
    same(without(trained(ranker(CLICK, SOFT), [HARD, objective]), "head_soft"), baseline)
    scaled = trained(ranker(CLICK, SOFT), [HARD, type(objective)(head="click")])  # type: ignore[call-arg]
    assert differs(without(scaled, "head_soft"), baseline)


def test_with_the_trunk_stopped_it_keeps_the_baseline_s_gradients() -> None:
    stopped = Head(name="soft", beside="click", stop_gradient=True)
    baseline = trained(ranker(CLICK), [HARD])
    same(without(trained(ranker(CLICK, stopped), [HARD, SelfDistillation(head="click")]), "head_soft"), baseline)
    shifted = [HARD, TeacherDistillation(head="click")]
    same(without(trained(ranker(CLICK, stopped), shifted), "head_soft"), baseline)


def test_who_said_it_is_a_metric() -> None:
    told = batch() | {"teacher/version": jnp.full(B, 7.0).at[:4].set(jnp.nan)}
    told["teacher/click"] = told["teacher/click"].at[:4].set(jnp.nan)
    got = TeacherDistillation(head="click")({"logit/soft": jnp.zeros(B)}, told, {}, jax.random.key(0))
    total, weight = got.metrics["version"]
    np.testing.assert_allclose(total / weight, 7.0, rtol=1e-6)


def test_a_teacher_that_says_too_much_reaches_the_head_that_is_served_through_the_trunk_alone() -> None:
    """A constant on all its logits: in one step of plain descent only the trunk and the taught head are moved by it."""
    objectives: list[Objective] = [HARD, TeacherDistillation(head="click")]

    def after(shift: float, stop: bool) -> Params:
        soft = Head(name="soft", beside="click", stop_gradient=stop)
        model = ranker(CLICK, soft)
        step = jax.jit(make_train_step(model, objectives, optax.sgd(0.1), seed=0))
        told = batch() | {"teacher/click": batch()["teacher/click"] + shift}
        return step(state.create(model.init(jax.random.key(0)), optax.sgd(0.1)), told, {})[0].params

    plain, shifted = after(0.0, False), after(3.0, False)
    same(plain["head_click"], shifted["head_click"])
    for name in ("interaction", "table", "head_soft"):
        assert differs({name: plain[name]}, {name: shifted[name]}), name
    same(without(after(0.0, True), "head_soft"), without(after(3.0, True), "head_soft"))


def test_a_ramp_grows_from_nothing() -> None:
    out = {"logit/click": jnp.zeros(B), "logit/soft": jnp.ones(B)}
    whole = SelfDistillation(head="click")(out, batch(), {"step": jnp.int32(0)}, jax.random.key(0)).total
    for step, share in ((0, 0), (5, 0.25), (20, 1), (50, 1)):
        ramped = SelfDistillation(head="click", ramp_steps=20)
        got = ramped(out, batch(), {"step": jnp.int32(step)}, jax.random.key(0)).total
        np.testing.assert_allclose(got, share * whole, rtol=1e-6)
    baseline = trained(ranker(CLICK), [HARD], steps=1)
    first = trained(ranker(CLICK, SOFT), [HARD, SelfDistillation(head="click", ramp_steps=20)], steps=1)
    same(without(first, "head_soft"), baseline)  # the engine says which step it is
    second = trained(ranker(CLICK, SOFT), [HARD, SelfDistillation(head="click", ramp_steps=20)], steps=2)
    assert differs(without(second, "head_soft"), trained(ranker(CLICK), [HARD], steps=2))


def test_in_a_table_the_student_arrives_at_one_minus_the_square() -> None:
    """One logit for each context and head, trained on expected labels: p, and 1 - (1 - p)^2, which orders alike."""
    p = np.asarray([0.03, 0.2, 0.5, 0.7, 0.95])
    label = jnp.float32(np.concatenate([np.ones(5), np.zeros(5)]))
    data = {"label/click": label, "weight": jnp.float32(np.concatenate([p, 1 - p]))}
    objectives = [(HARD, "click"), (SelfDistillation(head="click"), "soft")]

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        out = {f"logit/{name}": jnp.tile(z, 2) for name, z in params.items()}
        parts = [o(out, data, {"step": jnp.int32(0)}, jax.random.key(0)).total for o, _ in objectives]
        return jnp.stack(parts).sum()

    @jax.jit
    def train(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        rates = {name: 4.0 for name in params}

        def body(_: Any, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return jax.tree.map(lambda z, g, rate: z - rate * g, params, jax.grad(loss)(params), rates)

        return jax.lax.fori_loop(0, 3000, body, params)

    found = jax.tree.map(jax.nn.sigmoid, train({name: jnp.zeros(5) for _, name in objectives}))
    np.testing.assert_allclose(found["click"], p, atol=1e-3)
    np.testing.assert_allclose(found["soft"], 1 - (1 - p) ** 2, atol=1e-3)
    np.testing.assert_array_equal(np.argsort(found["soft"]), np.argsort(found["click"]))


def test_an_adaptor_learns_a_gate_for_each_domain() -> None:
    gated = Head(name="soft", beside="click", gates=2)
    gradient = gradients(SelfDistillation(head="click", selector="adaptor"), ranker(CLICK, gated))
    assert np.all(np.asarray(gradient["head_soft"]["gates"]) != 0)
    for leaf in jax.tree.leaves(gradient["head_click"]):
        np.testing.assert_array_equal(leaf, 0)
    params = ranker(CLICK, gated).init(jax.random.key(0))
    gate = ranker(CLICK, gated).apply(params, batch(), train=True, key=jax.random.key(0))["gate/soft"]
    np.testing.assert_array_equal(gate, 0.5)


def test_where_the_teacher_says_nothing_only_labels_count() -> None:
    silent = batch() | {"teacher/click": jnp.full(B, jnp.nan)}
    out = {"logit/click": jnp.linspace(-1, 1, B), "logit/soft": jnp.ones(B)}
    for student in ("soft", "click"):
        objective = TeacherDistillation(head="click", student=student)
        got = objective(out, silent, {"step": jnp.int32(0)}, jax.random.key(0))
        assert got.total == 0 and got.weight == 0 and objective.total_weight(silent) == 0
    half = batch() | {"teacher/click": batch()["teacher/click"].at[::2].set(jnp.nan)}
    got = TeacherDistillation(head="click")(out, half, {"step": jnp.int32(0)}, jax.random.key(0))
    said, weight = np.asarray(half["teacher/click"])[1::2], np.asarray(half["weight"])[1::2]
    target, q = 1 / (1 + np.exp(-said)), 1 / (1 + np.exp(-1.0))
    want = -(weight * (target * np.log(q) + (1 - target) * np.log(1 - q))).sum()
    np.testing.assert_allclose(got.total, want, rtol=1e-5)
    covered, every = got.metrics["coverage"]
    np.testing.assert_allclose(covered / every, weight.sum() / np.asarray(half["weight"]).sum(), rtol=1e-6)


def test_a_temperature_softens_and_a_value_is_met_in_its_own_space() -> None:
    out, data = {"logit/soft": jnp.linspace(-1, 1, B)}, batch()
    warm = data | {"teacher/click": data["teacher/click"] / 2}
    a = TeacherDistillation(head="click", temperature=2.0)(out, data, {}, jax.random.key(0)).total
    b = TeacherDistillation(head="click")(out, warm, {}, jax.random.key(0)).total
    np.testing.assert_allclose(a, b, rtol=1e-6)
    got = TeacherDistillation(head="click", form="value")(out, data, {}, jax.random.key(0)).total
    error = np.linspace(-1, 1, B) - np.asarray(data["teacher/click"])
    np.testing.assert_allclose(got, (np.asarray(data["weight"]) * error**2).sum(), rtol=1e-5)


def test_totals_of_groups_calibrate_without_labels_of_rows() -> None:
    group = jnp.asarray([0, 0, 1, 1, 1, 2], jnp.int32)
    data = {"domain": group, "weight": jnp.ones(6), "label/click": jnp.float32([0.5, 0.5, 0.1, 0.1, 0.1, 0])}
    z = np.asarray([0.3, -1, 0.2, 2, -0.5, 1])
    p, out = 1 / (1 + np.exp(-z)), {"logit/click": jnp.float32(z)}
    got = GroupCalibration(head="click", groups=3)(out, data, {}, jax.random.key(0))
    want = (p[:2].sum() - 1) ** 2 / 1 + (p[2:5].sum() - 0.3) ** 2 / 0.3
    np.testing.assert_allclose(got.total, want, rtol=1e-5)
    exact = {"logit/click": jnp.log(jnp.float32([1, 1, 1 / 9, 1 / 9, 1 / 9, 1]))}
    met = GroupCalibration(head="click", groups=3)(exact, data, {}, jax.random.key(0))
    np.testing.assert_allclose(met.total, 0, atol=1e-6)
