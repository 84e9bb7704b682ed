"""Pieces of an item's codes as the words of a SentencePiece unigram model (Kudo 2018, arXiv 1804.10959).

Every code of every level is a character of its own in the private-use planes, an item is the text of its codes, and
the corpus is what was seen, as often as it was seen. A word never crosses items and never changes the order of codes.
Training is deterministic: the same codes and counts give the same bytes. What the words are used for is
`recjax.data.pieces`' matter.

The trainer's own search for candidate words looks at bytes, where all private-use characters begin alike, and finds
next to none of them; it also lets go of a character when no candidate needs it any more, and from then on keeps words
only for want of an alternative. So candidates are given, which are all parts of what was seen, and every character is
a text of its own as well, seen once.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recjax.core.errors import DataError

MAX_CANDIDATES = 1_000_000
_SETTINGS = 2
_PLANES = (0xF0000, 0x100000)
_PLANE = 0xFFFE  # the last two of a plane are no characters


def texts_of(content: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """str [n]: the characters of codes [n, levels], each level's below its size."""
    if sum(sizes) > _PLANE * len(_PLANES):
        raise DataError(
            f"{sum(sizes):,} codes cannot each be a character", expected=f"at most {_PLANE * len(_PLANES):,} codes"
        )
    number = content + np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    return _joined(_character(number))


def train_words(content: np.ndarray, sizes: Sequence[int], counts: np.ndarray, *, words: int) -> bytes:
    """The bytes of a model with at most `words` words, every code among them, and the longest an item.

    `content` int [n, levels] are the codes of items that were seen `counts` [n] times; those of count 0 say nothing.
    Fewer words come of it when nothing more is seen together. Raises `DataError` when nothing was seen.
    """
    import sentencepiece

    counts = np.rint(counts).astype(np.int64)
    if not (counts > 0).any():
        raise DataError("no item was seen, so no pieces can be learned", expected="items with events in training")
    levels = len(sizes)
    alphabet = _character(np.arange(sum(sizes))).view("<U1")
    texts, seen = _summed(texts_of(content, sizes)[counts > 0], counts[counts > 0])
    corpus = [*zip(texts.tolist(), seen.tolist(), strict=True), *((character, 1) for character in alphabet.tolist())]
    out = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        candidates = Path(folder, "candidates.tsv")
        candidates.write_text(
            "".join(f"{w}\t{n}\n" for w, n in _candidates(texts, seen)), encoding="utf-8", newline="\n"
        )
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(f"{text}\t{count}" for text, count in corpus),
            input_format="tsv",
            model_writer=out,
            model_type="unigram",
            seed_sentencepieces_file=str(candidates),
            vocab_size=words + 1,  # and the unknown one, which nothing is spelled with
            hard_vocab_limit=False,
            character_coverage=1.0,
            required_chars="".join(alphabet.tolist()),
            max_sentencepiece_length=levels,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_unicode_script=False,
            split_by_number=False,
            split_by_whitespace=False,
            shuffle_input_sentence=False,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,  # sums of several threads need not come in one order
            minloglevel=2,
        )
    return _without_settings(out.getvalue())


def segment(model: bytes, content: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """int32 [n, p]: the words of codes [n, levels] by the best segmentation, then -1; p is the most that any has.

    Words of one code come first, in the order of levels and codes, then longer ones, the likeliest first.
    """
    import sentencepiece

    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    alphabet = _character(np.arange(sum(sizes))).view("<U1").tolist()
    words = [processor.id_to_piece(i) for i in range(1, processor.get_piece_size())]
    order = {word: row for row, word in enumerate([*alphabet, *(w for w in words if len(w) > 1)])}
    row_of = np.asarray([-1, *(order[word] for word in words)], np.int32)
    texts, inverse = np.unique(texts_of(content, sizes), return_inverse=True)
    found = [row_of[ids] for ids in processor.encode(texts.tolist())]
    out = np.full((len(texts), max(map(len, found), default=0)), -1, np.int32)
    for i, rows in enumerate(found):
        out[i, : len(rows)] = rows
    return out[inverse.reshape(-1)]


def _candidates(texts: np.ndarray, seen: np.ndarray) -> list[tuple[str, int]]:
    """All parts of at least two characters, and how often they were seen: those that cover the most, in order."""
    characters = texts.view("<u4").reshape(len(texts), -1)
    levels = characters.shape[1]
    found: list[tuple[str, int]] = []
    for first in range(levels):
        for end in range(first + 2, levels + 1):
            parts, count = _summed(_joined(characters[:, first:end]), seen)
            found += zip(parts.tolist(), count.tolist(), strict=True)
    return sorted(found, key=lambda part: (-part[1] * len(part[0]), part[0]))[:MAX_CANDIDATES]


def _without_settings(model: bytes) -> bytes:
    """The model without the settings of its training (field 2 of the message), which name a folder that is gone."""
    kept, place = [], 0
    while place < len(model):
        tag, body = _varint(model, place)
        length, start = _varint(model, body)  # every field of the message is a message itself
        if tag >> 3 != _SETTINGS:
            kept.append(model[place : start + length])
        place = start + length
    return b"".join(kept)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of variable length in the wire format of protocol buffers, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[place] & 0x7F) << shift
        shift, place = shift + 7, place + 1
        if data[place - 1] < 0x80:
            return value, place


def _summed(texts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different texts in order, and the sum of the counts of each."""
    different, inverse = np.unique(texts, return_inverse=True)
    total = np.zeros(len(different), np.int64)
    np.add.at(total, inverse.reshape(-1), counts)
    return different, total


def _character(number: np.ndarray) -> np.ndarray:
    """uint32: the code points of characters numbered through the private-use planes."""
    return (np.asarray(_PLANES)[number // _PLANE] + number % _PLANE).astype("<u4")


def _joined(characters: np.ndarray) -> np.ndarray:
    """str [n] of code points [n, length]."""
    return np.ascontiguousarray(characters).view(f"<U{characters.shape[1]}")[:, 0]
