"""A bundle of a small model of the contract (`hidden`, `table`), exported once for all tests of this folder."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.module import Functional, Module, param
from recjax.data.vocab import FIRST_ITEM, ItemVocab
from recjax.export import export_bundle

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
