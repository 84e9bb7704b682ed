"""One question, one answer: the best k items for the prompts of a batch, whichever way the catalogue is searched.

A `Catalogue` is what a model's answers are looked up in. `Rows` ranks every item exactly by one inner product with its
row of a table, be that trained (item ids) or made of content (an item tower). `Spelled` finds items that take several
tokens to name: a beam search through the trie of the ids that exist. Training-time evaluation, `infer` and exported
bundles all search through here, so that what is served is what was measured. Scores fall from first to last: inner
products of `Rows`, log-probabilities of `Spelled`; where fewer than k items are left the row is 0 and the score -inf.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from recjax.core.errors import UnservableError
from recjax.core.module import FACTS, Functional, Params
from recjax.data.batch import FIELDS, PAD
from recjax.data.tokens import Tokens
from recjax.data.vocab import FIRST_ITEM
from recjax.decode.beam import beam_search
from recjax.decode.build import build_trie
from recjax.decode.trie import Trie, TrieShape
from recjax.index.exact import top_k

_TRIE = "item/trie."


class Answers(NamedTuple):
    """The best k items of each query, best first."""

    scores: Float[Array, "b k"]
    rows: Int[Array, "b k"]


@runtime_checkable
class Catalogue(Protocol):
    """A way to find items."""

    @property
    def most(self) -> int:
        """How many answers there always are, where as many items are left."""
        ...

    def __call__(
        self,
        model: Functional,
        params: Params,
        batch: Mapping[str, Any],
        k: int,
        *,
        exclude: jax.Array,
        allowed: jax.Array | None = None,
    ) -> Answers:
        """Answer the prompts of `batch`, one to a row, its last slot at `query_at` [b, 1].

        Item rows in `exclude` int [b, n] (0 is padding) and those that are not `allowed` (bool [v] or [b, v]) are never
        among the answers.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """All items, the `num_items` rows from `FIRST_ITEM` on, by an inner product with their rows, exactly."""

    num_items: int

    @property
    def most(self) -> int:
        return self.num_items

    def __call__(
        self,
        model: Functional,
        params: Params,
        batch: Mapping[str, Any],
        k: int,
        *,
        exclude: jax.Array,
        allowed: jax.Array | None = None,
    ) -> Answers:
        query, table = encode(model, params, batch)
        row = jnp.arange(table.shape[-2])
        valid = (row >= FIRST_ITEM) & (row < FIRST_ITEM + self.num_items)
        if allowed is not None:
            # A table of tokens has more rows than there are items.
            beyond = [(0, 0)] * (allowed.ndim - 1) + [(0, len(row) - allowed.shape[-1])]
            allowed = jnp.pad(allowed, beyond)
            valid = allowed & jnp.broadcast_to(valid, allowed.shape)
        return Answers(*top_k(query, table, k, valid=valid, exclude_ids=exclude))


@dataclasses.dataclass(frozen=True)
class Spelled:
    """Items by a beam search for their tokens, `beams` wide; made by `spelled`.

    The arrays of the trie travel with the parameters, as facts do. Probabilities are those of a softmax over the
    tokens that may follow, of scores divided by `temperature`.
    """

    shape: TrieShape
    level_start: tuple[int, ...]
    beams: int
    temperature: float = 1.0

    @property
    def most(self) -> int:
        # Every beam leads to an item that is left; fewer beams than answers may not lead to enough of them.
        return min(self.beams, self.shape.num_ids)

    def __call__(
        self,
        model: Functional,
        params: Params,
        batch: Mapping[str, Any],
        k: int,
        *,
        exclude: jax.Array,
        allowed: jax.Array | None = None,
    ) -> Answers:
        facts = params[FACTS]
        trie = Trie({name.removeprefix(_TRIE): a for name, a in facts.items() if name.startswith(_TRIE)}, self.shape)
        module: Any = model.bind(params)
        with _only_fields_given():
            hidden, memory = module.prefill({**batch, **facts})

        def step(suffix: Any, codes: Any, level: int) -> tuple[jax.Array, Any]:
            out = hidden[:, None]
            if codes is not None:
                rows = codes + self.level_start[level - 1]
                out, suffix = module.extend(memory, suffix, rows, level - 1)
            first, size = self.level_start[level], self.shape.sizes[level]
            table = jax.lax.dynamic_slice_in_dim(memory.table, first, size).astype(jnp.float32)
            logits = jnp.einsum("bmd,vd->bmv", out.astype(jnp.float32), table, precision="highest")
            return logits / self.temperature, suffix

        suffix = module.start(memory, self.beams, self.shape.levels)
        found = beam_search(
            step,
            suffix,
            trie,
            beams=self.beams,
            k=k,
            allowed=None if allowed is None else trie.by_leaf(allowed),
            exclude=trie.leaves_of(jnp.where(exclude == PAD, -1, exclude)),
        )
        return Answers(found.log_prob, trie.rows_of(found.leaf))


def spelled(tokens: Tokens, *, beams: int, temperature: float = 1.0) -> tuple[Spelled, dict[str, np.ndarray]]:
    """The catalogue of items that are spelled so, and the facts that it needs among the parameters.

    Raises `DataError` where two items are spelled alike.
    """
    codes = np.full((len(tokens.spelling), tokens.levels), -1, np.int32)
    items = tokens.items
    codes[items] = tokens.spelling[items] - tokens.level_start
    trie = build_trie(codes, tokens.sizes)
    start = tuple(int(n) for n in tokens.level_start)
    facts = {f"{_TRIE}{name}": np.asarray(array) for name, array in trie.arrays.items()}
    return Spelled(trie.shape, start, beams, temperature), facts


def encode(model: Functional, params: Params, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Queries float32 [b, d], the model's output at `query_at` [b, 1], and the table they are scored against.

    A row without any event (`query_at` below 0) has a zero query: all items score alike. Raises `UnservableError` when
    the model reads a field that the batch does not have.
    """
    with _only_fields_given():
        out = model.apply(params, batch, train=False, key=None)
    at = batch["query_at"]
    if "query" in out:
        query = out["query"][:, 0]
    else:
        query = jnp.take_along_axis(out["hidden"], jnp.maximum(at, 0)[..., None], axis=1)[:, 0]
    return jnp.where(at >= 0, query.astype(jnp.float32), 0.0), out["table"]


@contextlib.contextmanager
def _only_fields_given() -> Iterator[None]:
    """Turn the missing of a field of the Batch contract into what it means for whoever asks."""
    try:
        yield
    except KeyError as error:
        if error.args[0] not in FIELDS:
            raise
        raise UnservableError(
            f"the model reads {error} from its batch",
            expected="a model that reads history_ids, positions and segment_ids, and the times that Feed.times gives",
            mend="set Feed.times, or recommend without this model",
        ) from error
