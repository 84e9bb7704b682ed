"""Codes of a catalogue: no two alike, whoever had some keeps them, and what is damaged is told."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.artifact import read_artifact, write_artifact
from recjax.core.errors import ArtifactError, DataError
from recjax.data.codes import Codes, extend, read_codes, report, tell_apart, write_codes
from recjax.data.vocab import ItemVocab, stable_hash

SIZE = 3
BOOKS = np.random.default_rng(0).normal(size=(2, SIZE, 5)).astype(np.float32)


def vocabulary(items: int, first: int = 0) -> ItemVocab:
    return ItemVocab(tuple(f"item{i}" for i in range(first, first + items)))


contents = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)), min_size=1, max_size=40)


@given(contents)
def test_numbers_tell_items_of_the_same_content_apart(content: list[tuple[int, int]]) -> None:
    """Each group is numbered 0, 1, ... by the hash of the ids, as a plain loop over it does."""
    vocab = vocabulary(len(content))
    codes = tell_apart(vocab, np.asarray(content), BOOKS, collisions=40)
    assert codes.sizes == (SIZE, SIZE, 40) and codes.levels == 3
    np.testing.assert_array_equal(codes.content, content)
    groups = defaultdict(list)
    for item, group in zip(vocab.ids, content, strict=True):
        groups[group].append(item)
    number = {}
    for members in groups.values():
        members.sort(key=lambda item: int(stable_hash([item])[0]))
        number |= {item: i for i, item in enumerate(members)}
    assert codes.codes[:, -1].tolist() == [number[item] for item in vocab.ids]


@given(contents, contents, st.randoms(use_true_random=False))
def test_a_larger_catalogue_moves_no_code(old: list, new: list, random) -> None:
    """Also in another order of rows, with items gone, and whatever the old items' content is now said to be."""
    before = tell_apart(vocabulary(len(old)), np.asarray(old), BOOKS, collisions=80)
    ids = [f"item{i}" for i in range(len(old)) if random.random() < 0.8]
    ids += [f"item{i}" for i in range(len(old), len(old) + len(new))]
    random.shuffle(ids)
    vocab = ItemVocab(tuple(ids))
    said = {f"item{i}": (2, 2) for i in range(len(old))} | {f"item{len(old) + i}": c for i, c in enumerate(new)}
    after = extend(before, vocab, np.asarray([said[i] for i in ids]))
    assert after.vocabulary_hash == vocab.hash and after.sizes == before.sizes
    had = dict(zip(before.item_ids, map(tuple, before.codes.tolist()), strict=True))
    has = dict(zip(after.item_ids, map(tuple, after.codes.tolist()), strict=True))
    assert all(has[item] == had[item] for item in has if item in had)
    assert all(has[item][:2] == tuple(said[item]) for item in has if item not in had)
    # Nobody gets what an item that is gone once had.
    assert not {has[item] for item in has if item not in had} & set(had.values())


def test_too_many_items_of_the_same_content_say_what_to_do() -> None:
    vocab = vocabulary(5)
    content = np.asarray([[0, 1]] * 4 + [[1, 1]])
    assert tell_apart(vocab, content, BOOKS, collisions=4).codes[:4, 2].tolist() != [0, 0, 0, 0]
    with pytest.raises(DataError, match=r"4 items have the content codes \[0, 1\]") as error:
        tell_apart(vocab, content, BOOKS, collisions=3)
    assert "raise collisions" in error.value.mend
    full = tell_apart(vocabulary(4), content[:4], BOOKS, collisions=4)
    with pytest.raises(DataError, match="5 items"):
        extend(full, vocab, content[[0, 0, 0, 0, 0]])


def test_without_numbers_content_must_tell_items_apart() -> None:
    vocab = vocabulary(3)
    codes = tell_apart(vocab, np.asarray([[0, 1], [1, 0], [1, 1]]), BOOKS, collisions=0)
    assert codes.sizes == (SIZE, SIZE) and codes.content is codes.codes
    assert extend(codes, vocabulary(4), np.asarray([[2, 2]] * 4)).codes[3].tolist() == [2, 2]
    with pytest.raises(DataError, match=r"share the codes \[1, 0\]: item1, item2"):
        tell_apart(vocab, np.asarray([[0, 1], [1, 0], [1, 0]]), BOOKS, collisions=0)


