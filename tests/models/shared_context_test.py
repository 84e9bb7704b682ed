"""Candidates that share the context of their request: the same logits as rows with all their fields, for less work."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Params
from recjax.data.fields import FieldShape
from recjax.models.ranker import Head, Ranker
from recjax.nn.config import TransformerConfig
from recjax.nn.crossing import Cross
from recjax.nn.dense import DomainAdapters
from recjax.nn.factorization import Dot, FactorizationMachine
from recjax.nn.field_attention import FieldAttention
from recjax.nn.field_vectors import FieldConfig
from recjax.nn.final_mlp import FinalMlp
from recjax.nn.intent_gate import IntentGate
from recjax.nn.interaction import Flat, Interaction
from recjax.nn.target_attention import TargetAttention
from recjax.nn.target_encoder import TargetEncoder
from recjax.nn.tower import ResidualConfig, TowerConfig

ROWS, WIDTH, CONTEXTS = 128, 8, 3
OWNER = np.array([0, 0, 2, 1, 2, 0, 1, 2, 2, 0], np.int32)
FIELDS = (
    FieldShape(name="user", kind="categorical", rows=30, offset=2),
    FieldShape(name="item", kind="categorical", rows=40, offset=32),
    FieldShape(name="source", kind="categorical", rows=40, offset=32, of="item"),
    FieldShape(name="words", kind="multi_valued", width=4, rows=50, offset=72),
    FieldShape(name="liked", kind="sequence", width=5, rows=40, offset=32, of="item"),
    FieldShape(name="title", kind="vector", width=6),
    FieldShape(name="age", kind="numeric"),
    FieldShape(name="price", kind="numeric"),
)
OF_CONTEXT = ("user", "source", "words", "liked", "age")
DEEP, UNIT = TowerConfig(widths=(16, 8), norm="batch"), TowerConfig(widths=(6,), activation="dice")
HSTU = TransformerConfig(width=WIDTH, attention="hstu", position="none", relative="position", ffn="none", max_length=6)
INPUTS = FieldConfig(width=WIDTH, attention=TargetAttention(unit=UNIT))
INTERACTIONS = {
    "mlp": Flat(deep=DEEP),
    "residual": Flat(deep=ResidualConfig(blocks=1, width=16)),
    "logistic": Flat(),
    "dcn": Cross(layers=2, deep=DEEP),
    "dcn of low rank, stacked": Cross(layers=2, rank=4, deep=DEEP, structure="stacked"),
    "dcn of experts": Cross(layers=2, rank=4, experts=2, deep=None),
    "deepfm": FactorizationMachine(deep=DEEP),
    "dlrm": Dot(bottom=TowerConfig(widths=(WIDTH,)), top=DEEP),
    "autoint": FieldAttention(layers=1, deep=DEEP),
    "finalmlp": FinalMlp(first=DEEP, second=DEEP, gate=None),
    "finalmlp with gates": FinalMlp(first=DEEP, second=DEEP, first_context=("user",)),
}


def ranker(interaction: Interaction, **more: Any) -> Functional:
    told: dict[str, Any] = {"inputs": INPUTS, "heads": (Head(name="click"),), "fields": FIELDS, **more}
    return Functional(lambda rngs: Ranker(num_rows=ROWS, interaction=interaction, rngs=rngs, **told))


def drawn(model: Functional) -> Params:
    """Parameters none of which is zero, as after training."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.float32(np.abs(draw.normal(size=s.shape)) * 0.3 + 0.05), shapes)


def values(count: int, seed: int) -> dict[str, np.ndarray]:
    draw, found = np.random.default_rng(seed), {}
    for field in FIELDS:
        shape = (count, field.width) if field.width else (count,)
        rows = draw.integers(field.offset, field.offset + max(field.rows, 1), shape).astype(np.int32)
        found[field.name] = rows if field.rows else draw.normal(size=shape).astype(np.float32)
    found["liked"][::2, 2:] = 0
    found["words"][1::2, 1:] = 0
    return found


def asked(of_context: tuple[str, ...], owner: np.ndarray = OWNER, contexts: int = CONTEXTS) -> tuple[Any, Any]:
    """The same candidates twice: with the fields of their contexts, and sharing them."""
    once, each = values(contexts, 1), values(len(owner), 2)
    domain = {"domain": jnp.asarray(np.arange(len(owner)) % 3, jnp.int32)}
    plain = {f"field/{n}": jnp.asarray(once[n][owner] if n in of_context else each[n]) for n in each}
    shared = {f"field/{n}": jnp.asarray(x) for n, x in each.items() if n not in of_context}
    shared |= {f"context/{n}": jnp.asarray(once[n]) for n in of_context}
    return plain | domain, shared | {"owner": jnp.asarray(owner)} | domain


