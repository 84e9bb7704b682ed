"""Filters over facets of one value and of several, against a plain account of them."""

from __future__ import annotations

import numpy as np
import pytest

from recjax.core.errors import RequestError
from recjax.serve.facets import SHOWN, Facets

ROWS = 60
RNG = np.random.default_rng(0)
COLOURS = [None if RNG.random() < 0.2 else str(RNG.choice(["red", "green", "blue"])) for _ in range(ROWS)]
GENRES = [
    None if RNG.random() < 0.2 else sorted(set(RNG.choice(list("abcdef"), RNG.integers(0, 4)).tolist()))
    for _ in range(ROWS)
]


def plain(column: list, wanted: list[str]) -> np.ndarray:
    return np.array(
        [bool({v} & set(wanted)) if isinstance(v, str) else bool(set(v or ()) & set(wanted)) for v in column]
    )


@pytest.mark.parametrize("wanted", [["a"], ["a", "f"], list("abcdef")])
def test_an_item_needs_one_of_the_values_in_every_facet(wanted: list[str]) -> None:
    facets = Facets({"colour": COLOURS, "genre": GENRES})
    np.testing.assert_array_equal(facets.allowed({"genre": wanted}), plain(GENRES, wanted))
    both = facets.allowed({"genre": wanted, "colour": ["red", "blue"]})
    np.testing.assert_array_equal(both, plain(GENRES, wanted) & plain(COLOURS, ["red", "blue"]))
    assert facets.allowed({}) is None


def test_the_most_frequent_values_are_shown_first() -> None:
    shown = Facets({"genre": GENRES}).shown()["genre"]
    counts = [sum(value in (one or ()) for one in GENRES) for value in shown]
    assert counts == sorted(counts, reverse=True) and set(shown) == {v for one in GENRES for v in one or ()}
    many = Facets({"id": [str(i) for i in range(SHOWN + 5)]})
    assert len(many.shown()["id"]) == SHOWN and many.allowed({"id": [str(SHOWN + 1)]}).sum() == 1


def test_what_there_is_not_is_told() -> None:
    facets = Facets({"genre": GENRES})
    with pytest.raises(RequestError, match="no facet colour"):
        facets.allowed({"colour": ["red"]})
    with pytest.raises(RequestError, match="no item has z"):
        facets.allowed({"genre": ["z"]})
