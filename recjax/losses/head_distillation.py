"""Heads that are taught: by another head of the same model, or by a teacher whose logits come with the batch.

`SelfDistillation` is the self-auxiliary distillation of Zhang et al. (RecSys 2024, doi 10.1145/3640457.3688041): a
second head learns a mixture of the label and of what the first head believes, and what it learns reaches the trunk
that both share. `TeacherDistillation` is the auxiliary distillation of Khani et al. (RecSys 2024, arXiv 2408.14678);
told to teach the head that is served it is direct distillation, which is what that paper warns of.

What teaches is never moved by what it teaches: no gradient goes through a soft label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from recjax.core.errors import ConfigError
from recjax.losses.binary_heads import HeadObjective, Rows, cross_entropy, known
from recjax.losses.objective import LossSum, Tree, find


class Told(NamedTuple):
    """What a selector may go by besides labels: the `step`, and a `gate` in (0, 1) for each row where there is one."""

    step: Array
    gate: Rows | None = None


Selector = Callable[[Rows, Rows, Told], Rows]


def largest(hard: Rows, soft: Rows, told: Told) -> Rows:
    """max(y, y'): a positive is trusted, a negative is as likely as the teacher thinks."""
    return jnp.maximum(hard, soft)


def soft_negatives(hard: Rows, soft: Rows, told: Told) -> Rows:
    """y + (1 - y) y', which for labels of 0 and 1 is max(y, y')."""
    return hard + (1 - hard) * soft


def only_hard(hard: Rows, soft: Rows, told: Told) -> Rows:
    """y: a second head and no distillation (the ablation OGL)."""
    return hard


def only_soft(hard: Rows, soft: Rows, told: Told) -> Rows:
    """y': no label (the ablation DTL)."""
    return soft


def soft_positives(hard: Rows, soft: Rows, told: Told) -> Rows:
    """y y': a negative is trusted, a positive is as likely as the teacher thinks."""
    return hard * soft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """r y + (1 - r) y' with r = `share`."""

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"Mix.share = {self.share}", expected="from 0 to 1")

    def __call__(self, hard: Rows, soft: Rows, told: Told) -> Rows:
        return self.share * hard + (1 - self.share) * soft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum:
    """y before step `start`, then ever more of what `then` selects, and that alone `steps` later."""

    start: int
    steps: int = 1
    then: str | Selector = "max"

    def __post_init__(self) -> None:
        if self.start < 0 or self.steps < 1:
            raise ConfigError(f"Curriculum: start {self.start}, steps {self.steps}", expected="at least 0 and 1")
        if isinstance(self.then, str):
            selector(self.then)

    def __call__(self, hard: Rows, soft: Rows, told: Told) -> Rows:
        share = jnp.clip((told.step - self.start) / self.steps, 0, 1)
        return hard + share * (selector(self.then)(hard, soft, told) - hard)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptor:
    """g y + (1 - g) y', the gate g being learned for each domain (`Head.gates`) by the loss that it makes."""

    def __call__(self, hard: Rows, soft: Rows, told: Told) -> Rows:
        if told.gate is None:
            raise ConfigError("an adaptor needs gates", mend="Head.gates = the number of domains, of the head taught")
        return told.gate * hard + (1 - told.gate) * soft


SELECTORS: dict[str, Selector] = {
    "max": largest,
    "soft_neg": soft_negatives,
    "hard": only_hard,
    "soft": only_soft,
    "inverse": soft_positives,
    "mix": Mix(),
    "curriculum": Curriculum(start=1000, steps=1000, then=largest),
    "adaptor": Adaptor(),
}


