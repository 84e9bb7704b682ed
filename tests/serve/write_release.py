"""Writes what a release leaves behind for the tests of later ones: a small bundle with the answers it gave.

    python tests/serve/write_release.py

makes `tests/serve/releases/<version>/`, to be committed when a version is released and never to be changed again:
`release_test.py` asks every bundle there the same questions. The catalogue, the histories and the weights are made up.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np

import recjax
from recjax.core.module import Functional
from recjax.data.vocab import FIRST_ITEM, ItemVocab
from recjax.export import export_bundle
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.serve.bundle import Bundle
from recjax.serve.features import pad

RELEASES = Path(__file__).with_name("releases")
ANSWERS = "answers.json"
ITEMS, LENGTH, MAX_K = 40, 5, 8
KINDS = ("red", "blue", "green")


def model_of(num_rows: int, length: int, seed: int) -> tuple[Functional, dict]:
    """A small transformer and weights for it."""
    encoder = TransformerConfig(num_layers=1, width=4, num_heads=1)
    model = Functional(partial(Sequence, num_rows=num_rows, encoder=encoder, max_length=length))
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda s: 0.7 * rng.normal(size=s.shape).astype(s.dtype), shapes)


def write(folder: Path) -> None:
    """`folder/items`, a bundle that recommends, with filters and sample users, and the answers it gives."""
    vocab = ItemVocab(tuple(f"item {i}" for i in range(ITEMS)))
    rows = range(FIRST_ITEM, FIRST_ITEM + ITEMS)
    titles = [f"Title {row}" if row in rows else None for row in range(vocab.num_rows)]
    facets = {"kind": [KINDS[row % 3] if row in rows else None for row in range(vocab.num_rows)]}
    told = {"vocab": vocab, "titles": titles, "facets": facets, "history_length": LENGTH, "max_k": MAX_K}
    told |= {"step": 3, "platforms": ("cpu",), "users": [{"history": ["item 3", "item 5"]}]}
    model, params = model_of(vocab.num_rows, LENGTH, 1)
    export_bundle(model, params, out=folder / "items", name="items", **told)
    found = {name: [answer(Bundle(folder / name), asked) for asked in questions()] for name in ("items",)}
    (folder / ANSWERS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def questions() -> list[dict]:
    """What is asked of every bundle."""
    rng = np.random.default_rng(5)
    histories = [[f"item {i}" for i in rng.integers(0, ITEMS, n)] for n in (1, 3, 5, 12)]
    asked = [{"history": history, "kind": kind} for history in histories for kind in (None, "blue")]
    return [*asked, {"history": ["nobody", "item 7"], "kind": None}]


def answer(bundle: Bundle, asked: dict) -> dict:
    """A question with the items and scores that a bundle gives."""
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
