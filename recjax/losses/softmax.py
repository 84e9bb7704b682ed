"""Cross-entropy over the whole catalogue at every position, without ever holding [batch, length, items].

`CatalogueSoftmax` is the objective, `catalogue_softmax` the function. The work is cut in one of two ways, chosen by
size: by positions (`softmax_by_positions`), where the gradients are made together with the value and padded
positions cost nothing, or by items (`softmax_by_items`), whose memory does not grow with the catalogue. Over a mesh
the table stays split by rows; only hidden vectors and per-position sums travel. Sampled losses live in
`recjax.losses.sampled`.
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recjax.core.rows import Split
from recjax.core.sharding import active, platform
from recjax.losses import softmax_by_items, softmax_by_positions
from recjax.losses.objective import LossSum, Objective, Tree, find

# Logits held at once, in elements: what fits the cache of a CPU core, and what keeps an accelerator busy.
CHUNK = {"positions": {"cpu": 2**19}, "items": {"cpu": 2**20}}
CHUNK_OTHERWISE = 2**27
# Up to this many rows on a device, chunks of positions are both fast and small.
MOST_ROWS_BY_POSITIONS = 2**17

Method = Literal["auto", "positions", "items"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CatalogueSoftmax(Objective):
    """-log softmax(hidden . table / temperature)[target] over the valid catalogue rows, summed with `weight`.

    `z_loss` adds that many times logsumexp^2 (PaLM, Chowdhery et al. 2022, section 5). The metric `nll` is the loss
    without it. `method` and `chunk` (logits held at once, in elements) override the choice by size.
    """

    hidden: str = "out.hidden"
    table: str = "out.table"
    targets: str = "batch.target_ids"
    valid: str = "const.item_valid"
    temperature: float = 1.0
    z_loss: float = 0.0
    method: Method = "auto"
    chunk: int | None = None
    reads_catalogue: ClassVar[bool] = True

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Draws nothing; `key` is not used."""
        get = functools.partial(find, out=out, batch=batch, const=const)
        hidden, table, weight = get(self.hidden), get(self.table), get(self.weight)
        total, nll = catalogue_softmax(
            hidden / self.temperature,
            table,
            get(self.targets),
            weight,
            get(self.valid),
            z_loss=self.z_loss,
            method=self.method,
            chunk=self.chunk,
        )
        weight_sum = weight.sum()
        return LossSum(total, weight_sum, {"nll": (nll, weight_sum)})


def catalogue_softmax(
    hidden: Float[Array, "b *l d"],
    table: Float[Array, "v d"],
    targets: Int[Array, "b *l"],
    weight: Float[Array, "b *l"],
    valid: Bool[Array, "w"],
    *,
    z_loss: float = 0.0,
    method: Method = "auto",
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of `logsumexp - target logit + z_loss * logsumexp^2`, and the same without the last term.

    Only the first result has a gradient, with respect to `hidden` and `table`. Matrix products are in the dtype of
    `hidden`, everything else is in float32. A position of weight 0 may have any target. `valid` may be shorter than a
    table that is not split by rows: the rows beyond it are not valid, and are not looked at.
    """
    mesh, table = active(), table[: valid.shape[0]]
    parts = 1 if mesh is None else mesh.size_of("items")
    if method == "auto":
        method = "positions" if table.shape[0] // parts <= MOST_ROWS_BY_POSITIONS else "items"
    elements = chunk or CHUNK[method].get(platform(), CHUNK_OTHERWISE)
    return _softmax(_Plan(method, elements, z_loss), hidden, table, targets, weight.astype(jnp.float32), valid)


@dataclasses.dataclass(frozen=True)
class _Plan:
    method: str
    elements: int
    z_loss: float


def _split() -> Split | None:
    mesh = active()
    return None if mesh is None or not (mesh.axes_of("items") or mesh.axes_of("batch")) else Split(mesh, True)


def _run(function: Any, arrays: tuple[jax.Array, ...], outputs: str) -> Any:
    """Call `function(split, hidden, table, targets, weight, valid, ...)`, as an island when there is a mesh.

    `outputs` has a letter per result: s for a sum over everything, h for batch-shaped, t for table-shaped.
    """
    split = _split()
    if split is None:
        return function(None, *arrays)
    b, t = split.index, split.table
    inputs = (b, t, b, b, t, b)[: len(arrays)]
    specs = {"s": jax.sharding.PartitionSpec(), "h": b, "t": t}
    return split.island(functools.partial(function, split), inputs, tuple(specs[o] for o in outputs))(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(plan: _Plan, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    part = softmax_by_positions if plan.method == "positions" else softmax_by_items
    return _run(functools.partial(part.value, plan.elements, plan.z_loss), arrays, "ss")


def _forward(plan: _Plan, *arrays: jax.Array) -> tuple[Any, Any]:
    if plan.method == "positions":
        run = functools.partial(softmax_by_positions.value_and_gradients, plan.elements, plan.z_loss)
        total, nll, d_hidden, d_table = _run(run, arrays, "ssht")
        return (total, nll), (d_hidden, d_table)
    run = functools.partial(softmax_by_items.value_and_hidden_gradient, plan.elements, plan.z_loss)
    total, nll, d_hidden, log_sum = _run(run, arrays, "sshh")
    return (total, nll), (d_hidden, log_sum, arrays)


def _backward(plan: _Plan, residuals: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    g = cotangents[0]
    if plan.method == "positions":
        d_hidden, d_table = residuals
        d_table = d_table * g
    else:
        d_hidden, log_sum, arrays = residuals
        hidden, table, targets, weight, valid = arrays
        run = functools.partial(softmax_by_items.table_gradient, plan.elements, plan.z_loss)
        (d_table,) = _run(run, (hidden, table, targets, weight * g, valid, log_sum), "t")
    return (d_hidden * g.astype(d_hidden.dtype), d_table, None, None, None)


_softmax.defvjp(_forward, _backward)
