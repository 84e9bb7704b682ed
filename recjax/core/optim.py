"""Optimisers as data: one frozen config becomes one optax transformation.

All arithmetic is optax's; this file says which parameters it applies to (groups and decay masks by path), in what
order, and adds an average of the weights that evaluation reads. (`core.switch` adds a change from one optimiser to
another.) Parameters are named by their path, joined by "/", as in "blocks/ffn/up"; patterns are regular expressions
that may match anywhere in it.

Weight decay is decoupled (Loshchilov & Hutter 2019) whatever the kind: every step takes
`learning rate * weight_decay * parameter` off, and Adam's L2 form is not offered.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from recjax.core import row_wise, schedules
from recjax.core.errors import ConfigError
from recjax.core.module import Params
from recjax.core.schedules import Schedule
from recjax.core.state import TrainState, by_path, from_paths

KINDS = ("adam", "adamw", "sgd", "adagrad", "rowwise_adagrad", "rowwise_adam")
# Norms, biases and embeddings, by the names that recjax.nn gives them.
NO_DECAY = (r"norm", r"bias$", r"(^|/)(table|head|position|mask)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """What is different for the parameters of one group; None takes the optimiser's own.

    `learning_rate_scale` multiplies the schedule; a `frozen` group is never updated, holds no optimiser state and
    does not count in the gradient norm. With `decay_since` above 0 a row of a row-wise group loses that share for every
    step since it was last updated, when it is (`core.row_wise`).
    """

    learning_rate_scale: float = 1.0
    frozen: bool = False
    weight_decay: float | None = None
    kind: str | None = None
    decay_since: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Adam, AdamW, SGD with momentum or AdaGrad (`KINDS`) with everything around it.

    `rowwise_adagrad` and `rowwise_adam` (`core.row_wise`) are for tables with a row per item, in a group of their own:
    a step reads and writes only the rows of its batch, at a cost that does not grow with the catalogue.
    `clip_norm` bounds the norm of the whole gradient. `no_decay` are the patterns of parameters that are not
    decayed. `groups` are (pattern, Group) pairs, of which the first that matches a path counts. `ema_decay` keeps
    average <- ema_decay * average + (1 - ema_decay) * parameters after every update, from the initial parameters
    on, for evaluation (`eval_params`). `initial_accumulator` is AdaGrad's: 0.1 where
    it is None, or 0 for the row-wise kind.
    """

    kind: str = "adamw"
    learning_rate: float = 1e-3
    schedule: Schedule = Schedule()
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    initial_accumulator: float | None = None
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = NO_DECAY
    clip_norm: float | None = None
    groups: tuple[tuple[str, Group], ...] = ()
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"Optimizer.{name} = {getattr(self, name)}", expected="0 or more")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"Optimizer.clip_norm = {self.clip_norm}", expected="above 0, or None")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            raise ConfigError(f"Optimizer.betas, momentum = {self.betas}, {self.momentum}", expected="in [0, 1)")
        for kind, decay in [
            (self.kind, self.weight_decay),
            *((g.kind or self.kind, _first(g.weight_decay, self.weight_decay)) for _, g in self.groups),
        ]:
            if kind not in KINDS:
                raise ConfigError(f"no optimiser {kind!r}", expected="one of " + ", ".join(KINDS))
            if kind == "adam" and decay:
                raise ConfigError(
                    f"the optimiser 'adam' has no weight decay, but weight_decay = {decay}",
                    mend="Optimizer.kind = 'adamw', or weight_decay = 0",
                )
        self._check_row_wise()
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay = {self.ema_decay}", expected="0 <= ema_decay < 1, or None")
        for pattern in (*self.no_decay, *(p for p, _ in self.groups)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r} is not a regular expression", where=str(error)) from error

    def _check_row_wise(self) -> None:
        if self.kind in row_wise.KINDS:
            raise ConfigError(
                f"Optimizer.kind = {self.kind!r} is for tables",
                mend=f"Optimizer.groups = (('(^|/)(table|head)$', Group(kind = {self.kind!r})),)",
            )
        groups = [group for _, group in self.groups if group.kind in row_wise.KINDS]
        if groups and self.ema_decay is not None:
            raise ConfigError(
                "an average of the weights moves every row in every step",
                where=f"Optimizer.ema_decay = {self.ema_decay} beside a row-wise group",
                mend="Optimizer.ema_decay = None",
            )
        if any(group.weight_decay for group in groups):
            raise ConfigError("weight decay moves every row in every step", where="weight_decay of a row-wise group")
        for _, group in self.groups:
            if group.decay_since < 0 or (group.decay_since and group.kind not in row_wise.KINDS):
                raise ConfigError(
                    f"Group.decay_since = {group.decay_since} of the kind {group.kind!r}",
                    expected="0 or more, with one of " + ", ".join(row_wise.KINDS),
                )

    def transform(self, params: Params, total_steps: int) -> optax.GradientTransformation:
        """`make` without the average; a subclass may be another rule over the same parameters."""
        return _chain(self, params, total_steps)


class AverageState(NamedTuple):
    """The state of the optimiser inside, and the average of the parameters."""

    inner: Any
    average: Any


def make(config: Optimizer, params: Params, total_steps: int) -> optax.GradientTransformation:
    """The optimiser for `params` (arrays or their shapes) over a run of `total_steps` updates.

    Raises `ConfigError` naming every group pattern that no parameter is left for.
    """
    transform = config.transform(params, total_steps)
    return transform if config.ema_decay is None else _averaged(transform, config.ema_decay)