def same(model: Functional, params: Params, plain: Any, shared: Any) -> None:
    want, got = (model.apply(params, batch, train=False, key=None)["logit/click"] for batch in (plain, shared))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * float(np.abs(want).max()))


@pytest.mark.parametrize("name", INTERACTIONS)
def test_candidates_that_share_a_context_score_as_rows_do(name: str) -> None:
    model = ranker(INTERACTIONS[name])
    same(model, drawn(model), *asked(OF_CONTEXT))


@pytest.mark.parametrize(
    "of_context",
    [(), ("user",), ("liked",), ("item",), ("title", "price"), tuple(f.name for f in FIELDS)],
    ids=lambda names: " ".join(names) or "nothing",
)
def test_whatever_is_shared(of_context: tuple[str, ...]) -> None:
    """A history whose candidate is shared, numbers and vectors, no field of a candidate's own at all."""
    for inputs in (INPUTS, FieldConfig(width=WIDTH, numeric="vector")):
        model = ranker(FactorizationMachine(deep=DEEP), inputs=inputs)
        same(model, drawn(model), *asked(of_context))


@pytest.mark.parametrize("of_context", [("liked", "done"), ("liked",), ("done",), (), ("user", "item")], ids=" ".join)
@pytest.mark.parametrize("attention", [None, TargetAttention(unit=UNIT), TargetEncoder(encoder=HSTU)], ids=repr)
def test_what_was_done_with_the_items_of_a_history_may_be_shared(attention: Any, of_context: tuple[str, ...]) -> None:
    inputs = FieldConfig(width=WIDTH, attention=attention, beside={"liked": "done"})
    done = FieldShape(name="done", kind="sequence", width=5, rows=5, offset=122)
    model = ranker(Flat(deep=DEEP), inputs=inputs, fields=(*FIELDS, done))
    draw, (plain, shared) = np.random.default_rng(5), asked(tuple(n for n in of_context if n != "done"))
    once, each = (draw.integers(122, 127, (n, 5)).astype(np.int32) for n in (CONTEXTS, len(OWNER)))
    mine = "done" in of_context
    plain["field/done"] = jnp.asarray(once[OWNER] if mine else each)
    shared |= {"context/done": jnp.asarray(once)} if mine else {"field/done": jnp.asarray(each)}
    params = drawn(model)
    same(model, params, plain, shared)
    other = {**plain, "field/done": plain["field/done"].at[:, 0].set(122)}
    want, found = (model.apply(params, batch, train=False, key=None)["logit/click"] for batch in (plain, other))
    assert float(jnp.abs(want - found).max()) > 1e-3


@pytest.mark.parametrize("of_context", [OF_CONTEXT, ("user", "liked"), ("words",), ()], ids=" ".join)
def test_a_gate_may_be_shared_and_what_it_scales(of_context: tuple[str, ...]) -> None:
    inputs = FieldConfig(width=WIDTH, gate=IntentGate(by="words", of=("user", "liked")))
    model = ranker(Flat(deep=DEEP), inputs=inputs)
    same(model, drawn(model), *asked(of_context))


@pytest.mark.parametrize("beside", [{"liked": "words"}, {"liked": "nothing"}, {"age": "liked"}, {"liked": "liked"}])
def test_what_cannot_stand_beside_a_list_is_refused(beside: dict[str, str]) -> None:
    """Lists of other lengths, and what is no list."""
    with pytest.raises(ConfigError, match="cannot stand beside"):
        drawn(ranker(Flat(), inputs=FieldConfig(width=WIDTH, beside=beside)))


@pytest.mark.parametrize("mixed", [False, True])
def test_adapters_of_domains_read_the_whole_row(mixed: bool) -> None:
    model = ranker(INTERACTIONS["dcn"], adapters=DomainAdapters(domains=2, rank=2, mixed=mixed))
    same(model, drawn(model), *asked(OF_CONTEXT))


def test_what_a_context_has_is_computed_once() -> None:
    """Of 64 candidates of one request; XLA counts the products."""
    inputs = FieldConfig(width=WIDTH, attention=TargetAttention(unit=TowerConfig(widths=(32,))))
    model = ranker(Flat(deep=TowerConfig(widths=(64,))), inputs=inputs)
    batches = asked(OF_CONTEXT, owner=np.zeros(64, np.int32), contexts=1)

    def flops(batch: Any) -> float:
        told: Any = jax.jit(lambda p, b: model.apply(p, b, train=False, key=None)).lower(drawn(model), batch).compile()
        found = told.cost_analysis()
        return (found[0] if isinstance(found, list) else found)["flops"]

    plain, shared = map(flops, batches)
    assert shared < 0.6 * plain
