"""The FLOP formula against the multiply-adds of a model written out, and the table of peaks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core import flops


def matrix_flops(function, *args):
    """FLOPs of all matrix products in a traced function, two for a multiply-add."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contract, _), _ = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                total += 2 * np.prod(equation.outvars[0].aval.shape) * np.prod([left[i] for i in contract])
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", None)
                total += count(inner) if inner is not None else 0
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def test_the_formula_counts_the_products_of_a_transformer_forward_and_backward():
    n, length, d, rows = 3, 8, 16, 40
    shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "in": (d, 4 * d), "out": (4 * d, d)}
    blocks = {name: jnp.ones((n, *shape)) for name, shape in shapes.items()}
    params = {"blocks": blocks, "table": jnp.ones((rows, d))}

    def loss(params, x):
        for i in range(n):
            w = {name: value[i] for name, value in params["blocks"].items()}
            scores = jax.nn.softmax((x @ w["q"]) @ (x @ w["k"]).T)
            x = x + (scores @ (x @ w["v"])) @ w["o"]
            x = x + jax.nn.relu(x @ w["in"]) @ w["out"]
        return jax.nn.logsumexp(x @ params["table"].T, axis=-1).sum()

    counted = matrix_flops(jax.grad(loss, argnums=(0, 1)), params, jnp.ones((length, d)))
    size = sum(value.size for value in blocks.values())
    cost = flops.per_token(parameters=size, layers=n, length=length, width=d, rows=rows)
    assert size == 12 * n * d * d
    assert cost.total * length == counted
    assert cost.backbone == 6 * size + 12 * n * length * d and cost.total - cost.backbone == 6 * d * rows
    narrow = flops.per_token(parameters=size, layers=n, length=length, width=d, rows=rows, row_width=d // 2)
    assert (narrow.softmax, narrow.backbone) == (cost.softmax / 2, cost.backbone)
    halved = flops.per_token(parameters=size, layers=n, length=length, width=d, rows=rows, is_causal_halved=True)
    pairs = sum(i + 1 for i in range(length))
    assert halved.attention * length == 12 * n * d * pairs


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("cpu", None),
        ("TPU v4 lite", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(kind, expected):
    assert flops.peak(kind) == expected
    utilisation = flops.mfu(1e15, devices=4, device_kind=kind)
    assert utilisation == (None if expected is None else 1e15 / (4 * expected))


def test_on_a_cpu_there_is_no_utilisation_and_memory_is_that_of_the_process():
    assert flops.peak() is None and flops.mfu(1e9) is None
    before = flops.memory()
    held = np.ones(30_000_000)
    after = flops.memory()
    assert before.is_host and after.peak_bytes >= before.peak_bytes and after.peak_bytes > held.nbytes
