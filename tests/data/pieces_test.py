"""Pieces of items: every kind against its definition, and learned ones against brute force over all segmentations."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from recjax.core.errors import ConfigError, DataError
from recjax.data.codes import Codes, write_codes
from recjax.data.examples import Examples
from recjax.data.piece_words import texts_of
from recjax.data.pieces import (
    NONE,
    Bigrams,
    HashedIds,
    ItemPieces,
    LearnedPieces,
    PieceKind,
    Pieces,
    Prefixes,
    Unigrams,
    shares,
)
from recjax.data.vocab import FIRST_ITEM, ItemVocab

LEVELS, SIZE, ITEMS = 4, 8, 300
KINDS = (Unigrams, Bigrams, Prefixes, LearnedPieces, HashedIds)


def codes_of(seed: int = 0, levels: int = LEVELS, items: int = ITEMS) -> Codes:
    """Codes with structure: the second follows from the first, up to one of two; the last level numbers items."""
    content = np.random.default_rng(seed).integers(0, SIZE, (items, levels))
    content[:, 1] = (3 * content[:, 0] + content[:, 1] % 2) % SIZE
    codes = np.concatenate([content, np.arange(items)[:, None]], axis=1)
    return Codes(codes=codes, sizes=(*[SIZE] * levels, items), item_ids=tuple(f"item{i}" for i in range(items)))


def zipf(items: int = ITEMS) -> np.ndarray:
    return np.floor(2000 / np.arange(1, items + 1))


def test_unigrams_are_the_tables_of_all_levels_one_after_the_other() -> None:
    codes = codes_of()
    found = Unigrams(rows=LEVELS * SIZE).make(codes, zipf())
    np.testing.assert_array_equal(found.pieces, codes.content + SIZE * np.arange(LEVELS))


@pytest.mark.parametrize("levels", [4, 3])
def test_bigrams_with_enough_rows_are_the_pairs_and_no_others(levels: int) -> None:
    codes = codes_of(levels=levels)
    found = Bigrams(rows=1000).make(codes, zipf()).pieces
    groups = [codes.content[:, first : first + 2] for first in range(0, levels, 2)]
    assert found.shape == (ITEMS, len(groups))
    for column, group in zip(found.T, groups, strict=True):
        keys = list(map(tuple, group.tolist()))
        assert len(set(zip(keys, column.tolist(), strict=True))) == len(set(keys)) == len(set(column.tolist()))
        assert column.max() - column.min() < SIZE ** group.shape[1]


@pytest.mark.parametrize("kind", [Bigrams, Prefixes])
@pytest.mark.parametrize("rows", [5, 40, 200])
def test_hashed_keys_stay_in_the_part_of_their_group(kind: Any, rows: int) -> None:
    """Equal keys have equal rows, groups share none, and a part is used evenly."""
    codes = codes_of(items=2000)
    found = kind(rows=rows).make(codes, zipf(2000)).pieces
    wanted = [SIZE**2] * 2 if kind is Bigrams else [SIZE**n for n in range(1, LEVELS + 1)]
    spans = [(0, 2), (2, 4)] if kind is Bigrams else [(0, n) for n in range(1, LEVELS + 1)]
    start = 0
    for column, part, (first, end) in zip(found.T, shares(wanted, rows), spans, strict=True):
        assert column.min() >= start and column.max() < start + part
        row_of = {}
        for key, row in zip(map(tuple, codes.content[:, first:end].tolist()), column.tolist(), strict=True):
            assert row_of.setdefault(key, row) == row
        if part < wanted[spans.index((first, end))] and len(row_of) > 20 * part:
            used = np.bincount(np.asarray([*row_of.values()]) - start, minlength=part)
            assert used.min() > 0.4 * used.mean() and used.max() < 2 * used.mean()
        start += part
    assert start <= rows


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(6, 200))
def test_rows_are_shared_out(wanted: list[int], rows: int) -> None:
    """All rows that anyone could use are given, and whoever has less than it wants has no less than anyone else."""
    given_ = shares(wanted, rows)
    assert sum(given_) == min(rows, sum(wanted)) and all(0 < g <= w for g, w in zip(given_, wanted, strict=True))
    short = [g for g, w in zip(given_, wanted, strict=True) if g < w]
    assert not short or max(given_) - min(short) <= 1


def test_hashed_ids_know_nothing_of_content() -> None:
    """The same for the same id, whatever its codes and its neighbours; all rows are used about equally."""
    kind = HashedIds(rows=50, hashes=2)
    many = codes_of(items=4000)
    found = kind.make(many, zipf(4000)).pieces
    some = dataclasses.replace(codes_of(seed=1, items=40), item_ids=many.item_ids[100:140])
    np.testing.assert_array_equal(kind.make(some, np.zeros(40)).pieces, found[100:140])
    for number, column in enumerate(found.T):
        used = np.bincount(column - 25 * number, minlength=25)
        assert len(used) == 25 and used.min() > 110 and used.max() < 210
    joint = np.unique(found, axis=0)
    assert len(joint) > 0.97 * 25 * 25  # one says nothing about the other


@pytest.mark.parametrize("rows", [LEVELS * SIZE, 50, 120, 1000])
def test_learned_pieces_spell_the_codes_of_every_item(rows: int) -> None:
    """In order, without gap or overlap; also of items that were never seen."""
    codes = codes_of()
    counts = zipf()
    counts[1::3] = 0
    found = LearnedPieces(rows=rows).make(codes, counts)
    spelled = spellings(found)
    for text, pieces in zip(texts_of(codes.content, (SIZE,) * LEVELS), found.pieces.tolist(), strict=True):
        assert "".join(spelled[p] for p in pieces if p != NONE) == text
    assert found.pieces.max() < rows and set(range(LEVELS * SIZE)) <= set(spelled)


def spellings(found: Pieces) -> dict[int, str]:
    """Row -> its characters: codes in order of level and code, then the longer words of the model in its order."""
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=found.model)
    words = [processor.id_to_piece(i) for i in range(1, processor.get_piece_size())]
    return dict(enumerate([*sorted(w for w in words if len(w) == 1), *(w for w in words if len(w) > 1)]))


def test_the_segmentation_is_the_best_of_all() -> None:
    """Against brute force over the 2^(levels - 1) ways to cut, by the model's own scores."""
    codes = codes_of()
    found = LearnedPieces(rows=150).make(codes, zipf())
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=found.model)
    score = {processor.id_to_piece(i): processor.get_score(i) for i in range(1, processor.get_piece_size())}
    spelled = spellings(found)
    for text, pieces in zip(texts_of(codes.content, (SIZE,) * LEVELS), found.pieces.tolist(), strict=True):
        best = -np.inf
        for cuts in itertools.product([False, True], repeat=LEVELS - 1):
            bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), LEVELS]
            parts = [str(text)[a:b] for a, b in itertools.pairwise(bounds)]
            best = max(best, sum(score.get(part, -np.inf) for part in parts))
        assert sum(score[spelled[p]] for p in pieces if p != NONE) == pytest.approx(best, abs=1e-4)


