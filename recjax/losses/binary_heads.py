"""Losses of a ranker's named heads: clicks, ratings and other labels of rows.

A head `<h>` has its logit in `out.logit/<h>` and its label in `batch.label/<h>`, both [b]. A label that is not known
is below 0, or NaN: its row counts in the losses of other heads only. Every loss is summed over rows times their weight.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recjax.losses.objective import LossSum, Objective, Tree, find

Rows = Float[Array, " b"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadObjective(Objective):
    """Base of the losses of one `head`, whose label is called as the head unless `label` says otherwise.

    With `domains` only rows of these domains count: tasks of a mixture that have a head each, or traffic whose labels
    can be trusted.
    """

    name: str = "label"
    head: str = "label"
    label: str = ""
    domains: tuple[int, ...] = ()

    def labels(self, batch: Tree) -> Rows:
        """The labels, below 0 or NaN where there is none."""
        return find(f"batch.label/{self.label or self.head}", out={}, batch=batch, const={})

    def row_weight(self, batch: Tree) -> Rows:
        """How much each row counts."""
        return jnp.where(self.labels(batch) >= 0, self._own(batch), 0)

    def total_weight(self, batch: Tree) -> Float[Array, ""]:
        """What the loss is divided by."""
        return self.row_weight(batch).sum()

    def _own(self, batch: Tree) -> Rows:
        weight = find(self.weight, out={}, batch=batch, const={})
        if not self.domains:
            return weight
        return jnp.where(jnp.isin(batch["domain"], jnp.asarray(self.domains)), weight, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryHead(HeadObjective):
    """Binary cross-entropy of the logit and a label in [0, 1].

    Metric `calibration`: the sum of the predicted probabilities over that of the labels.
    """

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum over rows with a label."""
        weight, logit = self.row_weight(batch), find(f"out.logit/{self.head}", out=out, batch=batch, const=const)
        label = known(self.labels(batch))
        predicted = (weight * jax.lax.stop_gradient(jax.nn.sigmoid(logit))).sum()
        metrics = {"calibration": (predicted, (weight * label).sum())}
        return LossSum((weight * cross_entropy(logit, label)).sum(), weight.sum(), metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueHead(HeadObjective):
    """A number of 0 or more. `form` "log1p": squared error of the output to log(1 + label); "poisson": the output is
    the logarithm of a rate, and the loss its negative log-likelihood but for a constant."""

    name: str = "value"
    head: str = "value"
    form: Literal["log1p", "poisson"] = "log1p"

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum over rows with a label."""
        weight, value = self.row_weight(batch), find(f"out.logit/{self.head}", out=out, batch=batch, const=const)
        label = known(self.labels(batch))
        loss = jnp.exp(value) - label * value if self.form == "poisson" else jnp.square(value - jnp.log1p(label))
        return LossSum((weight * loss).sum(), weight.sum(), {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairwiseHead(HeadObjective):
    """-log sigmoid(z_i - z_j) over all pairs of rows of a batch with label_i > label_j and the same `group` (BPR,
    Rendle et al. 2009, arXiv 1205.2618). A pair counts with the weight of both rows multiplied.

    Holds [b, b] numbers: what it costs grows with the square of the batch. Pairs across micro-batches are not made.
    """

    name: str = "pairs"
    group: str = "batch.user_index"

    def pairs(self, batch: Tree) -> Float[Array, "b b"]:
        """The weight of every pair, the better row first."""
        weight, label = self.row_weight(batch), known(self.labels(batch))
        group = find(self.group, out={}, batch=batch, const={})
        better = (label[:, None] > label[None]) & (group[:, None] == group[None])
        return jnp.where(better, weight[:, None] * weight[None], 0)

    def total_weight(self, batch: Tree) -> Float[Array, ""]:
        """The weight of all pairs."""
        return self.pairs(batch).sum()

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum over pairs."""
        pairs, logit = self.pairs(batch), find(f"out.logit/{self.head}", out=out, batch=batch, const=const)
        return LossSum((pairs * jax.nn.softplus(logit[None] - logit[:, None])).sum(), pairs.sum(), {})


def cross_entropy(logit: Rows, target: Rows) -> Rows:
    """-(t log sigmoid(z) + (1 - t) log sigmoid(-z)), for any t in [0, 1] and any z."""
    return jax.nn.softplus(logit) - target * logit


def known(label: Rows) -> Rows:
    """Labels with 0 in the place of those that are not known; no weight of 0 would make a NaN harmless."""
    return jnp.where(label >= 0, label, 0)
