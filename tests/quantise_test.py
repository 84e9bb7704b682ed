"""Residual k-means over a catalogue: codes that follow content, for every item, again and again the same."""

import numpy as np
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.data.codes import extend
from recjax.data.vocab import FIRST_ITEM, ItemVocab
from recjax.quantise import codes_of, fit_codes

VOCAB = ItemVocab(tuple(f"item{i}" for i in range(60)))


def vectors() -> np.ndarray:
    """Four clusters of four clusters; the last three items are without content."""
    rng = np.random.default_rng(0)
    place = np.arange(60)
    x = 30 * np.eye(8)[place % 4] + 5 * np.eye(8)[4 + place // 4 % 4] + 0.1 * rng.normal(size=(60, 8))
    x[57:] = 0
    out = np.zeros((VOCAB.num_rows, 8), np.float32)
    out[FIRST_ITEM : FIRST_ITEM + 60] = x
    return out


def test_codes_follow_content() -> None:
    codes = fit_codes(VOCAB, vectors(), levels=2, size=4, collisions=16)
    assert codes.sizes == (4, 4, 16) and codes.vocabulary_hash == VOCAB.hash
    first = codes.codes[:57, 0]
    assert all(len(set(first[np.arange(57) % 4 == c])) == 1 for c in range(4)) and len(set(first)) == 4
    np.testing.assert_array_equal(fit_codes(VOCAB, vectors(), levels=2, size=4, collisions=16).codes, codes.codes)
    # nearest code by code, in the books that are kept
    assert codes.codebooks is not None
    left = vectors()[FIRST_ITEM : FIRST_ITEM + 60].astype(np.float64)
    for level, book in enumerate(codes.codebooks):
        nearest = ((left[:, None] - book[None]) ** 2).sum(-1).argmin(1)
        np.testing.assert_array_equal(nearest, codes.content[:, level])
        left = left - book[nearest]


def test_new_items_are_spelled_with_the_old_books() -> None:
    codes = fit_codes(VOCAB, vectors(), levels=2, size=4, collisions=32)
    assert codes.codebooks is not None
    more = ItemVocab((*VOCAB.ids[::-1], "new"))
    items = vectors()[FIRST_ITEM : FIRST_ITEM + 60]
    content, _ = codes_of(np.concatenate([items[::-1], items[:1] + 0.01]), codes.codebooks)
    grown = extend(codes, more, content)
    np.testing.assert_array_equal(grown.codes[:60], codes.codes[::-1])
    np.testing.assert_array_equal(grown.content[60], codes.content[0])


def test_items_may_be_told_apart_by_their_last_code() -> None:
    spread = fit_codes(VOCAB, vectors(), levels=2, size=16, collisions=0)
    numbered = fit_codes(VOCAB, vectors(), levels=2, size=16, collisions=32)
    assert spread.sizes == (16, 16) and not spread.numbered  # no two alike, which Codes checks
    np.testing.assert_array_equal(spread.codes[:, 0], numbered.codes[:, 0])
    assert numbered.codes[:, 2].any() and (spread.codes != numbered.content).any()


def test_what_cannot_be_used_is_told() -> None:
    with pytest.raises(ConfigError, match="levels = 0"):
        fit_codes(VOCAB, vectors(), levels=0)
    with pytest.raises(DataError, match="vectors of shape"):
        fit_codes(VOCAB, vectors()[:9])
    with pytest.raises(DataError, match="raise collisions"):
        fit_codes(VOCAB, vectors(), levels=1, size=4, collisions=2)
