"""Writes what a release leaves behind for the tests of later ones: small bundles of all kinds with their answers.

    python tests/serve/write_release.py

adds what is missing to `tests/serve/releases/<version>/`, to be committed when a version is released and never to be
changed again: `release_test.py` asks every bundle there the same questions. Items, people and weights are made up.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import recjax
from recjax.core.module import Functional, with_facts
from recjax.data.field_encoder import FieldEncoder
from recjax.data.fields import Bucketed, Categorical, MultiValued, Numeric
from recjax.data.ranker_features import RankerFeatures
from recjax.data.raw import Raw
from recjax.data.spelling import Prompts
from recjax.data.tokens import Tokens
from recjax.data.vocab import FIRST_ITEM, OOV, ItemVocab, rows_for
from recjax.export import export_bundle
from recjax.export_rank import export_ranker
from recjax.export_score import export_scores
from recjax.models.ranker import Head, Ranker
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.nn.crossing import Cross
from recjax.nn.field_vectors import FieldConfig
from recjax.nn.tower import TowerConfig
from recjax.prompts.chat import FORMATS, Chat, Memo
from recjax.prompts.labels import label_tokens
from recjax.prompts.library import LIKE
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.prompts.writer import Budget, PromptWriter
from recjax.retrieve import spelled
from recjax.serve.bundle import Bundle
from recjax.serve.features import pad
from recjax.serve.kinds import load_bundle
from recjax.serve.rank_bundle import RankBundle
from recjax.serve.rank_request import RankQuestion
from recjax.serve.score_bundle import ScoreBundle, ScoreTask
from recjax.serve.score_request import ScoreQuestion

RELEASES = Path(__file__).with_name("releases")
ANSWERS = "answers.json"
ITEMS, LENGTH, MAX_K = 40, 5, 8
LEVELS = (8, 7)  # codes of each level
COLOURS = ("red", "blue", "green")
TOLD: dict[str, Any] = {"step": 3, "platforms": ("cpu",)}


def drawn(model: Functional, seed: int) -> dict:
    """Weights for a model."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda s: 0.7 * rng.normal(size=s.shape).astype(s.dtype), shapes)


def sequence_of(num_rows: int, length: int, **more: Any) -> Functional:
    """A small transformer."""
    encoder = TransformerConfig(num_layers=1, width=4, num_heads=1, **more)
    return Functional(partial(Sequence, num_rows=num_rows, encoder=encoder, max_length=length))


def write_items(out: Path) -> None:
    """A bundle that recommends, with filters and sample users."""
    told = catalogue()
    model = sequence_of(told["vocab"].num_rows, LENGTH)
    users = [{"history": ["item 3", "item 5"]}]
    export_bundle(model, drawn(model, 1), out=out, name="items", users=users, **told, **TOLD)


def write_codes(out: Path) -> None:
    """The same by semantic ids: an item is two tokens, and items are found by beams."""
    told = catalogue()
    spelling = np.zeros((told["vocab"].num_rows, len(LEVELS)), np.int32)
    spelling[OOV] = OOV
    codes = np.random.default_rng(0).permutation(int(np.prod(LEVELS)))[:ITEMS]
    spelling[FIRST_ITEM : FIRST_ITEM + ITEMS] = np.stack(np.unravel_index(codes, LEVELS), axis=1) + FIRST_ITEM
    spelling[FIRST_ITEM : FIRST_ITEM + ITEMS] += np.cumsum((0, *LEVELS[:-1]), dtype=np.int32)
    tokens, length = Tokens(spelling, LEVELS), LENGTH * len(LEVELS)
    model, (search, facts) = sequence_of(tokens.num_rows, length + len(LEVELS)), spelled(tokens, beams=MAX_K)
    more = {"prompts": Prompts(tokens, length), "catalogue": search}
    export_bundle(model, with_facts(drawn(model, 2), facts), out=out, name="codes", **told, **more, **TOLD)


def catalogue() -> dict[str, Any]:
    """What both say of the items."""
    vocab = ItemVocab(tuple(f"item {i}" for i in range(ITEMS)))
    rows = range(FIRST_ITEM, FIRST_ITEM + ITEMS)
    titles = [f"Title {row}" if row in rows else None for row in range(vocab.num_rows)]
    facets = {"kind": [COLOURS[row % 3] if row in rows else None for row in range(vocab.num_rows)]}
    return {"vocab": vocab, "titles": titles, "facets": facets, "history_length": LENGTH, "max_k": MAX_K}


