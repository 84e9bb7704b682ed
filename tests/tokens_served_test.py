"""Models of tokens: evaluated, inferred and exported are the same, for histories, queries, filters and seen items."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest

from recjax.core.artifact import read_artifact
from recjax.core.errors import UnservableError
from recjax.core.module import Functional, with_facts
from recjax.data.examples import Examples, write_examples
from recjax.data.pipeline import eval_batches
from recjax.data.sampled import HeldExamples
from recjax.data.sources import DataDir
from recjax.data.spelling import Prompts
from recjax.data.text import TextConfig
from recjax.data.tokens import AtomicIds, Tokens, text_size_of
from recjax.data.vocab import FIRST_ITEM, OOV
from recjax.evaluation import Evaluation, Evaluator
from recjax.export import export_bundle, facets_of, sample
from recjax.infer import infer
from recjax.models.seq2seq import EncoderDecoder
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.recommend import make_recommend
from recjax.retrieve import Spelled, spelled
from recjax.serve.bundle import Bundle
from recjax.serve.features import Encoded, pad
from recjax.tasks.next_item import NextItem
from recjax.tasks.search import Search
from recjax.tasks.work import Work, columns_of, examples_of

USERS, ITEMS, QUERIES, LENGTH, WORDS, BEAMS = 23, 60, 30, 4, 6, 20
COLOURS, THINGS = ("red", "blue", "green", "grey"), ("chair", "table", "lamp", "shelf", "clock")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Examples, Examples]:
    """Recommendation and search over one catalogue; the items table lacks some items, which are unknown."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    events = [(f"u{user}", int(item), at) for user in range(USERS) for at, item in enumerate(rng.integers(0, 80, 9))]
    schema = ["user_id", "item_id", "timestamp"]
    pl.DataFrame(events, schema=schema, orient="row").write_parquet(folder / "interactions.parquet")
    titles = [f"{COLOURS[i % 4]} {THINGS[i % 5]}" for i in range(ITEMS)]
    domains = [None if i % 7 == 0 else COLOURS[i % 4] for i in range(ITEMS)]
    items = pl.DataFrame({"item_id": range(ITEMS), "title": titles, "domain": domains})
    items.write_parquet(folder / "items.parquet")
    texts = [" ".join(rng.choice([*COLOURS, *THINGS], 1 + i % 9)) + f" {i}" for i in range(QUERIES)]
    pl.DataFrame({"query_id": range(QUERIES), "text": texts}).write_parquet(folder / "queries.parquet")
    judged = {"query_id": rng.integers(0, QUERIES, 200), "item_id": rng.integers(0, ITEMS, 200), "label": 1}
    pl.DataFrame(judged).unique(["query_id", "item_id"], maintain_order=True).write_parquet(
        folder / "relevance.parquet"
    )
    log = NextItem(data=DataDir(path=str(folder)), catalogue="items")
    search = Search(log=log, text=TextConfig(size=60), prompt="find ")
    return prepared(log.work(), folder / "log"), prepared(search.work(), folder / "search")


def prepared(work: Work, path: Path) -> Examples:
    facts = {"task": work.name, "content_hash": "0", **work.facts}
    text = {"text": work.text} if work.text else {}
    with write_examples(path, vocab=work.vocab, items=work.items, users=work.users, facts=facts, **text) as writer:
        for split, schema in work.schemas.items():
            writer.add(split, schema, columns_of(list(examples_of(work, split)), schema))
    return Examples.open(path)


@dataclass(frozen=True)
class System:
    """A model of random weights, and how it is asked."""

    tasks: tuple[Examples, Examples]
    model: Functional
    params: Any
    prompts: Prompts
    catalogue: Spelled | None

    @property
    def asked(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "catalogue": self.catalogue, "history_length": LENGTH}


def codes_of(tasks: tuple[Examples, Examples], sizes: tuple[int, ...]) -> Tokens:
    vocab, rng = tasks[0].vocab, np.random.default_rng(1)
    codes = np.stack(np.unravel_index(rng.permutation(np.prod(sizes))[: vocab.num_items], sizes), axis=1)
    spelling = np.zeros((vocab.num_rows, len(sizes)), np.int32)
    spelling[OOV] = OOV
    spelling[FIRST_ITEM : FIRST_ITEM + vocab.num_items] = codes + FIRST_ITEM + np.cumsum([0, *sizes[:-1]])
    return Tokens(spelling, sizes, text_size_of(tasks))


