"""The text vocabulary: trained the same every time, cut to the text it has, and told apart by its hash."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.errors import ConfigError, DataError
from recjax.data import text
from recjax.data.simulate import World
from recjax.data.text import END, PAD, SPECIAL, UNKNOWN, TextConfig, TextVocab, train_pieces


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    tables = World(num_events=3000).tables()
    assert tables.items is not None and tables.queries is not None
    return [*tables.items["title"], *tables.queries["text"]]


def test_the_same_text_gives_the_same_model(corpus: list[str]) -> None:
    shuffled = corpus + corpus[:50] + ["", "  "]
    random.Random(0).shuffle(shuffled)
    assert train_pieces(corpus, size=300) == train_pieces(shuffled, size=300)
    other = TextVocab.of(train_pieces(corpus[:100], size=300))
    assert other.hash != TextVocab.of(train_pieces(corpus, size=300)).hash


def test_the_size_is_a_limit_and_ids_behind_the_pieces_spell_nothing(corpus: list[str]) -> None:
    assert TextConfig(size=300).make(corpus).size == 300
    small = TextConfig(size=10**5).make(corpus)
    assert 300 < small.size < 1000
    spare = TextConfig(size=300, extra_ids=100).make(corpus)
    assert spare.size == 400 and spare.hash != TextConfig(size=300).make(corpus).hash
    assert max(spare.encode(t).max() for t in corpus) < 300
    assert spare.decode([399]) == ""


def test_ids_give_the_text_back_and_the_special_ones_are_those_of_t5(corpus: list[str]) -> None:
    vocab = TextConfig(size=400).make(corpus)
    for said in corpus[::17]:
        ids = vocab.encode(said)
        assert ids.dtype == np.int32 and ids.min() >= SPECIAL and ids.max() < vocab.size
        assert vocab.decode(ids) == said.lower()
    assert UNKNOWN in vocab.encode("ünknown 字") and not {PAD, END} & set(vocab.encode("ünknown 字").tolist())
    np.testing.assert_array_equal(vocab.encode("QUIET mystery"), vocab.encode("quiet Mystery"))
    cased = TextConfig(size=400, fold_case=False).make(corpus)
    assert cased.decode(cased.encode(corpus[0])) == corpus[0]


@given(st.text(max_size=40))
def test_any_text_has_ids(said: str) -> None:
    vocab = _vocab()
    ids = vocab.encode(said)
    assert ids.dtype == np.int32 and ids.ndim == 1 and (ids < vocab.size).all() and (ids > END).all()


_KEPT: list[TextVocab] = []


def _vocab() -> TextVocab:
    if not _KEPT:
        _KEPT.append(TextConfig(size=60).make(["one two three", "four five six", "the quick brown fox"]))
    return _KEPT[0]


def test_a_given_model_is_taken_as_it_is(corpus: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(train_pieces(corpus, size=200))
    (tmp_path / "b.model").write_bytes(train_pieces(corpus, size=200))
    one, other = (TextConfig(model=str(tmp_path / f"{n}.model"), size=9, extra_ids=4) for n in "ab")
    assert one.make([]).size == 204 and one.make([]).hash == other.make(corpus).hash
    assert one.told() == other.told() != TextConfig(size=200).told()


def test_of_more_texts_than_are_taken_the_same_ones_are(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_TEXTS", 100)
    assert len(text._chosen(corpus)) == 100
    assert text._chosen(corpus) == text._chosen(corpus[::-1])
    assert set(text._chosen(corpus)) <= {" ".join(t.split()) for t in corpus}


def test_what_makes_no_vocabulary_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text to train"):
        TextConfig().make(["", " "])
    with pytest.raises(DataError, match="no room for the characters"):
        TextConfig(size=5).make(["the quick brown fox jumps over the lazy dog"])
    with pytest.raises(DataError, match="cannot read the text model"):
        TextConfig(model=str(tmp_path / "none.model")).make([])
    (tmp_path / "odd.model").write_text("not a model")
    with pytest.raises(DataError, match=r"not a SentencePiece model(.|\n)*odd\.model"):
        TextConfig(model=str(tmp_path / "odd.model")).make([])
    for settings in ({"size": 3}, {"extra_ids": -1}):
        with pytest.raises(ConfigError, match="TextConfig"):
            TextConfig(**settings)
