"""Match of words: BM25 scores of texts for queries (Robertson & Zaragoza 2009), by the library bm25s.

    score(q, d) = sum over the words w of q of  idf(w) * f / (f + k1 * (1 - b + b * |d| / mean |d|)),
    idf(w) = ln(1 + (n - df + 0.5) / (df + 0.5))

with f how often w occurs in d, |d| the words of d, n the texts and df those that have w (Lucene's form, which leaves
out the constant factor k1 + 1). A word that q repeats counts as often. Words are runs of letters and digits, in one
case; nothing is stemmed or left out.
"""

import logging
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from recjax.core.errors import ConfigError

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class Bm25:
    """An index of texts."""

    def __init__(self, texts: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        """Raises `ConfigError` when bm25s is not installed."""
        try:
            import bm25s
        except ImportError:
            raise ConfigError("BM25 needs bm25s, which is not installed", mend="pip install 'recjax[bm25]'") from None
        # The library writes a line for every index it builds, whatever the level of the root logger.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        found = [words(text) for text in texts]
        self._size = len(found)
        self._index = None
        if any(found):
            self._index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy", auto_compile=False)
            self._index.index(found, show_progress=False)

    def scores(self, queries: Sequence[str]) -> Float[np.ndarray, "n v"]:
        """The score of every text for every query; 0 where they have no word in common."""
        out = np.zeros((len(queries), self._size), np.float32)
        for row, query in zip(out, queries, strict=True):
            asked = words(query)
            if self._index is not None and asked:
                row[:] = self._index.get_scores(asked)
        return out
