"""The tables of a language model for a vocabulary that has items besides its text.

`recjax.data.tokens` gives padding and unknown the rows 0 and 1, items the rows after them, and text token t row
`text_start` + t; the rows between and behind belong to nobody. A row drawn from N(0, 1), as T5 draws its own at first,
would give an item logits far from those of any word, so new rows are drawn close to the mean of the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from recjax.core.errors import CheckpointError

# Covariance of the words over that of new rows: close to the mean, and yet no two alike.
SHRINK = 1e5
PAD = 0


def with_items(
    table: np.ndarray,
    *,
    text_start: int,
    text_size: int,
    num_rows: int,
    texts: Mapping[int, Sequence[int]] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The table [num_rows, d] with the vectors of `table` [text tokens, d] where text stands, and new rows before them.

    Row 0 is that of the old padding, with which T5 begins its answers. Every other row before `text_start` is drawn
    from N(mean, cov / 1e5) of the old rows; `texts` gives rows, by number, the mean of the vectors of some text tokens
    instead, such as those of an item's title. Rows past the text are zero. Raises `CheckpointError` when the text does
    not fit the old table or the new one.
    """
    known, width = table.shape
    if text_size > known or text_start + text_size > num_rows:
        raise CheckpointError(
            f"a vocabulary of {text_size} text tokens from row {text_start} on",
            where=f"a table of {num_rows} rows made of one of {known}",
            expected="no more text tokens than the checkpoint has, and a row for each",
            mend="give the tasks the SentencePiece model that belongs to this checkpoint",
        )
    out = np.zeros((num_rows, width), table.dtype)
    kept = min(known, num_rows - text_start)
    out[text_start : text_start + kept] = table[:kept]
    words = table[:text_size].astype(np.float64)
    mean, draw = words.mean(0), np.random.default_rng(seed)
    spread, axes = np.linalg.eigh(np.atleast_2d(np.cov(words, rowvar=False)))
    scale = np.sqrt(np.maximum(spread, 0) / SHRINK)
    out[:text_start] = mean + (draw.normal(size=(text_start, width)) * scale) @ axes.T
    out[PAD] = table[PAD]
    for row, tokens in (texts or {}).items():
        if len(tokens):
            out[row] = words[np.asarray(tokens)].mean(0)
    return out
