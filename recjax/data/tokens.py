"""Which rows of a table spell an item or a text, for models that read and write tokens instead of whole items.

Rows 0 (padding) and 1 (unknown) are those of an `ItemVocab`; then come the item tokens and, from a multiple of 128 on,
the tokens of a text vocabulary. With atomic ids an item is spelled by one token, which has the item's own row. With
codes (semantic ids) it is spelled by one token for each level: level l, code c has row 2 + sizes[0] + ... +
sizes[l - 1] + c, so that a row says which level it is of. Prepared examples know item rows and text ids only: they are
spelled when they are fed, and one folder of examples serves every way to spell.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from recjax.core.errors import ExamplesError
from recjax.data.codes import read_codes
from recjax.data.examples import Examples
from recjax.data.vocab import FIRST_ITEM, OOV, PAD, ROW_MULTIPLE


@dataclass(frozen=True)
class Tokens:
    """How items and texts are spelled.

    `spelling` int32 [item rows, L] holds the token rows of every item row, first level first; `sizes` how many tokens
    each level has, from row `FIRST_ITEM` on; `text_size` is the size of the text vocabulary, 0 where there is none.
    """

    spelling: np.ndarray
    sizes: tuple[int, ...]
    text_size: int = 0

    @property
    def levels(self) -> int:
        """Tokens of an item, L."""
        return self.spelling.shape[1]

    @property
    def text_start(self) -> int:
        """The row of text token 0."""
        return _rounded(FIRST_ITEM + sum(self.sizes))

    @property
    def num_rows(self) -> int:
        """Rows of a table of all tokens."""
        return self.text_start + _rounded(self.text_size)

    @property
    def valid(self) -> np.ndarray:
        """bool [num_rows]: the tokens that items are spelled with, which alone are ever predicted."""
        rows = np.arange(self.num_rows)
        return (rows >= FIRST_ITEM) & (rows < FIRST_ITEM + sum(self.sizes))

    @property
    def level_start(self) -> np.ndarray:
        """int [L]: the row of code 0 of every level."""
        return FIRST_ITEM + np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)

    @property
    def items(self) -> slice:
        """The item rows that stand for an item."""
        return slice(FIRST_ITEM, FIRST_ITEM + int((self.spelling[:, 0] >= FIRST_ITEM).sum()))

    def counts(self, item_count: np.ndarray) -> np.ndarray:
        """float32 [num_rows]: how often each token occurs where item row i occurs `item_count[i]` times."""
        found = np.zeros(self.num_rows, np.float64)
        for level in self.spelling.T:
            np.add.at(found, level, np.where(level >= FIRST_ITEM, item_count, 0))
        return found.astype(np.float32)

    @functools.cached_property
    def hash(self) -> str:
        """16 hexadecimal digits of everything that a trained table depends on, but for the items' own ids."""
        digest = hashlib.sha256(repr((self.sizes, self.text_size)).encode())
        digest.update(np.ascontiguousarray(self.spelling, "<i4").tobytes())
        return digest.hexdigest()[:16]


@runtime_checkable
class Spelling(Protocol):
    """A way to spell the items of prepared examples; what `Recipe.spelling` takes."""

    def make(self, examples: Sequence[Examples]) -> Tokens:
        """Raises `ExamplesError` or `ArtifactError` when the examples and what they are spelled with do not fit."""
        ...


@dataclass(frozen=True)
class AtomicIds:
    """One token for every item, which has the item's own row."""

    def make(self, examples: Sequence[Examples]) -> Tokens:
        vocab = examples[0].vocab
        rows = np.arange(vocab.num_rows, dtype=np.int32)
        spelling = np.where(vocab.valid | (rows == OOV), rows, PAD)
        return Tokens(spelling[:, None], (vocab.num_items,), text_size_of(examples))


@dataclass(frozen=True, kw_only=True)
class SemanticIds:
    """The codes of an artifact (`recjax.data.codes`), which is of the same items as the examples.

    With `stage`, `path` is the folder of all stages of a system and the artifact is that of this stage.
    """

    path: str
    stage: str = ""

    def make(self, examples: Sequence[Examples]) -> Tokens:
        vocab = examples[0].vocab
        path = Path(self.path, self.stage, "artifacts", "codes") if self.stage else Path(self.path)
        found = read_codes(path, vocabulary_hash=vocab.hash)
        sizes = tuple(int(n) for n in found.sizes)
        first = FIRST_ITEM + np.concatenate([[0], np.cumsum(sizes)[:-1]])
        spelling = np.zeros((vocab.num_rows, len(sizes)), np.int32)
        spelling[OOV] = OOV
        spelling[FIRST_ITEM : FIRST_ITEM + vocab.num_items] = found.codes + first
        return Tokens(spelling, sizes, text_size_of(examples))


def text_size_of(examples: Sequence[Examples]) -> int:
    """The size of the text vocabulary of the examples, 0 without any; raises `ExamplesError` when they have several."""
    told = {e.manifest["text_hash"]: e for e in examples if e.manifest.get("text_hash")}
    if len(told) > 1:
        raise ExamplesError(
            "the tasks of the mixture have different text vocabularies",
            where=", ".join(str(e.path) for e in told.values()),
            expected="one vocabulary",
            mend="give all tasks the same SentencePiece model",
        )
    return int(next(iter(told.values())).manifest["text_size"]) if told else 0


def _rounded(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
