"""Tokenizers of both kinds: what is spelt comes back, special tokens are out of reach of texts, files are found."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.errors import ConfigError, DataError
from recjax.data.text import TextVocab, Tokenizer, load_text
from recjax.data.text_json import TokenizerJson
from recjax.data.vocab import FIRST_ITEM
from recjax.prompts.chat import SPECIALS
from recjax.prompts.tokenizer import TokenizerConfig, rows_of, vocabulary_of


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30))
def test_a_text_is_spelt_as_it_is(text: str, tokenizer: Tokenizer) -> None:
    # SentencePiece has a sign of its own for spaces, which it takes for one.
    text = text.replace("\u2581", "")
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    np.testing.assert_array_equal(tokenizer.encode_all([text, "x"])[0], tokens)
    assert tokens.dtype == np.int32 and (tokens < tokenizer.size).all()


def test_special_tokens_are_those_of_all_formats_and_only_those(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.special(piece) for piece in SPECIALS]
    assert None not in ids and len(set(ids)) == len(SPECIALS)
    assert [tokenizer.pieces[i or 0] for i in ids] == list(SPECIALS)
    assert tokenizer.special("the") is None and tokenizer.special("<nothing>") is None
    assert tokenizer.decode(np.array(ids, np.int32)) == ""
    assert not set(ids) & set(tokenizer.encode("".join(SPECIALS)).tolist())


def test_pieces_are_the_catalogue_of_a_language_model(tokenizer: Tokenizer) -> None:
    vocab = vocabulary_of(tokenizer)
    assert vocab.num_items == tokenizer.size and len(set(tokenizer.pieces)) == tokenizer.size
    tokens = tokenizer.encode("The red film")
    rows = rows_of(tokens)
    assert rows.dtype == np.int32 and (rows == tokens + FIRST_ITEM).all()
    assert vocab.decode(rows) == [tokenizer.pieces[t] for t in tokens]
    np.testing.assert_array_equal(vocab.encode(list(tokenizer.pieces)), np.arange(tokenizer.size) + FIRST_ITEM)


def test_a_tokenizer_is_read_from_a_file_a_folder_and_a_prepared_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    name = "tokenizer.json" if isinstance(tokenizer, TokenizerJson) else "tokenizer.model"
    (tmp_path / name).write_bytes(tokenizer.model)
    config = TokenizerConfig(path=str(tmp_path))
    for found in (config.make(()), TokenizerConfig(path=str(tmp_path / name)).make(())):
        assert type(found) is type(tokenizer) and found.hash == tokenizer.hash
    found = load_text(tmp_path / name, tokenizer.size)
    assert found.hash == tokenizer.hash
    np.testing.assert_array_equal(found.encode("The red <film>"), tokenizer.encode("The red <film>"))
    assert config.told() != TokenizerConfig().told()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / name).write_bytes(tokenizer.model)
    assert config.told() == TokenizerConfig(path=str(tmp_path / "copy")).told()


def test_an_embedding_may_have_more_rows_than_tokens_and_not_fewer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").write_bytes(tokenizer.model)
    path, size = str(tmp_path / "tokenizer"), tokenizer.size
    wide = TokenizerConfig(path=path, ids=size + 40).make(())
    assert wide.size == vocabulary_of(wide).num_items == size + 40 and wide.hash != tokenizer.hash
    np.testing.assert_array_equal(wide.encode("The red film"), tokenizer.encode("The red film"))
    assert wide.decode([*wide.encode("red").tolist(), size + 3]) == "red"
    assert TokenizerConfig(path=path, ids=size).make(()).hash == tokenizer.hash
    with pytest.raises(ConfigError, match=f"{size - 1:,} rows"):
        TokenizerConfig(path=path, ids=size - 1).make(())


def test_training_is_the_same_whatever_the_order_of_the_texts() -> None:
    texts = [f"the {a} {b}" for a in "red blue quiet loud".split() for b in "film story night river".split()]
    config = TokenizerConfig(size=600, words=("Yes", "No", "Maybe"))
    one, two = config.make(texts), config.make([*texts[::-1], *texts])
    assert isinstance(one, TextVocab) and one.model == two.model
    for word in ("Yes", " Yes", "Maybe", " Maybe"):
        assert len(one.encode(word)) == 1


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the tokenizer(.|\n)*tokenizer.json"):
        TokenizerConfig(path=str(tmp_path)).make(())
    for content, message in ((b"{}", "not a tokenizer"), (b"\x00\x01", "not a SentencePiece model")):
        (tmp_path / "odd").write_bytes(content)
        with pytest.raises(DataError, match=message):
            TokenizerConfig(path=str(tmp_path / "odd")).make(())
    with pytest.raises(DataError, match="no text to train"):
        TokenizerConfig().make(())
