"""Rows of text stay, rows of items are close to their mean, and a vocabulary that does not fit is refused."""

import numpy as np
import pytest

from recjax.bridge.vocabulary import SHRINK, with_items
from recjax.core.errors import CheckpointError

WORDS, WIDTH = 500, 12
TABLE = (np.random.default_rng(0).normal(size=(WORDS, WIDTH)) @ np.diag(np.arange(1, 13)) + 3).astype(np.float32)
PLACE = {"text_start": 4096, "text_size": 480, "num_rows": 4608}


def test_text_stays_and_items_are_drawn_near_its_mean() -> None:
    table = with_items(TABLE, **PLACE)
    assert table.shape == (4608, WIDTH) and table.dtype == np.float32
    np.testing.assert_array_equal(table[4096 : 4096 + WORDS], TABLE)
    np.testing.assert_array_equal(table[0], TABLE[0])  # with which answers begin
    assert not table[4096 + WORDS :].any()
    new, words = table[1:4096].astype(np.float64), TABLE[:480].astype(np.float64)
    np.testing.assert_allclose(new.mean(0), words.mean(0), atol=3e-3)
    np.testing.assert_allclose(np.cov(new.T) * SHRINK, np.cov(words.T), atol=8)
    assert len(np.unique(new, axis=0)) == len(new)
    np.testing.assert_array_equal(table, with_items(TABLE, **PLACE))
    assert np.abs(table[1:4096] - with_items(TABLE, **PLACE, seed=1)[1:4096]).max() > 0


def test_titles_give_the_mean_of_their_words() -> None:
    table, plain = with_items(TABLE, **PLACE, texts={2: [7, 9, 9], 3: []}), with_items(TABLE, **PLACE)
    np.testing.assert_allclose(table[2], (TABLE[7] + 2 * TABLE[9]) / 3, rtol=1e-5)
    np.testing.assert_array_equal(np.delete(table, 2, axis=0), np.delete(plain, 2, axis=0))


@pytest.mark.parametrize("change", [{"text_size": 501}, {"num_rows": 4500}], ids=str)
def test_what_does_not_fit_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="vocabulary of"):
        with_items(TABLE, **{**PLACE, **change})
