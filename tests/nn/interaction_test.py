"""Every interaction against a transcription in plain numpy, loops and all, in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Module, Params, Rngs
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.nn.crossing import Cross
from recjax.nn.dense import Pass
from recjax.nn.factorization import Dot, FactorizationMachine, pair_sum
from recjax.nn.field_attention import FieldAttention
from recjax.nn.final_mlp import FinalMlp
from recjax.nn.interaction import Flat, Inputs, InputShape, Interaction
from recjax.nn.tower import ResidualConfig, TowerConfig

B, NAMES, WIDTH, NUMBERS = 8, ("user", "item", "genre"), 4, 2
SHAPE = InputShape(names=NAMES, width=WIDTH, numbers=NUMBERS)
DEEP = TowerConfig(widths=(6, 4))


class Whole(Module):
    """An interaction and the output layer it makes for a head."""

    def __init__(self, config: Interaction, *, rngs: Rngs) -> None:
        self.inside = config.make(SHAPE, rngs=rngs)
        self.head = self.inside.output(rngs=rngs)

    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        call = Pass(False, None, None, {})
        crossed = self.inside(Inputs(**batch), call)
        logit = self.head(crossed.hidden, call)
        return logit if crossed.offset is None else logit + crossed.offset


def built(config: Interaction) -> tuple[Functional, Params, dict[str, jax.Array]]:
    model, draw = Functional(lambda rngs: Whole(config, rngs=rngs)), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.float32(draw.normal(size=s.shape) / 2), shapes)
    batch = {"vectors": draw.normal(size=(B, 3, WIDTH)), "numbers": draw.normal(size=(B, NUMBERS))}
    return model, params, {k: jnp.float32(x) for k, x in (batch | {"first": draw.normal(size=B)}).items()}


def dense(p: Params, x: np.ndarray) -> np.ndarray:
    return x @ np.float64(p["weight"]) + (np.float64(p["bias"]) if "bias" in p else 0)


def tower(p: Params, x: np.ndarray) -> np.ndarray:
    for i in range(len(p)):
        x = np.maximum(dense(p[f"layer{i}"], x), 0)
    return x


def layer_norm(p: Params, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * np.float64(p["scale"]) + np.float64(
        p["bias"]
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


Numpy = dict[str, np.ndarray]


def flat(batch: Numpy) -> np.ndarray:
    return np.concatenate([batch["vectors"].reshape(B, -1), batch["numbers"]], axis=1)


def regression(p: Params, batch: Numpy) -> np.ndarray:
    return dense(p["head"]["out"], flat(batch))[:, 0]


def mlp(p: Params, batch: Numpy) -> np.ndarray:
    return dense(p["head"]["out"], tower(p["inside"]["deep"], flat(batch)))[:, 0]


def crosses(p: Params, x: np.ndarray) -> np.ndarray:
    first = x
    for i in range(2):
        layer = p[f"cross{i}"]
        out = np.zeros_like(x)
        for row in range(B):  # element by element, as the paper writes it
            for j in range(x.shape[1]):
                if "weight" in layer:
                    w = sum(float(layer["weight"][k, j]) * x[row, k] for k in range(x.shape[1]))
                    w += float(layer["bias"][j])
                else:
                    w = dense(layer["up"], dense(layer["down"], x[row]))[j]
                out[row, j] = first[row, j] * w + x[row, j]
        x = out
    return x


def parallel(p: Params, batch: Numpy) -> np.ndarray:
    x = flat(batch)
    both = np.concatenate([crosses(p["inside"], x), tower(p["inside"]["deep"], x)], axis=1)
    return dense(p["head"]["out"], both)[:, 0]


def stacked(p: Params, batch: Numpy) -> np.ndarray:
    return dense(p["head"]["out"], tower(p["inside"]["deep"], crosses(p["inside"], flat(batch))))[:, 0]


def crosses_alone(p: Params, batch: Numpy) -> np.ndarray:
    return dense(p["head"]["out"], crosses(p["inside"], flat(batch)))[:, 0]


def mixture(p: Params, batch: Numpy) -> np.ndarray:
    inside, x = p["inside"], flat(batch)
    first = x
    for i in range(2):
        layer = {k: np.float64(v) for k, v in inside[f"cross{i}"].items()}
        gates = softmax(np.stack([x @ np.float64(inside["gate"]["weight"])[:, e] for e in range(3)], axis=1))
        out = np.zeros_like(x)
        for e in range(3):
            v = np.tanh(np.tanh(x @ layer["down"][e]) @ layer["core"][e])
            out += gates[:, e : e + 1] * (first * (v @ layer["up"][e] + layer["bias"]))
        x = out + x
    return dense(p["head"]["out"], x)[:, 0]


def unicorn(p: Params, batch: Numpy) -> np.ndarray:
    deep, x = p["inside"]["deep"], flat(batch)
    h = dense(deep["project"], x)
    for i in range(2):
        h = h + dense(deep[f"outer{i}"], np.maximum(dense(deep[f"inner{i}"], layer_norm(deep[f"norm{i}"], h)), 0))
    return dense(p["head"]["out"], np.concatenate([crosses(p["inside"], x), h], axis=1))[:, 0]


def machine(p: Params, batch: Numpy) -> np.ndarray:
    v, out = batch["vectors"], batch["first"] + batch["numbers"] @ np.float64(p["inside"]["linear"])
    for i in range(3):
        for j in range(i + 1, 3):
            out = out + (v[:, i] * v[:, j]).sum(1)
    return out


def machine_alone(p: Params, batch: Numpy) -> np.ndarray:
    return machine(p, batch) + float(p["head"]["bias"][0])


def deep_fm(p: Params, batch: Numpy) -> np.ndarray:
    return machine(p, batch) + dense(p["head"]["out"], tower(p["inside"]["deep"], flat(batch)))[:, 0]


def dlrm(p: Params, batch: Numpy) -> np.ndarray:
    bottom = tower(p["inside"]["bottom"], batch["numbers"])
    vectors = [bottom, *(batch["vectors"][:, i] for i in range(3))]
    pairs = [(vectors[i] * vectors[j]).sum(1) for i in range(4) for j in range(i)]
    x = np.concatenate([bottom, np.stack(pairs, axis=1)], axis=1)
    return dense(p["head"]["out"], tower(p["inside"]["top"], x))[:, 0]


def final_mlp(p: Params, batch: Numpy) -> np.ndarray:
    inside, x = p["inside"], flat(batch)
    contexts = {"first": batch["vectors"][:, [0]].reshape(B, -1), "second": batch["vectors"][:, [1, 2]].reshape(B, -1)}
    streams = {}
    for name, context in contexts.items():
        gate = inside[f"{name}_gate"]
        factor = 2 * sigmoid(dense(gate["out"], tower(gate["tower"], context)))
        streams[name] = tower(inside[name], x * factor)
    return fusion(p["head"], streams["first"], streams["second"])


def fusion(p: Params, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    out = dense(p["linear"], np.concatenate([x, y], axis=1))[:, 0]
    heads, i, j = p["bilinear"].shape
    for h in range(heads):
        for row in range(B):
            out[row] += x[row, h * i : (h + 1) * i] @ np.float64(p["bilinear"][h]) @ y[row, h * j : (h + 1) * j]
    return out


def auto_int(p: Params, batch: Numpy) -> np.ndarray:
    inside, x = {k: np.float64(v["weight"]) for k, v in p["inside"].items() if k != "deep"}, batch["vectors"]
    for i in range(2):
        out = x @ inside[f"residual{i}"]
        for h in range(2):
            part = slice(3 * h, 3 * h + 3)
            q, k, v = (x @ inside[f"{name}{i}"][:, part] for name in ("query", "key", "value"))
            for row in range(B):
                out[row, :, part] += softmax(q[row] @ k[row].T) @ v[row]
        x = np.maximum(out, 0)
    both = [x.reshape(B, -1), batch["numbers"], tower(p["inside"]["deep"], flat(batch))]
    return dense(p["head"]["out"], np.concatenate(both, axis=1))[:, 0]


def ungated(p: Params, batch: Numpy) -> np.ndarray:
    x = flat(batch)
    return fusion(p["head"], tower(p["inside"]["first"], x), tower(p["inside"]["second"], x))


TWO = {"first": TowerConfig(widths=(8, 4)), "second": TowerConfig(widths=(6,)), "fusion_heads": 2}
GATED = FinalMlp(**TWO, gate=TowerConfig(widths=(6,)), first_context=("user",), second_context=("item", "genre"))
CASES: dict[str, tuple[Any, Any]] = {
    "regression": (Flat(), regression),
    "mlp": (Flat(deep=DEEP), mlp),
    "dcnv2": (Cross(layers=2, deep=DEEP), parallel),
    "dcnv2_stacked": (Cross(layers=2, deep=DEEP, structure="stacked"), stacked),
    "dcnv2_low_rank": (Cross(layers=2, rank=3, deep=None), crosses_alone),
    "dcnv2_mixture": (Cross(layers=2, rank=3, experts=3, deep=None), mixture),
    "unicorn": (Cross(layers=2, deep=ResidualConfig(blocks=2, width=6)), unicorn),
    "fm": (FactorizationMachine(), machine_alone),
    "deep_fm": (FactorizationMachine(deep=DEEP), deep_fm),
    "dlrm": (Dot(bottom=TowerConfig(widths=(5, WIDTH)), top=DEEP), dlrm),
    "auto_int": (FieldAttention(layers=2, heads=2, head_width=3, deep=DEEP), auto_int),
    "final_mlp": (GATED, final_mlp),
    "final_mlp_ungated": (FinalMlp(**TWO, gate=None), ungated),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_its_formula(name: str) -> None:
    config, want = CASES[name]
    model, params, batch = built(config)
    exact = {k: np.float64(x) for k, x in batch.items()}
    np.testing.assert_allclose(model.apply(params, batch), want(params, exact), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["dcnv2", "deep_fm", "final_mlp", "unicorn"])
def test_a_mesh_changes_nothing(name: str) -> None:
    model, params, batch = built(CASES[name][0])
    want = model.apply(params, batch)
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    with mesh.activate():
        placed = jax.device_put(params, mesh.shardings(model.axes))
        got = jax.jit(model.apply)(placed, mesh.put_batch({k: np.asarray(x) for k, x in batch.items()}))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_full_rank_equals_the_matrix_form() -> None:
    low, params, batch = built(Cross(layers=2, rank=SHAPE.flat, deep=None))
    whole, _, _ = built(Cross(layers=2, deep=None))
    inside = {
        name: {"weight": layer["down"]["weight"] @ layer["up"]["weight"], "bias": layer["up"]["bias"]}
        for name, layer in params["inside"].items()
    }
    got = whole.apply({"inside": inside, "head": params["head"]}, batch)
    np.testing.assert_allclose(got, low.apply(params, batch), rtol=1e-4, atol=1e-4)


def test_a_mixture_of_equal_experts_is_one_of_them() -> None:
    model, params, batch = built(Cross(layers=2, rank=3, experts=3, deep=None))
    for i in range(2):
        layer = params["inside"][f"cross{i}"]
        params["inside"][f"cross{i}"] = layer | {
            name: jnp.repeat(layer[name][:1], 3, axis=0) for name in ("down", "core", "up")
        }
    other = jax.tree.map(lambda x: x, params)
    other["inside"]["gate"] = {"weight": 5 * params["inside"]["gate"]["weight"]}
    np.testing.assert_allclose(model.apply(params, batch), model.apply(other, batch), rtol=1e-4, atol=1e-5)


def test_the_order_of_fields_does_not_matter_to_pairs() -> None:
    vectors = jnp.float32(np.random.default_rng(0).normal(size=(B, 5, WIDTH)))
    np.testing.assert_allclose(pair_sum(vectors), pair_sum(vectors[:, ::-1]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pair_sum(vectors[:, :1]), np.zeros((B, WIDTH)), atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cross(experts=2),
        lambda: Cross(layers=0),
        lambda: FinalMlp(fusion_heads=3, first=DEEP, second=DEEP),
        lambda: built(Dot(bottom=TowerConfig(widths=(5,)))),
        lambda: built(FinalMlp(**TWO, first_context=("nobody",))),
        lambda: TowerConfig(widths=(8, 0)),
    ],
)
def test_what_cannot_be_built_says_so(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
