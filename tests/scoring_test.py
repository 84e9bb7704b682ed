"""Three layouts, one score: that of the candidate alone behind its prompt, whatever stands beside it."""

from __future__ import annotations

from functools import cache, partial

import jax
import numpy as np
import pytest

from recjax.core.errors import ConfigError, TrainingError
from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.data.ranked import LAYOUTS, ranked_batches
from recjax.data.ranking_records import RankingRecords
from recjax.data.record import Column
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.nn.moe import MoeConfig
from recjax.nn.rotary import RopeScaling
from recjax.scoring import Scorer, label_logits

YARN = RopeScaling(kind="yarn", factor=4.0, trained_length=8)
V, LABELS = 128, (40, 7, 99)
LLAMA = {"position": "rotary", "num_kv_heads": 2, "norm": "rms", "bias": False, "ffn": "swiglu", "tied_head": False}
CONFIGS = {
    "learned": {},
    "llama": LLAMA,
    "library": {**LLAMA, "kernel": "library", "tied_head": True},
    "mixtral": {**LLAMA, "moe": MoeConfig(num_experts=4, top_k=2)},
    "qwen, yarn": {**LLAMA, "qk_norm": True, "qkv_bias": True, "rope_scaling": YARN},
}


def make_model(name: str, max_length: int = 32) -> Functional:
    encoder = TransformerConfig(**{"num_layers": 2, "width": 16, "num_heads": 4, **CONFIGS[name]})
    return Functional(partial(Sequence, num_rows=V, encoder=encoder, max_length=max_length))


@cache
def model_of(name: str) -> tuple[Functional, dict]:
    model = make_model(name)
    return model, jax.tree.map(lambda x: 1.5 * x + 0.01, jax.jit(model.init)(jax.random.key(0)))


def column(values: list[np.ndarray]) -> Column:
    bounds = np.concatenate([[0], np.cumsum([len(v) for v in values])])
    return Column(np.concatenate([np.zeros(0, np.int32), *values]).astype(np.int32), bounds)


def make_records(prompts: list[np.ndarray], candidates: list[list[np.ndarray]]) -> RankingRecords:
    return RankingRecords.of(
        {
            "items": column(prompts),
            "suffixes": column([np.concatenate(own) for own in candidates]),
            "suffix_lengths": column([np.array([len(c) for c in own]) for own in candidates]),
            "labels": column([np.zeros(len(own)) for own in candidates]),
            "user_index": Column(np.arange(len(prompts))),
        }
    )


def draw(seed: int = 0, count: int = 4) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, V, n) for n in rng.integers(1, 9, count)]
    own = [[rng.integers(2, V, n) for n in rng.integers(1, 6, k)] for k in rng.permutation(count) + 1]
    return prompts, own


def one_by_one(model: Functional, params: dict, prompts, candidates) -> np.ndarray:
    """Each candidate in a row alone, through the whole head."""
    apply = jax.jit(partial(model.apply, train=False, key=None))
    found = []
    for prompt, own in zip(prompts, candidates, strict=True):
        for candidate in own:
            tokens = np.zeros((1, 16), np.int32)
            size = len(prompt) + len(candidate)
            tokens[0, :size] = np.concatenate([prompt, candidate])
            place = np.arange(16, dtype=np.int32)[None]
            out = apply(
                params, {"history_ids": tokens, "positions": place, "segment_ids": (place < size).astype(np.int32)}
            )
            found.append(np.asarray(out["hidden"])[0, size - 1] @ np.asarray(out["table"])[list(LABELS)].T)
    return np.stack(found)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.heavy) for n in CONFIGS if n != "llama")]
)
def test_three_layouts_equal_candidates_alone(name: str) -> None:
    model, params = model_of(name)
    prompts, candidates = draw()
    want = one_by_one(model, params, prompts, candidates)
    records = make_records(prompts, candidates)
    for layout in LAYOUTS:
        # several prompts in a batch and, of rows of text, in a row
        scores = Scorer(model, label_rows=LABELS, layout=layout, slots=400)(params, records)
        np.testing.assert_allclose(scores.logits, want, rtol=1e-5, atol=1e-5)
        assert scores.cost.candidates == len(want)


def test_tasks_with_other_label_words_share_what_is_compiled() -> None:
    model, params = model_of("llama")
    records = make_records(*draw(3))
    plain = Functional(model._make)
    traced = []
    plain.bind = lambda *args: traced.append(args) or model.bind(*args)  # type: ignore[method-assign]
    found = [Scorer(plain, label_rows=rows)(params, records).logits for rows in (LABELS, LABELS[::-1])]
    assert len(traced) == 2 + 1  # a look at the positions by either, and one trace
    np.testing.assert_array_equal(found[0], found[1][:, ::-1])


@pytest.mark.parametrize("layout", ["cached", *(pytest.param(n, marks=pytest.mark.heavy) for n in ("shared", "naive"))])
def test_scores_do_not_depend_on_company_order_or_padding(layout: str) -> None:
    model, params = model_of("llama")
    prompts, candidates = draw(1)
    scorer = partial(Scorer, model, label_rows=LABELS, layout=layout)
    want = scorer(slots=400)(params, make_records(prompts, candidates)).logits
    few = scorer(slots=1)(params, make_records(prompts, candidates)).logits  # one prompt, one candidate at a time
    np.testing.assert_allclose(few, want, rtol=1e-5, atol=1e-5)
    turned = [own[::-1] for own in candidates[::-1]]
    other = scorer(slots=400)(params, make_records(prompts[::-1], turned)).logits
    np.testing.assert_allclose(other[::-1], want, rtol=1e-5, atol=1e-5)


def test_the_same_on_a_mesh() -> None:
    model, params = model_of("llama")
    records = make_records(*draw(2))
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    with mesh.activate():
        placed = jax.tree.map(jax.device_put, params, mesh.shardings(model.axes))
    for layout in ("cached", "shared"):
        make = partial(Scorer, model, label_rows=LABELS, layout=layout, slots=400)
        want, got = make()(params, records), make(mesh=mesh)(placed, records)
        np.testing.assert_allclose(got.logits, want.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_more_of_the_head_is_read_than_its_labels(layout: str) -> None:
    """Nothing as long as the vocabulary is ever computed."""
    model = make_model("llama")
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = next(ranked_batches(make_records(*draw()), layout=layout, slots=400)).batch
    program = jax.make_jaxpr(partial(label_logits, model, label_rows=LABELS))(params, batch)

    def shapes(jaxpr) -> set[tuple[int, ...]]:
        found = {v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars}
        inner = [x for eqn in jaxpr.eqns for x in eqn.params.values()]
        return found.union(*(shapes(getattr(x, "jaxpr", x)) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns")))

    # tables are handed on as they are
    assert all(V not in shape for shape in shapes(program.jaxpr) - {(V, 16)})


def test_what_cannot_be_scored_says_so() -> None:
    model = make_model("learned", max_length=8)
    records = make_records([np.arange(2, 9)], [[np.array([3, 4])]])
    with pytest.raises(ConfigError, match="a prompt of 9 tokens"):
        Scorer(model, label_rows=LABELS)({}, records)
    with pytest.raises(ConfigError, match="no layout 'tiled'"):
        Scorer(model, label_rows=LABELS, layout="tiled")
    model, params = model_of("llama")
    broken = {**params, "head": params["head"].at[LABELS[1]].set(np.nan)}
    short = make_records([np.array([2])], [[np.array([3, 4]), np.array([5])]])
    with pytest.raises(TrainingError, match="2 of 2 candidates"):
        Scorer(model, label_rows=LABELS)(broken, short)
