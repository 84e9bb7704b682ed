"""How much has to be typed until a ranker finds what is searched for: every prefix of a query is a request.

A search page asks with each key that is pressed. Of a request with a known target this counts the characters typed
until the target is among the first few candidates; one that never gets there counts as the whole query and one more.
(UniCoRn's card; the paper serves search by keystroke and gives no such metric.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from recjax.serve.rank_bundle import RankBundle
from recjax.serve.rank_request import RankQuestion

QUERY = "query"
# float [rows] for the rows of several questions, one after the other: the higher, the better.
Score = Callable[[Sequence[RankQuestion]], np.ndarray]


class Search(NamedTuple):
    """A search: `query` as it was typed to the end, what else is known, the candidates and which of them is meant."""

    query: str
    context: Mapping[str, Any]
    candidates: Sequence[Mapping[str, Any]]
    target: int


def scorer(bundle: RankBundle, head: str = "") -> Score:
    """The logits of a head of a bundle, the first without a name."""
    column = list(bundle.heads).index(head) if head else 0
    return lambda asked: bundle.logits(bundle.fields(asked))[:, column]


def typed(score: Score, search: Search, *, top: int = 3) -> int:
    """Characters typed, 0 for none at all, until the target is among the `top` best; equals go by place."""
    prefixes = [search.query[:count] for count in range(len(search.query) + 1)]
    asked = [
        RankQuestion(context={**search.context, QUERY: prefix or None}, candidates=search.candidates)
        for prefix in prefixes
    ]
    scores = score(asked).reshape(len(prefixes), len(search.candidates))
    own = scores[:, search.target, None]
    places = np.arange(len(search.candidates))
    ahead = ((scores > own) | ((scores == own) & (places < search.target)[None])).sum(1)
    found = np.flatnonzero(ahead < top)
    return int(found[0]) if len(found) else len(search.query) + 1


def report(counts: Sequence[int], queries: Sequence[str], *, most: int = 3) -> dict[str, float]:
    """Mean characters typed, the share of the query that is, and the shares of searches that need at most so many."""
    many, lengths = np.asarray(counts, np.float64), np.array([len(query) for query in queries])
    shares = {f"within_{count}": float((many <= count).mean()) for count in range(most + 1)}
    return {
        "typed": float(many.mean()),
        "share_of_query": float((np.minimum(many, lengths) / np.maximum(lengths, 1)).mean()),
        "never": float((many > lengths).mean()),
        **shares,
    }
