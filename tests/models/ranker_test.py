"""A ranker as a whole: fields to logits against numpy, heads that are taught, parameters that are served."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Params
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.data.fields import FieldShape
from recjax.models.ranker import Head, Ranker, without_auxiliary
from recjax.nn.crossing import Cross
from recjax.nn.dense import DomainAdapters
from recjax.nn.experts import Mmoe, Ple
from recjax.nn.factorization import FactorizationMachine
from recjax.nn.field_vectors import FieldConfig
from recjax.nn.final_mlp import FinalMlp
from recjax.nn.interaction import Flat
from recjax.nn.target_attention import TargetAttention
from recjax.nn.tower import TowerConfig

B, ROWS, WIDTH = 8, 128, 4
FIELDS = (
    FieldShape(name="user", kind="categorical", rows=10, offset=2),
    FieldShape(name="item", kind="categorical", rows=20, offset=12),
    FieldShape(name="genres", kind="multi_valued", width=3, rows=8, offset=32),
    FieldShape(name="liked", kind="sequence", width=4, rows=20, offset=12, of="item"),
    FieldShape(name="age", kind="numeric"),
    FieldShape(name="age.present", kind="numeric"),
    FieldShape(name="item.vector", kind="vector", width=5),
)
DEEP = TowerConfig(widths=(6, 4))


def model_of(**more: Any) -> Functional:
    given = {"interaction": Flat(deep=DEEP), "inputs": FieldConfig(width=WIDTH)} | more
    return Functional(lambda rngs: Ranker(num_rows=ROWS, fields=FIELDS, rngs=rngs, **given))


def drawn(model: Functional) -> Params:
    draw, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.float32(draw.normal(size=s.shape)), shapes)


def batch() -> dict[str, Any]:
    draw = np.random.default_rng(1)
    made: dict[str, Any] = {"domain": np.arange(B, dtype=np.int32) % 2}
    for field in FIELDS:
        if field.rows:
            shape = (B, field.width) if field.width else (B,)
            ids = draw.integers(field.offset, field.offset + field.rows, shape).astype(np.int32)
            if field.width:  # row r has r % (width + 1) values: some none at all
                ids[np.arange(field.width)[None] >= np.arange(B)[:, None] % (field.width + 1)] = 0
            made[f"field/{field.name}"] = ids
        else:
            shape = (B, field.width) if field.width else (B,)
            made[f"field/{field.name}"] = draw.normal(size=shape).astype(np.float32)
    return made


def answer(model: Functional, params: Params, data: dict[str, Any], *, train: bool = False) -> dict[str, jax.Array]:
    apply = jax.jit(lambda p, x: model.apply(p, x, train=train, key=jax.random.key(0) if train else None))
    return apply(params, data)


def tower(p: Params, x: np.ndarray) -> np.ndarray:
    for i in range(len(p)):
        x = np.maximum(dense(p[f"layer{i}"], x), 0)
    return x


def dense(p: Params, x: np.ndarray) -> np.ndarray:
    return x @ np.float64(p["weight"]) + np.float64(p["bias"])


def pooled(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    out = np.zeros((B, table.shape[1]))
    for i in range(B):
        real = ids[i][ids[i] > 0]
        out[i] = table[real].mean(0) if len(real) else 0
    return out


def fields(p: Params, data: dict[str, Any]) -> tuple[list[np.ndarray], np.ndarray]:
    table = np.float64(p["table"])
    vectors = [table[data["field/user"]], table[data["field/item"]], pooled(table, data["field/genres"])]
    vectors += [
        pooled(table, data["field/liked"]),
        dense(p["fields"]["project0"], np.float64(data["field/item.vector"])),
    ]
    return vectors, np.stack([data["field/age"], data["field/age.present"]], axis=1)


def test_fields_become_vectors_as_declared() -> None:
    model, data = model_of(), batch()
    params = drawn(model)
    vectors, numbers = fields(params, data)
    hidden = tower(params["interaction"]["deep"], np.concatenate([*vectors, numbers], axis=1))
    want = dense(params["head_label"]["output"]["out"], hidden)[:, 0]
    got = answer(model, params, data)
    assert set(got) == {"logit/label"}
    np.testing.assert_allclose(got["logit/label"], want, rtol=1e-3, atol=1e-3)


def test_target_attention_weighs_a_history_by_the_candidate() -> None:
    attention = TargetAttention(unit=TowerConfig(widths=(3,)))
    model, data = model_of(inputs=FieldConfig(width=WIDTH, attention=attention)), batch()
    params = drawn(model)
    vectors, numbers = fields(params, data)
    unit, table = params["fields"]["attention1"], np.float64(params["table"])
    history = np.zeros((B, WIDTH))
    for i in range(B):
        t = table[data["field/item"][i]]
        for row in data["field/liked"][i]:
            if row:
                s = table[row]
                history[i] += dense(unit["out"], tower(unit["unit"], np.concatenate([t, s, t - s, t * s]))) * s
    vectors[3] = history
    hidden = tower(params["interaction"]["deep"], np.concatenate([*vectors, numbers], axis=1))
    want = dense(params["head_label"]["output"]["out"], hidden)[:, 0]
    got = answer(model, params, data)["logit/label"]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    softmax = TargetAttention(unit=TowerConfig(widths=(3,)), softmax=True)
    other = answer(model_of(inputs=FieldConfig(width=WIDTH, attention=softmax)), params, data)
    nothing = np.arange(B) % 5 == 0  # without a history there is nothing to weigh
    assert np.isfinite(other["logit/label"]).all()
    np.testing.assert_allclose(other["logit/label"][nothing], want[nothing], rtol=1e-3, atol=1e-3)


def test_weights_of_fields_are_a_column_of_the_table() -> None:
    config = FieldConfig(width=WIDTH, numeric="vector")
    model, data = model_of(interaction=FactorizationMachine(), inputs=config), batch()
    params = drawn(model)
    table, scaled = np.float64(params["table"]), np.float64(params["fields"]["scaled"])
    assert table.shape == (ROWS, WIDTH + 1)
    first = table[data["field/user"]] + table[data["field/item"]]
    first += pooled(table, data["field/genres"]) + pooled(table, data["field/liked"])
    vectors = [table[data["field/user"]], table[data["field/item"]]]
    vectors += [pooled(table, data["field/genres"]), pooled(table, data["field/liked"])]
    projected = dense(params["fields"]["project0"], np.float64(data["field/item.vector"]))
    by_value = [data[f"field/{name}"][:, None] * scaled[i] for i, name in enumerate(("age", "age.present"))]
    every = [v[:, :-1] for v in vectors] + [projected] + [v[:, :-1] for v in by_value]
    pairs = sum((every[i] * every[j]).sum(1) for i in range(7) for j in range(i))
    want = first[:, -1] + sum(v[:, -1] for v in by_value) + pairs + float(params["head_label"]["output"]["bias"][0])
    got = answer(model, params, data)["logit/label"]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_padding_is_no_value() -> None:
    model, data = model_of(), batch()
    params = drawn(model)
    other = {**params, "table": params["table"].at[0].set(99.0)}
    np.testing.assert_array_equal(*(answer(model, p, data)["logit/label"] for p in (params, other)))
    longer = data | {"field/genres": np.pad(data["field/genres"], ((0, 0), (0, 2)))}
    a, b = (answer(model, params, x)["logit/label"] for x in (data, longer))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


HEADS = (Head(name="click", tower=TowerConfig(widths=(3,))), Head(name="like", tower=TowerConfig(widths=(3,))))


def mixed(p: Params, x: np.ndarray, experts: list[Params], gate: Params) -> np.ndarray:
    scores = dense(gate["out"], x)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return sum(weights[:, e : e + 1] * tower(expert, x) for e, expert in enumerate(experts))


def flat(p: Params, data: dict[str, Any]) -> np.ndarray:
    vectors, numbers = fields(p, data)
    return np.concatenate([*vectors, numbers], axis=1)


def head(p: Params, x: np.ndarray) -> np.ndarray:
    return dense(p["output"]["out"], tower(p["tower"], x))[:, 0]


def test_every_task_of_mmoe_has_a_gate_of_its_own() -> None:
    expert = TowerConfig(widths=(4,))
    model, data = model_of(interaction=Flat(), heads=HEADS, experts=Mmoe(experts=3, expert=expert)), batch()
    params = drawn(model)
    x, parts = flat(params, data), params["experts"]
    got = answer(model, params, data)
    for k, name in enumerate(("click", "like")):
        made = mixed(params, x, [parts[f"expert{e}"] for e in range(3)], parts[f"gate{k}"])
        np.testing.assert_allclose(got[f"logit/{name}"], head(params[f"head_{name}"], made), rtol=1e-3, atol=1e-3)


def test_every_task_of_ple_has_experts_of_its_own() -> None:
    experts = Ple(layers=2, shared=2, own=1, expert=TowerConfig(widths=(4,)))
    model, data = model_of(interaction=Flat(), heads=HEADS, experts=experts), batch()
    params = drawn(model)
    x = flat(params, data)
    tasks, shared = [x, x], x
    for i in range(2):
        layer, before = params["experts"][f"layer{i}"], tasks
        common = [layer["shared0"], layer["shared1"]]
        tasks = []
        for k in range(2):  # experts read what is theirs: a task's own the task, the shared ones what is shared
            own, scores = before[k], dense(layer[f"gate{k}"]["out"], before[k])
            weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            made = [tower(layer[f"task{k}_expert0"], own), *(tower(p, shared) for p in common)]
            tasks.append(sum(weights[:, e : e + 1] * m for e, m in enumerate(made)))
        shared = mixed(params, shared, common, layer["gate_shared"]) if i == 0 else shared
    got = answer(model, params, data)
    for k, name in enumerate(("click", "like")):
        np.testing.assert_allclose(got[f"logit/{name}"], head(params[f"head_{name}"], tasks[k]), rtol=1e-3, atol=1e-3)


TAUGHT = (Head(name="click"), Head(name="soft", beside="click"))


FUSED = FinalMlp(first=TowerConfig(widths=(4,)), second=TowerConfig(widths=(4,)), gate=None)


@pytest.mark.parametrize("interaction", [Flat(deep=DEEP), FactorizationMachine(), FUSED], ids=["mlp", "fm", "final"])
def test_a_head_that_is_taught_is_drawn_last_and_is_not_served(interaction: Any) -> None:
    with_it, without = (model_of(heads=heads, interaction=interaction) for heads in (TAUGHT, TAUGHT[:1]))
    params, plain = with_it.init(jax.random.key(0)), without.init(jax.random.key(0))
    assert set(params) - set(plain) == {"head_soft"}
    jax.tree.map(np.testing.assert_array_equal, {k: params[k] for k in plain}, plain)
    assert jax.tree.map(jnp.shape, params["head_soft"]) == jax.tree.map(jnp.shape, params["head_click"])
    served = model_of(heads=TAUGHT, auxiliary=False, interaction=interaction)
    kept = without_auxiliary(params, served)
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, plain)
    data = batch()
    training = answer(with_it, params, data, train=True)
    assert set(training) == {"logit/click", "logit/soft"}
    assert set(answer(with_it, params, data)) == {"logit/click"}
    answers = answer(served, kept, data)
    np.testing.assert_array_equal(answers["logit/click"], training["logit/click"])
    with pytest.raises(ConfigError):
        without_auxiliary(plain, with_it)


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("own", [None, TowerConfig(widths=(3,))])
def test_what_a_taught_head_reads(own: TowerConfig | None, stop: bool) -> None:
    main = Head(name="click", tower=TowerConfig(widths=(5,)))
    soft = Head(name="soft", beside="click", tower=own, stop_gradient=stop)
    model = model_of(heads=(main, soft), interaction=FactorizationMachine(deep=DEEP))
    params, data = drawn(model), jax.tree.map(jnp.asarray, batch())

    def logit(p: Params) -> jax.Array:
        return model.apply(p, data, train=True, key=jax.random.key(0))["logit/soft"].sum()

    gradient = jax.jit(jax.grad(logit))(params)
    touched = {name for name, part in gradient.items() if any(np.any(np.asarray(x)) for x in jax.tree.leaves(part))}
    trunk = set() if stop else {"table", "fields", "interaction"}
    beside = {"head_click"} if own is None and not stop else set()  # the hidden layers, not the output
    assert touched == {"head_soft"} | trunk | beside
    assert not np.any(np.asarray(gradient["head_click"]["output"]["out"]["weight"]))


def test_a_mesh_changes_nothing() -> None:
    attention = TargetAttention(unit=TowerConfig(widths=(4,)))
    model = model_of(interaction=Cross(layers=2, deep=DEEP), inputs=FieldConfig(width=WIDTH, attention=attention))
    params, data = drawn(model), batch()
    want = answer(model, params, data)["logit/label"]
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    with mesh.activate():
        placed = jax.device_put(params, mesh.shardings(model.axes))
        apply = jax.jit(lambda p, x: answer(model, p, x))
        got = apply(placed, mesh.put_batch(data))["logit/label"]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_adapters_are_of_domains_and_start_as_nothing() -> None:
    heads = (Head(name="click", tower=TowerConfig(widths=(4,))), TAUGHT[1])
    adapted = model_of(heads=heads, adapters=DomainAdapters(domains=2, rank=2))
    plain, data, key = model_of(heads=heads), batch(), jax.random.key(0)
    params = adapted.init(key)
    other = {**data, "domain": 1 - data["domain"]}
    answers = [answer(adapted, params, x)["logit/click"] for x in (data, other)]
    np.testing.assert_array_equal(answers[0], answer(plain, plain.init(key), data)["logit/click"])
    np.testing.assert_array_equal(*answers)
    params = drawn(adapted)
    answers = [answer(adapted, params, x)["logit/click"] for x in (data, other)]
    assert np.all(np.abs(answers[0] - answers[1]) > 1e-3)


@pytest.mark.parametrize(
    "heads", [(), TAUGHT[1:], (Head(name="a"), Head(name="a")), (Head(name="a"), Head(name="b", beside="c"))]
)
def test_heads_that_cannot_be_say_so(heads: tuple[Head, ...]) -> None:
    with pytest.raises(ConfigError):
        jax.eval_shape(model_of(heads=heads).init, jax.random.key(0))