def _chain(config: Optimizer, params: Params, total_steps: int) -> optax.GradientTransformation:
    labels = group_of(config, params)
    groups = {str(i): group for i, (_, group) in enumerate(config.groups)}
    frozen = from_paths(params, {p: label != "" and groups[label].frozen for p, label in labels.items()})
    chain = []
    if any(jax.tree.leaves(frozen)):
        chain.append(optax.masked(optax.set_to_zero(), frozen))
    if config.clip_norm is not None:
        chain.append(optax.clip_by_global_norm(config.clip_norm))
    inner: dict[Hashable, optax.GradientTransformation] = {"": _of_group(config, Group(), total_steps)}
    inner |= {label: _of_group(config, group, total_steps) for label, group in groups.items()}
    chain.append(optax.partition(inner, from_paths(params, labels)) if groups else inner[""])
    return optax.chain(*chain)


def group_of(config: Optimizer, params: Params) -> dict[str, str]:
    """The group of every parameter path, as the index of its pattern in `config.groups`; "" for the rest."""
    labels = dict.fromkeys(by_path(params), "")
    for path in labels:
        matches = (str(i) for i, (pattern, _) in enumerate(config.groups) if re.search(pattern, path))
        labels[path] = next(matches, "")
    idle = [pattern for i, (pattern, _) in enumerate(config.groups) if str(i) not in labels.values()]
    if idle:
        raise ConfigError(
            "no parameter is left for the group " + ", ".join(repr(p) for p in idle),
            where="Optimizer.groups",
            expected="a pattern that is the first to match one of: " + ", ".join(sorted(labels)),
        )
    return labels


def sparing(config: Optimizer, paths: Sequence[str]) -> Optimizer:
    """`config` with the parameters at `paths` frozen, whatever its groups say of them."""
    if not paths:
        return config
    pattern = f"^({'|'.join(map(re.escape, paths))})$"
    return dataclasses.replace(config, groups=((pattern, Group(frozen=True)), *config.groups))


def paths_of(config: Optimizer, params: Params) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The paths of the parameters that are updated row by row, and of those that are never updated."""
    groups = {path: config.groups[int(label)][1] for path, label in group_of(config, params).items() if label}
    by_rows = tuple(path for path, group in groups.items() if group.kind in row_wise.KINDS and not group.frozen)
    return by_rows, tuple(path for path, group in groups.items() if group.frozen)


def learning_rate(config: Optimizer, total_steps: int) -> optax.Schedule:
    """step -> learning rate outside any group, before a switch."""
    return schedules.make(config.schedule, config.learning_rate, total_steps)


def eval_params(state: TrainState) -> Params:
    """The parameters that evaluation and export read: the average where one is kept."""
    if not isinstance(state.opt_state, AverageState):
        return state.params
    return from_paths(state.params, by_path(state.params) | by_path(state.opt_state.average))


def with_params(state: TrainState, params: Params) -> TrainState:
    """A fresh state that starts from `params` instead, as after a warm start; so does the average."""
    opt_state = state.opt_state
    if isinstance(opt_state, AverageState):
        leaves = by_path(params)
        average = from_paths(opt_state.average, {p: jnp.copy(leaves[p]) for p in by_path(opt_state.average)})
        opt_state = opt_state._replace(average=average)
    return dataclasses.replace(state, params=params, opt_state=opt_state)


def _of_group(config: Optimizer, group: Group, total_steps: int) -> optax.GradientTransformation:
    if group.frozen:
        return optax.set_to_zero()
    kind, decay = group.kind or config.kind, _first(group.weight_decay, config.weight_decay)
    if kind in ("adam", "adamw"):
        chain = [optax.scale_by_adam(*config.betas, eps=config.eps)]
    elif kind == "sgd":
        chain = [optax.trace(decay=config.momentum)]
    elif kind == "adagrad":
        chain = [optax.scale_by_rss(_first(config.initial_accumulator, 0.1), eps=config.eps)]
    elif kind == "rowwise_adagrad":
        chain = [row_wise.adagrad(_first(config.initial_accumulator, 0.0), eps=config.eps)]
    else:
        chain = [row_wise.adam(*config.betas, eps=config.eps)]
    if decay and kind not in row_wise.KINDS:
        chain.append(optax.add_decayed_weights(decay, mask=lambda params: _decayed(config, params)))
    rate = learning_rate(config, total_steps)
    chain.append(optax.scale_by_learning_rate(lambda step: rate(step) * group.learning_rate_scale))
    if group.decay_since:
        chain.append(row_wise.decay_since(group.decay_since))
    return optax.chain(*chain)


def _decayed(config: Optimizer, params: Any) -> Any:
    pattern = re.compile("|".join(f"(?:{p})" for p in config.no_decay) or r"(?!)")
    return from_paths(params, {path: not pattern.search(path) for path in by_path(params)})


def _averaged(inner: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """`inner`, with an average of the parameters in its state; outermost, so that `eval_params` finds it."""

    def init(params: Any) -> AverageState:
        # A copy: a state whose average is the very buffer of its parameters cannot be donated.
        return AverageState(inner.init(params), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AverageState]:
        updates, inner_state = inner.update(updates, state.inner, params)
        average = optax.incremental_update(optax.apply_updates(params, updates), state.average, 1 - decay)
        return updates, AverageState(inner_state, average)

    return optax.GradientTransformation(init, update)


def _first(value: float | None, default: float) -> float:
    return default if value is None else value