def test_without_numbers_items_are_spread_over_the_last_level() -> None:
    content = np.asarray([[0, 1], [1, 0], [1, 0]])
    left = np.stack([BOOKS[1, 1], BOOKS[1, 0], (BOOKS[1, 0] + BOOKS[1, 2]) / 2])
    codes = tell_apart(vocabulary(3), content, BOOKS, collisions=0, left=left)
    assert codes.codes.tolist() == [[0, 1], [1, 0], [1, 2]] and codes.sizes == (SIZE, SIZE)
    grown = extend(codes, vocabulary(4), np.asarray([[0, 0]] * 3 + [[1, 0]]), np.concatenate([left, left[1:2]]))
    assert grown.codes.tolist() == [[0, 1], [1, 0], [1, 2], [1, 1]]
    with pytest.raises(DataError, match=r"4 items share the codes \[1\]"):
        extend(grown, vocabulary(5), np.asarray([[1, 0]] * 5), left[[0, 1, 2, 0, 0]])


@pytest.mark.parametrize("codes, said", [([[0, 3]], "code 3 at level 1"), ([[-1, 0]], "code -1"), ([[0]], "of shape")])
def test_codes_out_of_range_are_refused(codes: list, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Codes(codes=np.asarray(codes), sizes=(3, 3), item_ids=("a",))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = np.asarray([[0, 1], [1, 0], [1, 0]])
    codes = tell_apart(vocabulary(3), content, BOOKS, collisions=2)
    write_codes(tmp_path / "codes", codes, recipe="tiny", step=7, about={"made": "here"})
    got = read_codes(tmp_path / "codes", vocabulary_hash=codes.vocabulary_hash)
    np.testing.assert_array_equal(got.codes, codes.codes)
    np.testing.assert_array_equal(got.codebooks, BOOKS)
    for field in ("sizes", "item_ids", "vocabulary_hash", "numbered", "hash"):
        assert getattr(got, field) == getattr(codes, field)
    about = read_artifact(tmp_path / "codes").manifest["about"]
    assert about["made"] == "here" and about["codes_hash"] == codes.hash and about["report"] == report(codes)
    with pytest.raises(ArtifactError, match="vocabulary_hash"):
        read_codes(tmp_path / "codes", vocabulary_hash="another")
    write_artifact(tmp_path / "other", {"codes": content}, kind="codes", about={"numbered": True})
    with pytest.raises(ArtifactError, match="sizes"):
        read_codes(tmp_path / "other")


def test_the_hash_changes_with_every_code_and_with_the_vocabulary() -> None:
    content = np.asarray([[0, 1], [1, 0], [2, 2]])
    hashes = {tell_apart(vocabulary(3), content, BOOKS, collisions=c).hash for c in (0, 2, 3)}
    hashes |= {tell_apart(vocabulary(3, first=1), content, BOOKS, collisions=2).hash}
    hashes |= {tell_apart(vocabulary(3), np.roll(content, 1), BOOKS, collisions=2).hash}
    assert len(hashes) == 5


@given(contents)
def test_the_report_counts(content: list[tuple[int, int]]) -> None:
    got = report(tell_apart(vocabulary(len(content)), np.asarray(content), BOOKS, collisions=40))
    groups = Counter(content)
    assert got["items"] == len(content) and got["largest"] == max(groups.values())
    assert got["distinct"] == pytest.approx(len(groups) / len(content), abs=1e-5)
    assert got["alone"] == pytest.approx(sum(n == 1 for n in groups.values()) / len(content), abs=1e-5)
    for level in range(2):
        share = np.asarray(list(Counter(c[level] for c in content).values())) / len(content)
        assert got["levels"][level]["used"] == len(share)
        assert got["levels"][level]["perplexity"] == pytest.approx(np.prod(share**-share), abs=6e-3)
