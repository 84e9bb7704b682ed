"""Characters typed until the target is found, against typing and looking one key at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from recjax.keystrokes import Search, report, typed
from recjax.serve.rank_request import RankQuestion

TITLES = ("red hat", "red coat", "blue hat", "grey coat", "green tree", "red tree")


def overlap(asked: Sequence[RankQuestion]) -> np.ndarray:
    """How many letters of the query a title begins with; the shorter first among equals."""
    scores = []
    for one in asked:
        query = one.context["query"] or ""
        for candidate in one.candidates:
            title = candidate["title"]
            same = next((k for k, (a, b) in enumerate(zip(query, title, strict=False)) if a != b), len(query))
            scores.append(same - len(title) / 100)
    return np.array(scores)


def one_key_at_a_time(search: Search, top: int) -> int:
    for count in range(len(search.query) + 1):
        asked = RankQuestion(context={"query": search.query[:count] or None}, candidates=search.candidates)
        order = np.argsort(-overlap([asked]), kind="stable").tolist()
        if search.target in order[:top]:
            return count
    return len(search.query) + 1


@pytest.mark.parametrize("top", [1, 2, 3])
def test_it_is_the_first_prefix_that_finds_the_target(top: int) -> None:
    candidates = [{"title": title} for title in TITLES]
    found = []
    for target, title in enumerate(TITLES):
        for query in (title, title.split()[1], title[::-1]):
            search = Search(query, {"user_id": 1}, candidates, target)
            found.append(typed(overlap, search, top=top))
            assert found[-1] == one_key_at_a_time(search, top)
    assert len(set(found)) > 3


def test_equals_go_by_place() -> None:
    candidates = [{"title": "a"}] * 5
    flat = lambda asked: np.zeros(5 * len(asked))  # noqa: E731
    assert [typed(flat, Search("ab", {}, candidates, at)) for at in range(5)] == [0, 0, 0, 3, 3]


def test_the_report_counts() -> None:
    found = report([0, 2, 5, 4], ["abcd", "abcd", "abcd", "abcdefgh"])
    assert found == {
        "typed": 2.75,
        "share_of_query": 0.5,
        "never": 0.25,
        "within_0": 0.25,
        "within_1": 0.25,
        "within_2": 0.5,
        "within_3": 0.5,
    }