def test_without_rows_beyond_the_codes_learned_pieces_are_unigrams() -> None:
    codes = codes_of()
    least = LEVELS * SIZE
    learned, plain = (kind(rows=least).make(codes, zipf()).pieces for kind in (LearnedPieces, Unigrams))
    np.testing.assert_array_equal(learned, plain)


def test_more_rows_make_fewer_pieces() -> None:
    codes, counts = codes_of(), zipf()
    mean = [
        np.average(LearnedPieces(rows=rows).make(codes, counts).count, weights=counts) for rows in (32, 40, 80, 200)
    ]
    assert mean[0] == LEVELS and all(a > b for a, b in itertools.pairwise(mean))


def test_what_is_seen_often_has_fewer_pieces() -> None:
    count = LearnedPieces(rows=80).make(codes_of(), zipf()).count
    head, tail = count[:20], count[-100:]
    assert head.max() <= 2 and head.mean() + 1 < tail.mean()


def test_learned_pieces_follow_from_codes_and_counts() -> None:
    """The order of the items says nothing, nor do those that were not seen."""
    codes, counts = codes_of(), zipf()
    counts[200:] = 0
    first = LearnedPieces(rows=90).make(codes, counts)
    order = np.random.default_rng(3).permutation(ITEMS)
    shuffled = dataclasses.replace(codes, codes=codes.codes[order], item_ids=tuple(codes.item_ids[i] for i in order))
    again = LearnedPieces(rows=90).make(shuffled, counts[order])
    seen = dataclasses.replace(codes, codes=codes.codes[:200], item_ids=codes.item_ids[:200])
    assert first.model == again.model == LearnedPieces(rows=90).make(seen, counts[:200]).model
    np.testing.assert_array_equal(first.pieces[order], again.pieces)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 5), st.integers(0, 60))
