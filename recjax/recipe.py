"""A recipe: everything a run is made of, as one frozen object built from gin.

Every verb takes the same recipe and uses the part it needs, so training, evaluation and export can never disagree
about the model, the data or the protocol. `assemble` joins a recipe with prepared examples and devices.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from recjax.codes_evaluation import CodesEvaluation, CodesEvaluator
from recjax.core import optim, state
from recjax.core.adapters import ADAPTERS, Adapted, Adapters
from recjax.core.checkpoint import Checkpoints
from recjax.core.errors import ConfigError, ExamplesError, MeshError
from recjax.core.flags import did_you_mean
from recjax.core.flops import TokenFlops
from recjax.core.module import Functional, Module, Params, with_facts
from recjax.core.sharding import Mesh, MeshConfig, make_mesh
from recjax.core.state import TrainState
from recjax.core.step import TrainStep, make_train_step
from recjax.core.warm_start import Taken, WarmStart, paths_in, warm_start
from recjax.core.writer import MANIFEST
from recjax.data.catalogue import CatalogueBatches, CatalogueFeed
from recjax.data.examples import Examples
from recjax.data.field_tables import check_earlier
from recjax.data.fields import shapes_of, table_rows
from recjax.data.pipeline import BatchIterator, Feed, train_batches
from recjax.data.rows_feed import RowsBatches, RowsFeed
from recjax.data.spelling import Prompts
from recjax.data.tokens import Spelling
from recjax.evaluation import Evaluation, Evaluator
from recjax.label_evaluation import LabelEvaluation, LabelEvaluator
from recjax.losses.objective import Objective
from recjax.ranker_evaluation import RankerEvaluation, RankerEvaluator
from recjax.retrieve import Spelled, spelled
from recjax.tasks.mixtures import Mixture

_SEEDS = 2**31
_FIT = 0x666974  # what a draw is for

Facts = Callable[[Sequence[Examples]], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One system, ready to run.

    `model` is a module class taking `num_rows` and `rngs` (gin binds the rest); `accumulate` cuts each batch into
    that many micro-batches; `patience` ends training after so many evaluations on the validation split without a
    better `checkpoints.metric` (0: never); `eval_every` 0 means only at the end. `train_steps` 0 means no training:
    the fresh or warm-started model is saved and can be evaluated.

    `facts` compute, from the examples, arrays over the catalogue that the model reads from its batch as `item/<name>`
    [v, ...]: content vectors, popularity. They are made again for every run, are no parameters, and are never part of
    a checkpoint. `warm_start` is where the parameters of a fresh run come from; with `adapters` they are frozen and
    low-rank adapters are trained (`core.adapters`). `spelling` is how items and texts
    become tokens, the rows of the model's table; without it these are the rows of the items. Items of several tokens
    are found by a beam search, `beams` wide (0: as wide as the largest cut-off of the evaluation).
    """

    name: str
    mixture: Mixture
    feed: Feed | CatalogueFeed | RowsFeed
    model: Callable[..., Module]
    objectives: Sequence[Objective]
    facts: Sequence[Facts] = ()
    spelling: Spelling | None = None
    beams: int = 0
    warm_start: WarmStart | None = None
    adapters: Adapters | None = None
    optimizer: optim.Optimizer = optim.Optimizer()
    mesh: MeshConfig = MeshConfig()
    evaluation: Evaluation | CodesEvaluation | LabelEvaluation | RankerEvaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    seed: int = 0
    train_steps: int
    accumulate: int = 1
    log_every: int = 50
    eval_every: int = 0
    patience: int = 0

    def __post_init__(self) -> None:
        for field, least in (
            ("train_steps", 0),
            ("accumulate", 1),
            ("log_every", 1),
            ("eval_every", 0),
            ("patience", 0),
            ("beams", 0),
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{field} = {value!r} cannot be used", expected=f"a whole number, at least {least}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < _SEEDS:
            raise ConfigError(f"seed = {self.seed!r} cannot be used", expected=f"a whole number from 0 to {_SEEDS - 1}")
        metric, known = self.checkpoints.metric, self.evaluation.metrics
        if metric and metric not in known:
            raise ConfigError(
                f"evaluation has no metric {metric!r}",
                where="checkpoint.Checkpoints.metric",
                expected=", ".join(known),
                mend=did_you_mean(metric, known),
            )
        names = [o.name for o in self.objectives]
        if not names or len(set(names)) != len(names):
            raise ConfigError("objectives need different names", where=str(names), expected="at least one objective")
        if self.feed.batch_size % self.accumulate:
            raise ConfigError(f"BATCH_SIZE {self.feed.batch_size} is not divisible by accumulate {self.accumulate}")

    def best_metric(self) -> str:
        """What evaluations are compared by: the metric of the checkpoints, or the main one of the evaluation."""
        return self.checkpoints.metric or self.evaluation.main


class Assembly:
    """A recipe joined with its examples and a mesh: the model as a function, its step, its shardings."""

    def __init__(self, recipe: Recipe, examples: Sequence[Examples], devices: Sequence[Any] | None = None) -> None:
        """`examples` are those of all tasks that are `Mixture.evaluated`.

        Raises `ExamplesError` when the tasks do not share a vocabulary, `MeshError` when a batch cannot be split.
        """
        hashes = {e.vocab.hash for e in examples}
        if len(hashes) != 1:
            raise ExamplesError(
                "the tasks of a mixture must share one item vocabulary",
                where=", ".join(f"{e.manifest['task']}: {e.vocab.hash}" for e in examples),
                mend="prepare them from the same data directory",
            )
        self.recipe, self.vocab = recipe, examples[0].vocab
        self.evaluated, self.examples = list(examples), list(examples[: len(recipe.mixture.tasks)])
        self.mesh: Mesh = make_mesh(recipe.mesh, None if devices is None else list(devices))
        parts = self.mesh.size_of("batch") * recipe.accumulate
        if recipe.feed.batch_size % parts:
            raise MeshError(
                f"BATCH_SIZE {recipe.feed.batch_size} cannot be split into {parts} equal parts",
                where=f"MESH = {recipe.mesh.shape!r} with accumulate = {recipe.accumulate}",
                mend="take a batch size that is a multiple of the batch axes times accumulate",
            )
        self.tokens = recipe.spelling.make(examples) if recipe.spelling else None
        self.num_rows = self.tokens.num_rows if self.tokens else self.vocab.num_rows
        told: dict[str, Any] = {}
        fields = shapes_of(examples[0].manifest) if isinstance(recipe.feed, RowsFeed) else ()
        if fields:  # a ranker: its rows are those of fields
            self.num_rows, told = table_rows(fields), {"fields": fields}
        make = functools.partial(recipe.model, num_rows=self.num_rows, **told)
        model = Functional(lambda rngs: make(rngs=rngs))
        self.model = model if recipe.adapters is None else Adapted(model, recipe.adapters)
        self.facts = self._make_facts()
        self.catalogue = self._make_catalogue()
        self._check_positions()
        self._check_divisible()
        self._optimizer_config = optim.sparing(recipe.optimizer, self.model.untrained)
        self.optimizer = optim.make(self._optimizer_config, self._trained(), recipe.train_steps)

    def _check_divisible(self) -> None:
        """Raise `MeshError` for a parameter that cannot be cut evenly."""
        for path, leaf in state.by_path(self.abstract_params()).items():
            axes: Any = self.model.axes
            for part in path.split("/"):
                axes = axes[part]
            for size, name in zip(leaf.shape, axes, strict=True):
                parts = self.mesh.size_of(name)
                if size % parts:
                    raise MeshError(
                        f"{path} has {size} {name}, which cannot be split into {parts} equal parts",
                        where=f"MESH = {self.recipe.mesh.shape!r}, SHARDING = {self.recipe.mesh.preset!r}",
                        mend="take another mesh, or sizes of the model that the mesh divides",
                    )

    def _check_positions(self) -> None:
        """Positions beyond the learned ones would silently share the last of them."""
        model: Any = self.model.bind(self.abstract_params())
        feed = self.recipe.feed
        longest, needed = getattr(model, "max_length", None), feed.history_length
        if self.tokens is not None:
            needed = max(needed * self.tokens.levels, feed.text_length if self.tokens.text_size else 0)
        if longest is not None and longest < needed:
            raise ConfigError(
                f"the model has positions for {longest} {'tokens' if self.tokens else 'events'} and is fed {needed}",
                where="Feed.history_length",
                expected=f"at most {longest}",
                mend="raise the max_length of the model, or lower Feed.history_length",
            )

    def _make_facts(self) -> dict[str, Any]:
        """The arrays of the recipe's facts, laid out over the devices as the item tables are."""
        found: dict[str, Any] = {}
        for make in self.recipe.facts:
            for name, value in make(self.examples).items():
                if not name.startswith("item/") or name in found:
                    raise ValueError(f"a fact must have a name of its own that begins with item/, not {name!r}")
                by_row = value.ndim and value.shape[0] in (self.vocab.num_rows, self.num_rows)
                found[name] = self.mesh.put(value, ("items",) if by_row else ())
        return found

    def _make_catalogue(self) -> Spelled | None:
        """How items of several tokens are found; its arrays join the facts."""
        if self.tokens is None or self.tokens.levels == 1:
            return None
        beams = self.recipe.beams or max(self.recipe.evaluation.k)
        catalogue, arrays = spelled(self.tokens, beams=beams, temperature=self.temperature)
        self.facts |= {name: self.mesh.put(array) for name, array in arrays.items()}
        return catalogue

    @property
    def temperature(self) -> float:
        """What the training objective divides scores by."""
        return next((t for o in self.recipe.objectives if (t := getattr(o, "temperature", None))), 1.0)

    @property
    def prompts(self) -> Prompts | None:
        """How a model of tokens is asked."""
        return None if self.tokens is None else Prompts(self.tokens, self.recipe.feed.text_length)

    def with_facts(self, params: Params) -> Params:
        """Parameters as evaluation, inference and export take them: with what the model needs besides."""
        return with_facts(params, self.facts)

    @property
    def vocabulary_hash(self) -> str:
        """The hash of the vocabulary that the parameters are tied to; "" when none of them has a row for each item.

        A row for a piece of items counts as one. The rows of a ranker are those of its fields.
        """
        axes = jax.tree.leaves(self.model.axes, is_leaf=lambda x: isinstance(x, tuple))
        if not any("items" in names or "pieces" in names for names in axes):
            return ""
        if encoder := self.examples[0].manifest.get("encoder_hash"):
            return encoder
        return f"{self.vocab.hash}.{self.tokens.hash}" if self.tokens else self.vocab.hash

    def _trained(self) -> Params:
        """Shapes of the parameters that the optimiser knows."""
        return state.split(self.abstract_params(), self.model.held)[0]

    def abstract_params(self) -> Any:
        """Shapes and dtypes of the parameters; nothing is allocated."""
        return jax.eval_shape(self.model.init, jax.random.key(0))

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the whole state; nothing is allocated."""
        shapes = jax.eval_shape(self._init, jax.random.key(0))
        return state.abstract(shapes, state.shardings(self.mesh, shapes, self.model.axes))

    def init_state(self) -> TrainState:
        """A fresh state from the recipe's seed, fitted to the facts, each part made where it will live."""
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state())
        with self.mesh.activate():
            return jax.jit(self._init, out_shardings=shardings)(jax.random.key(self.recipe.seed), self.facts)

    def _init(self, key: jax.Array, facts: Mapping[str, jax.Array] | None = None) -> TrainState:
        params = self.model.init(key)
        if facts is not None:
            params = self.model.fit(params, facts, jax.random.fold_in(key, _FIT))
        return state.create(params, self.optimizer, self.model.held)

    def warm_started(self, fresh: TrainState, initial: WarmStart) -> tuple[TrainState, Taken]:
        """A fresh state with the parameters of a checkpoint, and which those are.

        A model with adapters takes up one that has them, or puts its fresh ones around the parameters of one without.
        Raises `ArtifactError` where the checkpoint is to be earlier than the training rows and is not.
        """
        model, params = self.model, fresh.params
        if initial.earlier:
            run = json.loads((initial.folder.parent / MANIFEST).read_text(encoding="utf-8"))
            check_earlier(run.get("trained_times"), self.examples[0], where=str(initial.folder))
        if not isinstance(model, Adapted) or any(path.startswith(f"{ADAPTERS}/") for path in paths_in(initial)):
            params, taken = warm_start(initial, params)
            return optim.with_params(fresh, params), taken
        places = jax.tree.map(lambda x: x.sharding, params)
        with self.mesh.activate():
            plain = jax.jit(model.plain, out_shardings=self.mesh.shardings(model.base.axes))(params)
            plain, taken = warm_start(initial, plain)
            params = jax.jit(model.adapt, out_shardings=places)(plain, params[ADAPTERS])
        return optim.with_params(fresh, params), taken

    def batches(
        self, *, process_index: int = 0, process_count: int = 1
    ) -> BatchIterator | CatalogueBatches | RowsBatches:
        """The training batches of a process."""
        if isinstance(self.recipe.feed, RowsFeed):
            place = {"process_index": process_index, "process_count": process_count}
            return RowsBatches(self.examples, self.recipe.feed, seed=self.recipe.seed, **place)
        if isinstance(self.recipe.feed, CatalogueFeed):
            place = {"process_index": process_index, "process_count": process_count}
            return CatalogueBatches(self.vocab, self.recipe.feed, seed=self.recipe.seed, **place)
        return train_batches(
            self.examples,
            self.recipe.mixture.resolved,
            self.recipe.feed,
            seed=self.recipe.seed,
            tokens=self.tokens,
            process_index=process_index,
            process_count=process_count,
        )

    def evaluator(self, split: str, task: int = 0) -> Evaluator | CodesEvaluator | LabelEvaluator | RankerEvaluator:
        """Ranks the users of a split of a task with any parameters of this model, or judges the codes of its items.

        Or scores the candidates of prompts by their label words, or rows by their fields.
        """
        config = self.recipe.evaluation
        if isinstance(config, RankerEvaluation):
            held = self.evaluated[task]
            return RankerEvaluator(held, split=split, config=config, model=self.model, mesh=self.mesh)
        if isinstance(config, CodesEvaluation):
            return CodesEvaluator(self.evaluated[task], config=config, model=self.model, mesh=self.mesh)
        if isinstance(config, LabelEvaluation):
            return LabelEvaluator(
                self.evaluated[task],
                split=split,
                config=config,
                model=self.model,
                row_length=self.recipe.feed.row_length,
                temperature=self.temperature,
                mesh=self.mesh,
            )
        return Evaluator(
            self.evaluated[task],
            split=split,
            config=config,
            model=self.model,
            prompts=self.prompts,
            catalogue=self.catalogue,
            history_length=self.recipe.feed.history_length,
            times=self.recipe.feed.times,
            temperature=self.temperature,
            mesh=self.mesh,
        )

    def flops_per_token(self) -> TokenFlops:
        """Training arithmetic of one target, as the model counts it."""
        base = self.model.base
        model: Any = base.bind(jax.eval_shape(base.init, jax.random.key(0)))
        feed = self.recipe.feed
        answers = {"answers": feed.answer_length} if isinstance(feed, Feed) and feed.answer == "decoder" else {}
        return model.token_flops(feed.row_length, **answers)

    def train_step(self) -> TrainStep:
        """The jitted train step; the state it is given is used up."""
        recipe = self.recipe
        row_wise, frozen = optim.paths_of(self._optimizer_config, self._trained())
        step = make_train_step(
            self.model,
            recipe.objectives,
            self.optimizer,
            seed=recipe.seed,
            accumulate=recipe.accumulate,
            row_wise=row_wise,
            frozen=frozen,
            held=self.model.held,
        )
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_state())
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

    def const(self) -> dict[str, Any]:
        """The facts about the examples that objectives may ask for (see `losses.objective`).

        The rows of texts, which come last and are never predicted, are left out where the table is not split by rows:
        no loss scores against them. On devices that are only described, the shapes.
        """
        count = np.stack([e.item_count for e in self.examples]).sum(axis=0, dtype=np.float32)
        valid, num_items = self.vocab.valid, self.vocab.num_items
        if self.tokens is not None:
            rows = self.num_rows if self.mesh.size_of("items") > 1 else self.tokens.text_start
            count, valid, num_items = self.tokens.counts(count)[:rows], self.tokens.valid[:rows], sum(self.tokens.sizes)
        trained = valid & (count > 0)
        const: dict[str, Any] = {
            "item_count": self.mesh.put(count, ("items",)),
            "item_valid": self.mesh.put(valid, ("items",)),
            "item_trained": self.mesh.put(trained, ("items",)),
            "num_items": self.mesh.put(np.asarray(num_items, np.int32)),
            **self.facts,
        }
        for objective in self.recipe.objectives:
            const |= self.mesh.run(objective.prepare, const)
        return const
