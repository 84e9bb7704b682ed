"""BM25 as the formula says, counted word by word."""

import math
import re
import sys

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.index.bm25 import Bm25, words

WORDS = ["red", "blue", "old", "new", "a", "the", "Straße", "x1"]


def by_counting(texts: list[str], query: str, k1: float, b: float) -> list[float]:
    split = [re.findall(r"\w+", t.casefold()) for t in texts]
    mean, n, scores = sum(map(len, split)) / len(split), len(split), []
    for text in split:
        total = 0.0
        for word in re.findall(r"\w+", query.casefold()):
            df, f = sum(word in other for other in split), text.count(word)
            if f:
                idf = math.log(1 + (n - df + 0.5) / (df + 0.5))
                total += idf * f / (f + k1 * (1 - b + b * len(text) / mean))
        scores.append(total)
    return scores


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_the_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(0, 9))) for _ in range(30)]
    queries = [" ".join(rng.choice([*WORDS, "unknown"], rng.integers(1, 5))) for _ in range(10)] + ["red red", "?!", ""]
    k1, b = float(rng.uniform(0.5, 3)), float(rng.uniform(0, 1))
    found = Bm25(texts, k1=k1, b=b).scores(queries)
    assert found.shape == (13, 30) and found.dtype == np.float32
    np.testing.assert_allclose(found, [by_counting(texts, q, k1, b) for q in queries], rtol=1e-5, atol=1e-6)


def test_words_are_runs_of_letters_and_digits_in_one_case() -> None:
    assert words("The  Ｗidth-2 of STRASSE, it's") == ["the", "width", "2", "of", "strasse", "it", "s"]


def test_texts_without_words_match_nothing() -> None:
    assert Bm25(["", "--"]).scores(["red"]).tolist() == [[0.0, 0.0]]
    assert Bm25([]).scores(["red"]).shape == (1, 0) and Bm25(["red"]).scores([]).shape == (0, 1)


def test_without_the_library_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match=r"bm25s(.|\n)*recjax\[bm25\]"):
        Bm25(["red"])
