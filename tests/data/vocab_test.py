"""Vocabularies: order, rows, round trips, and refusal of changed files."""

import json

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import DataError, ExamplesError
from recjax.data.vocab import FIRST_ITEM, OOV, HashVocab, ItemVocab, load_vocab, rows_for, stable_hash


def test_order_is_most_frequent_then_id_and_integers_sort_by_value():
    vocab = ItemVocab.from_counts([10, 9, 100, 7], [1, 1, 5, 0])
    assert vocab.ids == ("100", "9", "10", "7")
    assert ItemVocab.from_counts(["10", "9", "b"], [1, 1, 1]).ids == ("10", "9", "b")


@pytest.mark.parametrize("num_items, rows", [(0, 128), (1, 128), (126, 128), (127, 256), (1000, 1024)])
def test_tables_have_a_multiple_of_128_rows(num_items, rows):
    vocab = ItemVocab(tuple(map(str, range(num_items))), "int")
    assert vocab.num_rows == rows == rows_for(num_items)
    assert vocab.valid.shape == (rows,) and vocab.valid.sum() == num_items
    assert not vocab.valid[:FIRST_ITEM].any() and not vocab.valid[FIRST_ITEM + num_items :].any()


@pytest.mark.parametrize("make", [list, np.array, pl.Series])
def test_encode_then_decode_gives_the_ids_back(make):
    rng = np.random.default_rng(0)
    ids = rng.permutation(5000)[:1000]
    ints = ItemVocab.from_counts(ids, rng.integers(0, 50, 1000))
    rows = ints.encode(make(ids))
    assert rows.dtype == np.int32 and sorted(rows) == list(range(FIRST_ITEM, FIRST_ITEM + 1000))
    assert ints.decode(rows) == ids.tolist()
    texts = [f"id{i}" for i in ids]
    words = ItemVocab.from_counts(texts, np.ones(1000))
    assert words.decode(words.encode(make(texts))) == texts


def test_unknown_missing_and_rows_without_an_item():
    vocab = ItemVocab(("5", "3"), "int")
    assert vocab.encode([5, "3", 4, None]).tolist() == [2, 3, OOV, OOV]
    assert vocab.encode(np.array([3, 99, -1])).tolist() == [3, OOV, OOV]
    assert vocab.encode(pl.Series([3, None])).tolist() == [3, OOV]
    assert vocab.encode([]).shape == (0,)
    assert vocab.decode([0, 1, 2, 3, 4, 127]) == [None, None, 5, 3, None, None]
    with pytest.raises(IndexError):
        vocab.decode([128])


def test_hash_tells_order_dtype_and_boundaries_apart():
    hashes = {v.hash for v in (ItemVocab(("1", "23"), "int"), ItemVocab(("12", "3"), "int"))}
    hashes |= {ItemVocab(("23", "1"), "int").hash, ItemVocab(("1", "23"), "str").hash, HashVocab(2).hash}
    assert len(hashes) == 5 and all(len(h) == 16 for h in hashes)


@pytest.mark.parametrize("vocab", [ItemVocab(("é", "a:b"), "str"), ItemVocab(("7",), "int"), HashVocab(77)])
def test_save_and_load(tmp_path, vocab):
    vocab.save(tmp_path / "vocabulary.json")
    assert load_vocab(tmp_path / "vocabulary.json") == vocab
    assert [p.name for p in tmp_path.iterdir()] == ["vocabulary.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c | {"ids": c["ids"][::-1]},
        lambda c: c | {"dtype": "str"},
        lambda c: c | {"ids": c["ids"] + [c["ids"][0]]},
        lambda c: c | {"ids": [1, 2]},
        lambda c: c | {"format": "other"},
        lambda c: {k: v for k, v in c.items() if k != "hash"},
        lambda c: [1],
    ],
)
def test_a_changed_file_is_refused(tmp_path, damage):
    path = tmp_path / "vocabulary.json"
    ItemVocab(("5", "3"), "int").save(path)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ExamplesError, match="vocabulary.json"):
        load_vocab(path)


def test_missing_cut_and_wrong_kind_of_file(tmp_path):
    path = tmp_path / "v.json"
    with pytest.raises(ExamplesError, match="missing"):
        ItemVocab.load(path)
    ItemVocab(("5", "3"), "int").save(path)
    path.write_text(path.read_text()[:-3])
    with pytest.raises(ExamplesError, match="cannot be read"):
        ItemVocab.load(path)
    HashVocab(5).save(path)
    with pytest.raises(ExamplesError, match="hashed"):
        ItemVocab.load(path)


def test_stable_hash_is_pinned_and_the_same_for_numbers_and_text():
    assert stable_hash(["12", "user-7"]).tolist() == [16370802936685099627, 11056362442684682814]
    assert stable_hash([12]).tolist() == stable_hash(np.array([12])).tolist() == stable_hash(["12"]).tolist()


def test_hashed_rows_spread_and_cannot_be_decoded():
    vocab = HashVocab(100)
    rows = vocab.encode(range(20_000))
    assert rows.min() == FIRST_ITEM and rows.max() == FIRST_ITEM + 99
    counts = np.bincount(rows, minlength=vocab.num_rows)[vocab.valid]
    assert abs(counts - 200).max() < 6 * 200**0.5
    assert vocab.encode(["12", None]).tolist() == [vocab.encode([12])[0], OOV]
    with pytest.raises(DataError, match="cannot be turned back"):
        vocab.decode([3])
