"""Whatever a ranker is made of can be exported for any number of rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.export
import numpy as np
import pytest

from recjax.core.module import Functional
from recjax.data.fields import FieldShape
from recjax.models.ranker import Head, Ranker
from recjax.nn.crossing import Cross
from recjax.nn.experts import Mmoe, Ple
from recjax.nn.factorization import Dot, FactorizationMachine
from recjax.nn.field_attention import FieldAttention
from recjax.nn.field_vectors import FieldConfig
from recjax.nn.final_mlp import FinalMlp
from recjax.nn.interaction import Flat
from recjax.nn.target_attention import TargetAttention
from recjax.nn.tower import ResidualConfig, TowerConfig

FIELDS = (
    FieldShape(name="user", kind="categorical", rows=30, offset=2),
    FieldShape(name="item", kind="categorical", rows=40, offset=32),
    FieldShape(name="liked", kind="sequence", width=3, rows=40, offset=32, of="item"),
    FieldShape(name="words", kind="multi_valued", width=4, rows=40, offset=72),
    FieldShape(name="age", kind="numeric"),
    FieldShape(name="content", kind="vector", width=5),
)
SMALL = TowerConfig(widths=(6, 4), norm="batch")
MADE: dict[str, dict[str, Any]] = {
    "flat": {"interaction": Flat(deep=ResidualConfig(blocks=1, width=8))},
    "cross": {"interaction": Cross(layers=2, deep=SMALL)},
    "low_rank": {"interaction": Cross(layers=2, rank=2, experts=2, deep=SMALL, structure="stacked")},
    "final_mlp": {"interaction": FinalMlp(first=SMALL, second=SMALL, gate=SMALL, first_context=("user",))},
    "factorization": {"interaction": FactorizationMachine()},
    "dot": {"interaction": Dot(bottom=TowerConfig(widths=(4,)))},
    "attention": {"interaction": FieldAttention()},
    "mmoe": {"interaction": Flat(), "experts": Mmoe(), "heads": (Head(name="a"), Head(name="b"))},
    "ple": {"interaction": Flat(), "experts": Ple(), "heads": (Head(name="a"), Head(name="b"))},
    "numbers": {"interaction": Flat(), "inputs": FieldConfig(width=4, numeric="vector", pooling="sum")},
}


@pytest.mark.parametrize("name", MADE)
def test_it_is_exported_for_any_number_of_rows(name: str) -> None:
    """No part of it asks how many rows there are: traced and lowered with a symbol for that."""
    given = {"heads": (Head(name="a"),), "inputs": FieldConfig(width=4, attention=TargetAttention()), **MADE[name]}
    model = Functional(lambda rngs: Ranker(num_rows=128, fields=FIELDS, rngs=rngs, **given))
    [rows] = jax.export.symbolic_shape("b")
    dtypes = {"numeric": np.float32, "vector": np.float32}
    fields = {
        f"field/{f.name}": jax.ShapeDtypeStruct((rows, f.width) if f.width else (rows,), dtypes.get(f.kind, np.int32))
        for f in FIELDS
    }

    def run(params: Any, fields: Any) -> Any:
        return model.apply(params, fields, train=False, key=None)["logit/a"]

    params = jax.eval_shape(model.init, jax.random.key(0))
    exported = jax.export.export(jax.jit(run))(params, fields)
    [out] = exported.out_avals
    assert str(out.shape) == "(b,)" and out.dtype == np.float32
