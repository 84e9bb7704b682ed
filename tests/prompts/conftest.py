"""Tokenizers for prompts, of both kinds."""

from __future__ import annotations

import pytest

from recjax.data.text import TextVocab, Tokenizer
from recjax.data.text_json import TokenizerJson
from recjax.prompts.chat import SPECIALS
from recjax.prompts.tokenizer import TokenizerConfig

WORDS = ("red", "blue", "quiet", "loud", "film", "story", "night", "river", "member", "rated", "history", "the")


def lines() -> list[str]:
    return [f"The {a} {b}: {WORDS[(i + k) % 12]} [{i * k}]" for i, a in enumerate(WORDS) for k, b in enumerate(WORDS)]


def pieces() -> TextVocab:
    found = TokenizerConfig(size=700).make(lines())
    assert isinstance(found, TextVocab)
    return found


def of_hugging_face() -> TokenizerJson:
    """A byte-level tokenizer as Llama 3 and Qwen have, with the special tokens of every built-in format."""
    tokenizers = pytest.importorskip("tokenizers")
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([*lines(), *["Yes No Yes No maybe"] * 20], trainer)
    return TokenizerJson.of(found.to_str().encode())


@pytest.fixture(scope="session", params=["pieces", "json"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return pieces() if request.param == "pieces" else of_hugging_face()
