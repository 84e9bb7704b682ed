"""A stack of plain layers against numpy, and its layout over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.module import Functional, Module, Rngs
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.nn.mlp import Mlp


class Model(Module):
    def __init__(self, widths: tuple[int, ...], *, rngs: Rngs) -> None:
        self.inside = Mlp(widths, rngs=rngs)

    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        return self.inside(batch["x"])


@pytest.mark.parametrize("widths", [(3, 2), (3, 8, 2), (3, 8, 4, 8, 6)])
def test_it_is_its_formula_on_any_mesh(widths: tuple[int, ...]) -> None:
    model, rng = Functional(lambda rngs: Model(widths, rngs=rngs)), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    x = rng.normal(size=(8, 3)).astype(np.float32)
    want = x
    for layer in range(len(widths) - 1):
        if layer:
            want = np.maximum(want, 0)
        want = want @ params["inside"][f"layer{layer}"] + params["inside"][f"layer{layer}_bias"]
    np.testing.assert_allclose(model.apply(params, {"x": jnp.asarray(x)}), want, rtol=1e-4, atol=1e-5)
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    with mesh.activate():
        placed = jax.device_put(params, mesh.shardings(model.axes))
        np.testing.assert_allclose(jax.jit(model.apply)(placed, mesh.put_batch({"x": x})), want, rtol=1e-4, atol=1e-5)