@pytest.fixture(scope="module", params=[1, 3], ids=["item ids", "codes"])
def system(request: pytest.FixtureRequest, tasks: tuple[Examples, Examples]) -> System:
    tokens = AtomicIds().make(tasks) if request.param == 1 else codes_of(tasks, (4, 6, 5))
    config = TransformerConfig(num_layers=1, width=16, num_heads=2)
    slots = LENGTH * tokens.levels + tokens.levels
    make = partial(Sequence, num_rows=tokens.num_rows, encoder=config, max_length=max(slots, WORDS))
    model, rng = Functional(lambda rngs: make(rngs=rngs)), np.random.default_rng(2)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda s: 0.7 * rng.normal(size=s.shape).astype(s.dtype), shapes)
    catalogue, facts = spelled(tokens, beams=BEAMS) if tokens.levels > 1 else (None, {})
    return System(tasks, model, with_facts(params, facts), Prompts(tokens, WORDS), catalogue)


@pytest.fixture(scope="module")
def bundle(system: System, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    log, search = system.tasks
    path = export_bundle(
        system.model,
        system.params,
        vocab=log.vocab,
        titles=log.titles(),
        out=tmp_path_factory.mktemp("export") / "bundle",
        text=search.text_vocab,
        text_prompt=search.manifest["prompt"],
        facets=facets_of(log),
        users=sample(log, 5),
        max_k=BEAMS,
        platforms=("cpu",),
        **system.asked,
    )
    return Bundle(path)


def inferred(system: System, task: int, out: Path, **options: Any) -> Any:
    options = {"kind": "recommendations", "k": BEAMS, "batch_size": 8, **options}
    infer(system.model, system.params, system.tasks[task], out=out, **system.asked, **options)
    return read_artifact(out)


@pytest.fixture(scope="module")
def recommended(system: System, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return inferred(system, 0, tmp_path_factory.mktemp("infer") / "recommendations")


def records(examples: Examples) -> dict[int, dict[str, np.ndarray]]:
    source = examples.source("test")
    return {int(e["user_index"]): e for e in (source[i] for i in range(len(source)))}


@pytest.mark.parametrize("task", [0, 1], ids=["recommend", "search"])
def test_inferred_ranks_are_those_of_evaluation(system: System, recommended: Any, task: int, tmp_path: Path) -> None:
    examples = system.tasks[task]
    config = Evaluation(k=(1, BEAMS), batch_size=8, baselines=())
    evaluator = Evaluator(examples, split="test", config=config, model=system.model, **system.asked)
    found = evaluator(system.params)
    lists = inferred(system, task, tmp_path / "out") if task else recommended
    rows = dict(zip(lists["user_index"].tolist(), lists["rows"].tolist(), strict=True))
    held, compared = records(examples), 0
    assert set(rows) == set(held)
    for user, rank in zip(sorted(held), found.rank.tolist(), strict=True):
        label, had = int(held[user]["label"]), held[user]["items" if task == 0 else "seen"].tolist()
        assert not set(rows[user]) & set(had) - {0}
        if label not in had:
            assert (rows[user].index(label) if label in rows[user] else BEAMS) == min(rank, BEAMS)
            compared += 1
    assert compared > 10


def ask(bundle: Bundle, asked: list[Encoded], **more: Any) -> tuple[np.ndarray, np.ndarray]:
    history = pad([a.history_ids for a in asked], count=len(asked), width=bundle.prompt_length)
    had = pad([a.seen_ids for a in asked], count=len(asked), width=16)
    return bundle.recommend(history, had, **more)


def test_the_bundle_answers_histories_as_infer_did(system: System, bundle: Bundle, recommended: Any) -> None:
    held = records(system.tasks[0])
    # An item that is not in the catalogue has no id here; the server gives any id it does not know the same row.
    users = recommended["user_index"].tolist()
    ids = [[i if i is not None else "?" for i in bundle.vocab.decode(held[u]["items"])] for u in users]
    scores, rows = ask(bundle, [bundle.encode(history) for history in ids])
    np.testing.assert_allclose(scores, recommended["scores"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rows, recommended["rows"])


def test_the_bundle_answers_queries_as_infer_did(system: System, bundle: Bundle, tmp_path: Path) -> None:
    search = system.tasks[1]
    lists, held = inferred(system, 1, tmp_path / "out", exclude_seen=False), records(search)
    asked = [bundle.encode_query(search.query_text(held[u]["text"])) for u in lists["user_index"].tolist()]
    scores, rows = ask(bundle, asked)
    np.testing.assert_allclose(scores, lists["scores"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rows, lists["rows"])
    assert max(len(held[u]["text"]) for u in held) > WORDS  # so some were cut


def test_prompts_of_the_server_are_those_of_evaluation(system: System, bundle: Bundle) -> None:
    for task, examples in enumerate(system.tasks):
        held = HeldExamples(examples.path, examples.manifest, None, 0)
        view = held.through("test", lambda columns: system.prompts.spell(columns, LENGTH))
        for batch in eval_batches(view, "test", batch_size=8, history_length=bundle.prompt_length):
            for i in np.flatnonzero(batch["row_weight"]):
                record = records(examples)[int(batch["user_index"][i])]
                if task == 0:
                    items = [i if i is not None else "?" for i in bundle.vocab.decode(record["items"])]
                    asked = bundle.encode(items)
                    assert asked.unknown == items.count("?")
                else:
                    asked = bundle.encode_query(examples.query_text(record["text"]))
                found = pad([asked.history_ids], count=1, width=bundle.prompt_length)[0]
                np.testing.assert_array_equal(found, batch["history_ids"][i])


def test_filters_leave_what_they_say_and_the_order_of_a_search_among_it(system: System, bundle: Bundle) -> None:
    vocab, domains = bundle.vocab, facets_of(system.tasks[0])["domain"]
    asked = [bundle.encode(vocab.decode(np.array(rows))) for rows in ([5, 9, 2], [30], [7] * 9)]
    asked += [bundle.encode_query("green lamp")]
    filters = [{"domain": ["red"]}, {"domain": ["grey", "blue"]}, {}, {"domain": ["green"]}]
    masks = [bundle.allowed(wanted) for wanted in filters]
    everything = np.ones(vocab.num_rows, bool)
    allowed = np.stack([everything if mask is None else mask for mask in masks])
    scores, rows = ask(bundle, asked, allowed=allowed)
    for i, wanted in enumerate(filters):
        mine = {r for r in range(FIRST_ITEM, FIRST_ITEM + vocab.num_items) if r not in asked[i].seen_ids}
        if wanted:
            mine = {r for r in mine if domains[r] in wanted["domain"]}
        named = rows[i][np.isfinite(scores[i])].tolist()
        assert set(named) <= mine and len(named) == len(set(named)) == min(len(mine), BEAMS)
    recommend = jax.jit(make_recommend(system.model, num_items=vocab.num_items, k=BEAMS, catalogue=system.catalogue))
    history = pad([a.history_ids for a in asked], count=4, width=bundle.prompt_length)
    seen = pad([a.seen_ids for a in asked], count=4, width=16)
    expected = recommend(system.params, history, seen, allowed=allowed)
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rows, expected.rows)


def test_an_encoder_with_a_decoder_is_exported_too(tasks: tuple[Examples, Examples], tmp_path: Path) -> None:
    """Which compares the answers of the bundle with the model's own, with and without a filter."""
    tokens = codes_of(tasks, (4, 6, 5))
    encoder = TransformerConfig(num_layers=1, width=16, num_heads=2, causal=False, position="none", relative="t5")
    decoder = dataclasses.replace(encoder, causal=True, cross=True)
    make = partial(EncoderDecoder, num_rows=tokens.num_rows, encoder=encoder, decoder=decoder)
    model = Functional(lambda rngs: make(rngs=rngs))
    catalogue, facts = spelled(tokens, beams=BEAMS)
    params = with_facts(jax.jit(model.init)(jax.random.key(0)), facts)
    told = {"vocab": tasks[0].vocab, "titles": tasks[0].titles(), "history_length": LENGTH, "platforms": ("cpu",)}
    asked = {"prompts": Prompts(tokens, WORDS), "catalogue": catalogue, "out": tmp_path / "bundle"}
    bundle = Bundle(export_bundle(model, params, **told, **asked))
    assert (bundle.max_k, bundle.prompt_length, bundle.searches) == (BEAMS, LENGTH * 3, False)


def test_vectors_are_given_where_there_are_any(system: System, tmp_path: Path) -> None:
    users = inferred(system, 1, tmp_path / "users", kind="user_vectors")
    assert users["vectors"].shape == (len(records(system.tasks[1])), 16)
    if system.catalogue is not None:
        for kind in ("item_vectors", "teacher_rankings"):
            with pytest.raises(UnservableError, match=f"no {kind}"):
                inferred(system, 0, tmp_path / kind, kind=kind)
        return
    lists = inferred(system, 1, tmp_path / "lists")
    items = inferred(system, 1, tmp_path / "items", kind="item_vectors")
    picked = items["vectors"][lists["rows"] - FIRST_ITEM]
    np.testing.assert_allclose(np.einsum("nd,nkd->nk", users["vectors"], picked), lists["scores"], rtol=1e-5, atol=1e-5)


def test_sample_users_are_histories_without_names(system: System, bundle: Bundle) -> None:
    held = [bundle.vocab.decode(r["items"]) for r in records(system.tasks[0]).values()]
    assert len(bundle.users) == 5
    for user in bundle.users:
        assert list(user) == ["history"]
        assert user["history"] in [[i for i in history if i is not None] for history in held]