def test_learned_pieces_of_any_small_catalogue(seed: int, items: int, levels: int, more: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = tuple(draw.integers(1, 6, levels).tolist())
    content = np.stack([draw.integers(0, size, items) for size in sizes], axis=1)
    codes = Codes(
        codes=np.concatenate([content, np.arange(items)[:, None]], axis=1),
        sizes=(*sizes, items),
        item_ids=tuple(map(str, range(items))),
    )
    counts = draw.integers(0, 50, items)
    counts[0] += 1
    found = LearnedPieces(rows=sum(sizes) + more).make(codes, counts)
    spelled = spellings(found)
    for text, pieces in zip(texts_of(content, sizes), found.pieces.tolist(), strict=True):
        assert "".join(spelled[p] for p in pieces if p != NONE) == text


@pytest.mark.parametrize("kind", [Unigrams, LearnedPieces])
def test_too_few_rows_for_the_codes_are_refused(kind: Any) -> None:
    with pytest.raises(DataError, match="no room for every code"):
        kind(rows=LEVELS * SIZE - 1).make(codes_of(), zipf())


def test_what_cannot_be_is_refused() -> None:
    for kind in KINDS:
        with pytest.raises(ConfigError, match="rows = 0"):
            kind(rows=0)
    with pytest.raises(ConfigError, match="hashes"):
        HashedIds(rows=3, hashes=4)
    for kind in (Bigrams(rows=1), Prefixes(rows=3)):
        with pytest.raises(DataError, match="kinds of keys"):
            kind.make(codes_of(), zipf())
    with pytest.raises(DataError, match="no item was seen"):
        LearnedPieces(rows=100).make(codes_of(), np.zeros(ITEMS))


@pytest.mark.parametrize("kind", [k(rows=100) for k in KINDS], ids=lambda k: type(k).__name__)
def test_a_fact_of_a_recipe(kind: PieceKind, tmp_path: Path) -> None:
    """Rows of the vocabulary, counts of all its tasks, none for what is no item."""
    codes = codes_of()
    vocab = ItemVocab(codes.item_ids)
    path = tmp_path / "1_quantise" / "artifacts" / "codes"
    write_codes(path, dataclasses.replace(codes, vocabulary_hash=vocab.hash))
    counts = np.zeros(vocab.num_rows, np.float32)
    counts[FIRST_ITEM : FIRST_ITEM + ITEMS] = zipf()

    class Known(Examples):
        def __init__(self, item_count: np.ndarray) -> None:
            self.vocab, self.item_count = vocab, item_count

    fact = ItemPieces(kind=kind, path=str(tmp_path), stage="1_quantise")([Known(counts), Known(counts)])["item/pieces"]
    want = kind.make(codes, 2 * zipf()).pieces
    assert fact.dtype == np.int32 and fact.shape == (vocab.num_rows, want.shape[1])
    np.testing.assert_array_equal(fact[FIRST_ITEM : FIRST_ITEM + ITEMS], want)
    assert (fact[:FIRST_ITEM] == NONE).all() and (fact[FIRST_ITEM + ITEMS :] == NONE).all()