def selector(given: str | Selector) -> Selector:
    """A selector by its name, or itself; `ConfigError` for a name that is not there."""
    if not isinstance(given, str):
        return given
    if given not in SELECTORS:
        raise ConfigError(f"no selector {given!r}", expected=", ".join(SELECTORS))
    return SELECTORS[given]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadDistillation(HeadObjective):
    """Base: `student` names the head that is taught, `ramp_steps` over how many steps its loss grows from nothing."""

    student: str = "soft"
    ramp_steps: int = 0

    def ramped(self, loss: Rows, weight: Rows, const: Tree, **metrics: tuple[Array, Array]) -> LossSum:
        """The sum over rows, as much of it as counts at this step."""
        total = (weight * loss).sum()
        if self.ramp_steps:
            total = total * jnp.minimum(1, const["step"] / self.ramp_steps)
        return LossSum(total, weight.sum(), metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfDistillation(HeadDistillation):
    """Cross-entropy of the student and P(y, sigmoid(z)): y the label and z the logit of `head`, P the `selector`.

    With converged heads and "max" the student is at 1 - (1 - p)^2 where `head` is at p: in the order of p, and too
    high; it is not made to be served. Metric `calibration` is to the label.
    """

    name: str = "self_distillation"
    selector: str | Selector = "max"

    def __post_init__(self) -> None:
        selector(self.selector)

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum over rows with a label."""
        weight, label = self.row_weight(batch), known(self.labels(batch))
        student = find(f"out.logit/{self.student}", out=out, batch=batch, const=const)
        teacher = jax.lax.stop_gradient(
            jax.nn.sigmoid(find(f"out.logit/{self.head}", out=out, batch=batch, const=const))
        )
        told = Told(const["step"], out.get(f"gate/{self.student}"))
        target = selector(self.selector)(label, teacher, told)
        predicted = (weight * jax.lax.stop_gradient(jax.nn.sigmoid(student))).sum()
        calibration = predicted, (weight * label).sum()
        return self.ramped(cross_entropy(student, target), weight, const, calibration=calibration)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherDistillation(HeadDistillation):
    """What a teacher said of a row, `batch.teacher/<head>` [b], NaN where it said nothing.

    `form` "binary": cross-entropy of the student and sigmoid(t / `temperature`), t being a logit; "value": squared
    error to t, which is in the space of the student's output. Metrics `coverage`: the share of rows it spoke of;
    `version`: that of the teacher on average, where the batch tells it (`batch.teacher/version`).
    """

    name: str = "teacher_distillation"
    form: Literal["binary", "value"] = "binary"
    temperature: float = 1.0

    def row_weight(self, batch: Tree) -> Rows:
        """How much each row counts; its label does not matter."""
        return jnp.where(jnp.isnan(self._teacher(batch)), 0, self._own(batch))

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum over rows that the teacher spoke of."""
        weight = self.row_weight(batch)
        said = jnp.nan_to_num(self._teacher(batch))
        student = find(f"out.logit/{self.student}", out=out, batch=batch, const=const)
        if self.form == "binary":
            loss = cross_entropy(student, jax.nn.sigmoid(said / self.temperature))
        else:
            loss = jnp.square(student - said)
        told = {"coverage": (weight.sum(), self._own(batch).sum())}
        if "teacher/version" in batch:
            told["version"] = (weight * jnp.nan_to_num(batch["teacher/version"])).sum(), weight.sum()
        return self.ramped(loss, weight, const, **told)

    def _teacher(self, batch: Tree) -> Rows:
        return find(f"batch.teacher/{self.head}", out={}, batch=batch, const={})


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupCalibration(HeadObjective):
    """(sum of p_i over group g - C_g)^2 / C_g, summed over the groups of a batch: labels known only as totals.

    `group` int32 [b] numbers the groups, of which there are `groups`; `batch.label/<label>` is a row's share of the
    total of its group, C_g over the number of its rows, so that the labels of a batch add up to what is expected of
    it. A group expected to have nothing counts nothing. The loss is divided by the weight of the rows.
    """

    name: str = "group_calibration"
    group: str = "batch.domain"
    groups: int = 1

    def __call__(self, out: Tree, batch: Tree, const: Tree, key: jax.Array) -> LossSum:
        """Sum over groups."""
        weight, group = self.row_weight(batch), find(self.group, out=out, batch=batch, const=const)
        p = jax.nn.sigmoid(find(f"out.logit/{self.head}", out=out, batch=batch, const=const))
        said, wanted = (
            jax.ops.segment_sum(weight * x, group, num_segments=self.groups) for x in (p, known(self.labels(batch)))
        )
        loss = jnp.where(wanted > 0, jnp.square(said - wanted) / jnp.where(wanted > 0, wanted, 1), 0)
        return LossSum(loss.sum(), weight.sum(), {})
