"""Label words are single, different tokens in their place, or are refused."""

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.data.text import Tokenizer
from recjax.prompts.chat import FORMATS, Chat, Memo, Part, Turn
from recjax.prompts.labels import label_tokens


@pytest.mark.parametrize("name", FORMATS)
def test_a_label_is_the_token_that_is_predicted_at_the_answer_slot(name: str, tokenizer: Tokenizer) -> None:
    chat = Chat(FORMATS[name], Memo(tokenizer))
    labels = label_tokens(chat, ("Yes", "No"))
    for word, label in zip(("Yes", "No"), labels, strict=True):
        asked = Turn("user", (Part("question", "Well?"),))
        found = chat.write([asked, Turn("assistant", (Part("", word),))])
        assert found.tokens[np.flatnonzero(found.mask("answer"))[0]] == label
    # " Yes" and "Yes" are different tokens: the one that counts is the one of the format.
    spaced = chat.leads["assistant"] == " "
    assert (labels[0] == tokenizer.encode(" Yes")[0]) == spaced


def test_words_that_are_not_one_token_are_refused(tokenizer: Tokenizer) -> None:
    chat = Chat(FORMATS["chatml"], Memo(tokenizer))
    with pytest.raises(ConfigError, match=r"'Indeed' is not one token where answers stand, but \["):
        label_tokens(chat, ("Indeed", "No"))
    with pytest.raises(ConfigError, match="'Yes' and 'Yes' are the same token"):
        label_tokens(chat, ("Yes", "Yes"))
    with pytest.raises(ConfigError, match="at least two"):
        label_tokens(chat, ("Yes",))


class Greedy:
    """A tokenizer that joins what stands before an answer with it, as some do: "\\nYes" is one token."""

    model, size, hash, pieces = b"", 300, "", tuple(map(chr, range(300)))

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(c) for c in text.replace("\nYes", "\x01").replace("Yes", "\x02")], np.int32)

    def encode_all(self, texts) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids) -> str:
        return "".join(self.pieces[i] for i in ids)

    def special(self, piece: str) -> int | None:
        return 290 + FORMATS["chatml"].specials.index(piece)


def test_a_word_that_melts_into_what_stands_before_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="'Yes' is not one token where answers stand"):
        label_tokens(Chat(FORMATS["chatml"], Memo(Greedy())), ("Yes", "N"))


def test_words_of_one_token_with_the_same_first_letters_are_different(tokenizer: Tokenizer) -> None:
    labels = label_tokens(Chat(FORMATS["turns"], Memo(tokenizer)), ("1", "2", "3"))
    assert len(set(labels.tolist())) == 3 and [tokenizer.pieces[t] for t in labels] == ["1", "2", "3"]
