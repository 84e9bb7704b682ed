"""Which rows of one embedding table make up an item's vector, from its semantic ids or from a hash of its own id.

An item has up to P pieces, and its vector is the sum of their rows; items that were never trained on have vectors
because they share pieces with others. All kinds fill a table of the same number of `rows`, so that they can be
compared: codes one by one, in pairs, as prefixes, or as variable-length pieces learned from what was seen how often
(Singh et al. 2024, arXiv 2306.08121), and the random hash that these are to replace. The number that tells apart
items of equal content is no content, and makes no piece. Nothing here is trained by gradients: that is
`models.pieces.PieceSequence`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from recjax.core.errors import ConfigError, DataError
from recjax.data import hashing
from recjax.data.codes import Codes, read_codes
from recjax.data.examples import Examples
from recjax.data.piece_words import segment, train_words
from recjax.data.vocab import FIRST_ITEM, stable_hash

NONE = -1
_GROUP, _ITEM = 0x67726F7570, 0x6974656D  # what a hash is for


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Pieces:
    """`pieces` int32 [num_items, P]: row i has the table rows of the item in row FIRST_ITEM + i, then -1.

    They are below `rows`. `model` is the SentencePiece model that cut them, where one did.
    """

    pieces: np.ndarray
    rows: int
    model: bytes = dataclasses.field(default=b"", repr=False)

    @property
    def count(self) -> np.ndarray:
        """int64 [num_items]: how many pieces each item has."""
        return (self.pieces != NONE).sum(axis=1)


@runtime_checkable
class PieceKind(Protocol):
    """A way to make pieces; what `ItemPieces.kind` takes."""

    def make(self, codes: Codes, counts: np.ndarray) -> Pieces:
        """`counts` [num_items] says how often each item was seen; raises `DataError` where `rows` are too few."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """`rows` is the size of the table."""

    rows: int

    def __post_init__(self) -> None:
        if not isinstance(self.rows, int) or not 1 <= self.rows < 2**31:
            raise ConfigError(
                f"{type(self).__name__}.rows = {self.rows!r}", expected="the rows of the table, at least 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unigrams(_Kind):
    """Every code of every level has a row: the levels' tables, one after the other. Further rows are not used."""

    def make(self, codes: Codes, counts: np.ndarray) -> Pieces:
        """Raises `DataError` when there are fewer rows than codes."""
        _need_all_codes(codes, self.rows, "Unigrams")
        levels = codes.content.shape[1]
        return Pieces(pieces=_of_groups(codes, [(level,) for level in range(levels)], self.rows), rows=self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bigrams(_Kind):
    """Levels 0 and 1 make a key, 2 and 3 another, and so on; a last level without a partner is one by itself.

    Each of these groups has a part of the table: as many rows as it has keys, the smaller groups first, or an equal
    share of what is left, into which its keys are hashed.
    """

    def make(self, codes: Codes, counts: np.ndarray) -> Pieces:
        """Raises `DataError` when there are fewer rows than groups."""
        levels = range(codes.content.shape[1])
        groups = [tuple(levels[first : first + 2]) for first in levels[::2]]
        return Pieces(pieces=_of_groups(codes, groups, self.rows), rows=self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefixes(_Kind):
    """Every prefix of an item's codes is a key (Zheng et al. 2025, arXiv 2504.02137), in parts as for `Bigrams`."""

    def make(self, codes: Codes, counts: np.ndarray) -> Pieces:
        """Raises `DataError` when there are fewer rows than levels."""
        groups = [tuple(range(length)) for length in range(1, codes.content.shape[1] + 1)]
        return Pieces(pieces=_of_groups(codes, groups, self.rows), rows=self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedPieces(_Kind):
    """Pieces of neighbouring codes, of a unigram language model over the codes of what was seen (SentencePiece).

    Every code has a row, as for `Unigrams`; each further row is a piece of several codes that are often seen
    together. So what is seen often has few pieces, at most all of it one, and the rest has one for each code.
    Without rows beyond the codes this is `Unigrams`.
    """

    def make(self, codes: Codes, counts: np.ndarray) -> Pieces:
        """Raises `DataError` when there are fewer rows than codes, or nothing was seen."""
        _need_all_codes(codes, self.rows, "LearnedPieces")
        content, sizes = codes.content, codes.sizes[: codes.content.shape[1]]
        model = train_words(content, sizes, counts, words=self.rows)
        return Pieces(pieces=segment(model, content, sizes), rows=self.rows, model=model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashedIds(_Kind):
    """The control: `hashes` random rows for each item, by its id alone, each in its own part of the table."""

    hashes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.hashes <= self.rows:
            raise ConfigError(f"HashedIds.hashes = {self.hashes}", expected=f"1 to {self.rows}, the rows of the table")

    def make(self, codes: Codes, counts: np.ndarray) -> Pieces:
        """Reads neither codes nor counts."""
        own, part = stable_hash(codes.item_ids), self.rows // self.hashes
        keys = [hashing.mixed(own ^ hashing.hashes(1, _ITEM, number)) for number in range(self.hashes)]
        found = [number * part + (key % np.uint64(part)).astype(np.int64) for number, key in enumerate(keys)]
        return Pieces(pieces=np.stack(found, axis=1).astype(np.int32), rows=self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemPieces:
    """A fact of a recipe: `item/pieces` int32 [v, P] for the rows of the vocabulary, -1 for none.

    Made of the codes artifact at `path`, which is of the same items as the examples, and of how often these were had
    in training. With `stage`, `path` is the folder of all stages of a system and the artifact is that of this stage.
    """

    kind: PieceKind
    path: str
    stage: str = ""

    def __call__(self, examples: Sequence[Examples]) -> dict[str, np.ndarray]:
        """Raises `ArtifactError` or `DataError` for codes that cannot be read or do not fit."""
        vocab = examples[0].vocab
        items = slice(FIRST_ITEM, FIRST_ITEM + vocab.num_items)
        path = Path(self.path, self.stage, "artifacts", "codes") if self.stage else Path(self.path)
        counts = np.stack([e.item_count for e in examples]).sum(axis=0, dtype=np.float64)
        found = self.kind.make(read_codes(path, vocabulary_hash=vocab.hash), counts[items])
        out = np.full((vocab.num_rows, found.pieces.shape[1]), NONE, np.int32)
        out[items] = found.pieces
        return {"item/pieces": out}


def _need_all_codes(codes: Codes, rows: int, kind: str) -> None:
    sizes = codes.sizes[: codes.content.shape[1]]
    if rows < sum(sizes):
        raise DataError(
            f"a table of {rows:,} rows has no room for every code",
            where=f"{kind}.rows",
            expected=f"at least {sum(sizes):,}: {' + '.join(map(str, sizes))} codes",
            mend="give the table more rows, or the quantiser smaller books",
        )


def _of_groups(codes: Codes, groups: Sequence[tuple[int, ...]], rows: int) -> np.ndarray:
    """int32 [num_items, groups]: a row for the codes of each group of levels, each group in its own part."""
    if rows < len(groups):
        raise DataError(
            f"a table of {rows} rows for {len(groups)} kinds of keys", expected="a row for each kind, and better many"
        )
    keys = [math.prod(codes.sizes[level] for level in group) for group in groups]
    parts = shares(keys, rows)
    out, start = np.zeros((len(codes.content), len(groups)), np.int32), 0
    for number, (group, part) in enumerate(zip(groups, parts, strict=True)):
        if part == keys[number]:
            row = np.zeros(len(out), np.int64)
            for level in group:
                row = row * codes.sizes[level] + codes.content[:, level]
        else:
            key = np.repeat(hashing.hashes(1, _GROUP, number), len(out))
            for level in group:
                key = hashing.hashed_with(key, codes.content[:, level])
            row = (key % np.uint64(part)).astype(np.int64)
        out[:, number] = start + row
        start += part
    return out


def shares(wanted: Sequence[int], rows: int) -> list[int]:
    """How many of `rows` each gets: what it wants, the smallest first, or an equal share of what is left."""
    given, left = [0] * len(wanted), rows
    by_size = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for place, i in enumerate(by_size):
        given[i] = min(wanted[i], left // (len(wanted) - place))
        left -= given[i]
    return given