def write_rank(out: Path) -> None:
    """A bundle that ranks rows for two heads."""
    rng = np.random.default_rng(3)
    columns = {
        "user_id": Raw.of([f"u{user}" for user in rng.integers(0, 9, 200)]),
        "item_id": Raw.of(rng.integers(0, 30, 200).tolist()),
        "colours": Raw.of([rng.choice(COLOURS, count).tolist() for count in rng.integers(0, 3, 200)]),
        "price": Raw.of(rng.lognormal(2, 1, 200).round(2).tolist()),
    }
    declared = (
        Categorical(columns=("user_id", "item_id")),
        MultiValued(columns=("colours",)),
        Numeric(columns=("price",), log=True),
        Bucketed(columns=("price",), quantiles=4),
    )
    encoder = FieldEncoder.fit(declared, columns)
    rows = rows_for(max(shape.offset + shape.rows for shape in encoder.shapes))
    heads = (Head(name="click"), Head(name="buy", tower=TowerConfig(widths=(3,))))
    made = {"interaction": Cross(layers=1, deep=TowerConfig(widths=(4,))), "inputs": FieldConfig(width=2)}
    model = Functional(partial(Ranker, num_rows=rows, fields=encoder.shapes, heads=heads, **made))
    told = [{"name": head.name, "temperature": 1.5, "bias": -0.5} for head in heads]
    features = RankerFeatures(sides=(), rules=(), encoder=encoder)
    export_ranker(model, drawn(model, 3), features, out=out, heads=told, name="rank", **TOLD)


def write_score(out: Path) -> None:
    """A bundle that answers a question about candidates by label words."""
    tokenizer = TokenizerConfig(size=600).make([*(f"the {colour} one" for colour in COLOURS), *LIKE.words()])
    chat = Chat(FORMATS["turns"], Memo(tokenizer))
    prompts = PromptWriter(LIKE, chat, Budget(length=128), name="like", question=["item"], instruction=["least"])
    task = ScoreTask(
        name="like",
        prompts=prompts.told(),
        label_words=("No", "Yes"),
        label_columns=(0, 1),
        answer_length=2,
        tells_history=True,
        temperature=1.5,
        bias=(0.0, -0.5),
    )
    rows = [int(token) + FIRST_ITEM for token in label_tokens(chat, ("No", "Yes"))]
    model = sequence_of(rows_for(tokenizer.size), 256)
    more = {"tokenizer": tokenizer, "label_rows": rows, "suffix_width": 40, "widths": (128,), "candidates": 2}
    export_scores(model, drawn(model, 4), [task], out=out, name="score", **more, **TOLD)


KINDS = {"items": write_items, "codes": write_codes, "rank": write_rank, "score": write_score}


def write(folder: Path) -> None:
    """The bundles of all kinds in `folder`, and the answers they give; what is there stays as it is."""
    file = folder / ANSWERS
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, write_kind in KINDS.items():
        if name not in found:
            write_kind(folder / name)
            bundle = load_bundle(folder / name)
            found[name] = [answer(bundle, asked) for asked in questions(name)]
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def questions(name: str) -> list[dict[str, Any]]:
    """What is asked of a bundle of this kind."""
    rng = np.random.default_rng(5)
    if name == "rank":
        prices = [None, 3.5, 1e6]
        contexts = [{}, {"user_id": "u3"}, {"user_id": "nobody", "colours": ["red", "black"]}]
        rows = [{"item_id": item, "price": prices[item % 3]} for item in (4, 7, 999)]
        return [{"context": context, "candidates": rows[:count]} for context in contexts for count in (1, 2, 3)]
    if name == "score":
        candidates = [{"item": f"the {colour} one"} for colour in (*COLOURS, "unheard of")]
        history = [{"item": "the red one", "action": "rated 4"}, {"item": "the green one", "action": "rated 1"}]
        said = {"instruction": {"least": "4"}, "profile": ["age: 30"]}
        return [{**said, "history": history[:n], "candidates": candidates[: n + 2]} for n in range(3)]
    histories = [[f"item {i}" for i in rng.integers(0, ITEMS, n)] for n in (1, 3, 5, 12)]
    asked = [{"history": history, "kind": kind} for history in histories for kind in (None, "blue")]
    return [*asked, {"history": ["nobody", "item 7"], "kind": None}]


def answer(bundle: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """A question with the scores that a bundle gives, and the items they are for where it finds them itself."""
    if isinstance(bundle, RankBundle):
        return {**asked, "scores": bundle.scores(bundle.answer([RankQuestion(**asked)])).tolist()}
    if isinstance(bundle, ScoreBundle):
        _, prefix, suffixes = bundle.rows(ScoreQuestion(**asked))
        return {**asked, "scores": bundle.task().answers(bundle.logits(prefix, suffixes)).tolist()}
    assert isinstance(bundle, Bundle)
    user = bundle.encode(asked["history"])
    allowed = bundle.allowed({"kind": [asked["kind"]]} if asked["kind"] else {})
    scores, rows = bundle.recommend(
        pad([user.history_ids], count=1, width=bundle.prompt_length),
        pad([user.seen_ids], count=1, width=16),
        **({} if allowed is None else {"allowed": allowed[None]}),
    )
    there = np.isfinite(scores[0])
    return {**asked, "items": bundle.vocab.decode(rows[0][there]), "scores": scores[0][there].tolist()}


if __name__ == "__main__":
    write(RELEASES / recjax.__version__)
