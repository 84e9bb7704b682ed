"""Bundles exported once for all tests of this folder: a model of `hidden` and `table`, one of tokens, and a ranker."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.module import Functional, Module, param, with_facts
from recjax.data.counters import Counter, History
from recjax.data.examples import Examples
from recjax.data.fields import Bucketed, Categorical, Cross, MultiValued, Numeric, SequenceOf
from recjax.data.rated_world import RatedWorld
from recjax.data.rows_feed import RowsFeed
from recjax.data.sources import DataDir
from recjax.data.spelling import Prompts
from recjax.data.text import TextConfig
from recjax.data.tokens import Tokens
from recjax.data.vocab import FIRST_ITEM, OOV, ItemVocab
from recjax.export import export_bundle
from recjax.export_rank import export_ranker_run
from recjax.losses.binary_heads import BinaryHead
from recjax.models.ranker import Head, Ranker
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.nn.crossing import Cross as CrossNet
from recjax.nn.field_vectors import FieldConfig
from recjax.nn.target_attention import TargetAttention
from recjax.nn.tower import TowerConfig
from recjax.ranker_evaluation import RankerEvaluation
from recjax.recipe import Assembly, Recipe
from recjax.recommend import make_recommend
from recjax.retrieve import spelled
from recjax.tasks.cache import place_of
from recjax.tasks.impressions import Impressions
from recjax.tasks.mixtures import Mixture

LENGTH, WIDTH, MAX_K, ITEMS = 6, 8, 20, 150


class Decay(Module):
    """hidden[l] = mixed sum over earlier events of their vectors, halved at every step."""

    def __init__(self, *, num_rows, rngs):
        init = jax.nn.initializers.normal(1.0)
        self.table = param(rngs, (num_rows, WIDTH), ("items", "embed"), init)
        self.mix = param(rngs, (WIDTH, WIDTH), ("embed", None), init)

    def __call__(self, batch, *, train, key):
        vectors = jnp.where((batch["segment_ids"] > 0)[..., None], self.table[...][batch["history_ids"]], 0)

        def step(carry, x):
            carry = carry / 2 + x
            return carry, carry

        start = jnp.zeros_like(vectors[:, 0])
        hidden = jnp.swapaxes(jax.lax.scan(step, start, jnp.swapaxes(vectors, 0, 1))[1], 0, 1)
        return {"hidden": hidden @ self.mix[...], "table": self.table[...]}


@dataclasses.dataclass
class Exported:
    path: Any
    model: Functional
    params: Any
    vocab: ItemVocab

    def oracle(self, history, seen=()):
        """Scores of all rows in numpy, -inf where a row may not be recommended."""
        table, mix = (np.asarray(self.params[n], np.float64) for n in ("table", "mix"))
        hidden = np.zeros(WIDTH)
        for row in history:
            hidden = hidden / 2 + table[row]
        scores = table @ (hidden @ mix)
        allowed = np.zeros(len(table), bool)
        allowed[FIRST_ITEM : FIRST_ITEM + ITEMS] = True
        allowed[list(seen)] = False
        return np.where(allowed, scores, -np.inf)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    vocab = ItemVocab(tuple(str(1000 + 7 * i) for i in range(ITEMS)), "int")
    model = Functional(lambda rngs: Decay(num_rows=vocab.num_rows, rngs=rngs))
    params = model.init(jax.random.key(1))
    titles = [None] * vocab.num_rows
    titles[FIRST_ITEM : FIRST_ITEM + ITEMS] = [f"Title №{i}" if i % 3 else None for i in range(ITEMS)]
    path = export_bundle(
        model,
        params,
        vocab=vocab,
        titles=titles,
        out=tmp_path_factory.mktemp("bundles") / "decay",
        history_length=LENGTH,
        max_k=MAX_K,
        name="decay",
        recipe="tests/decay",
        step=12,
    )
    return Exported(path, model, params, vocab)


COLOURS, THINGS = ("red", "blue", "green", "grey"), ("chair", "table", "lamp", "shelf", "clock")
PROMPT_LENGTH = 12


@dataclasses.dataclass
class Searcher:
    """A bundle of a small model that names items in three tokens and answers queries as well."""

    path: Any
    vocab: ItemVocab
    titles: list[str | None]
    domains: list[str | None]
    answer: Any  # (history_ids, seen_ids, allowed) -> scores and rows of the model itself


@pytest.fixture(scope="session")
def searcher(tmp_path_factory):
    vocab = ItemVocab(tuple(f"item{i}" for i in range(60)))
    spelling = np.zeros((vocab.num_rows, 3), np.int32)
    spelling[OOV] = OOV
    codes = np.stack(np.unravel_index(np.random.default_rng(0).permutation(120)[:60], (4, 6, 5)), axis=1)
    spelling[FIRST_ITEM : FIRST_ITEM + 60] = codes + FIRST_ITEM + np.array([0, 4, 10])
    titles: list[str | None] = [None] * vocab.num_rows
    titles[FIRST_ITEM : FIRST_ITEM + 60] = [f"{COLOURS[i % 4]} {THINGS[i % 5]} <{i}>" for i in range(60)]
    domains = [None if title is None else title.split()[0] for title in titles]
    text = TextConfig(size=60).make([title for title in titles if title])
    tokens = Tokens(spelling, (4, 6, 5), text.size)
    encoder = TransformerConfig(num_layers=1, width=16, num_heads=2)
    make = partial(Sequence, num_rows=tokens.num_rows, encoder=encoder, max_length=PROMPT_LENGTH + 3)
    model, rng = Functional(lambda rngs: make(rngs=rngs)), np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda s: 0.7 * rng.normal(size=s.shape).astype(s.dtype), shapes)
    catalogue, facts = spelled(tokens, beams=MAX_K)
    params = with_facts(params, facts)
    path = export_bundle(
        model,
        params,
        vocab=vocab,
        titles=titles,
        out=tmp_path_factory.mktemp("bundles") / "searcher",
        history_length=PROMPT_LENGTH // 3,
        prompts=Prompts(tokens, PROMPT_LENGTH),
        catalogue=catalogue,
        text=text,
        text_prompt="find ",
        facets={"domain": domains},
        users=[{"history": ["item3", "item8"]}, {"history": [f"item{i}" for i in range(30)]}],
        max_k=MAX_K,
        name="searcher",
        platforms=("cpu",),
    )
    answer = jax.jit(make_recommend(model, num_items=60, k=MAX_K, catalogue=catalogue))
    return Searcher(path, vocab, titles, domains, lambda h, s, a: answer(params, h, s, allowed=a))


@dataclasses.dataclass
class Ranked:
    """A bundle of an untrained ranker of a simulated log, and what it was made of."""

    assembly: Assembly
    params: Any
    path: Any


@pytest.fixture(scope="session")
def export_ranks(prepare_here):
    """(out, more settings of the model) -> `Ranked`."""
    task = Impressions(
        data=DataDir(simulate=RatedWorld(rows=1500, users=40, items=30)),
        fields=(
            Categorical(columns=("user_id", "item_id", "device", "genre")),
            MultiValued(columns=("genres",)),
            Numeric(columns=("price", "age")),
            Bucketed(columns=("hour",)),
            Cross(columns=("device", "genre"), buckets=50),
            SequenceOf(columns=("history",), of="item_id", limit=4),
            Numeric(columns=("item_id.count", "item_id.click", "user_id_x_genre.2d.click"), log=True),
        ),
        labels={"click": "click", "like": "rating >= 4"},
        counters=(Counter(columns="item_id"), Counter(columns=("user_id", "genre"), days=2)),
        histories=(History(limit=4, head="click"),),
        domain="domain",
    )
    prepare_here(task)

    def model(**told):
        given = {
            "interaction": CrossNet(layers=2, deep=TowerConfig(widths=(16, 8), norm="batch")),
            "inputs": FieldConfig(width=4, attention=TargetAttention()),
            "heads": (Head(name="click"), Head(name="like", tower=TowerConfig(widths=(4,)))),
            "table_scale": 0.7,
        }
        return Ranker(**{**given, **told})

    def export(out, *, onnx=False, **more):
        recipe = Recipe(
            name="tiny",
            mixture=Mixture(tasks=[task]),
            feed=RowsFeed(batch_size=64),
            model=partial(model, **more),
            objectives=[BinaryHead(name="click", head="click")],
            evaluation=RankerEvaluation(bootstrap_samples=10),
            train_steps=1,
        )
        assembly = Assembly(recipe, [Examples.open(place_of(task).path)])
        params = assembly.init_state().params
        path = export_ranker_run(assembly, params, out, name="ranks", step=7, platforms=("cpu",), onnx=onnx)
        return Ranked(assembly, params, path)

    return export


@pytest.fixture(scope="session")
def ranked(export_ranks, tmp_path_factory):
    return export_ranks(tmp_path_factory.mktemp("rank") / "bundle")
