"""Which tokenizer prompts are spelt with: one that is given, or one trained on what the prompts will say.

The token ids become the rows of the model's table by way of an `ItemVocab` of the tokenizer's pieces: token t has row
`FIRST_ITEM + t`, so that padding and unknown keep the rows they have everywhere, and a checkpoint is tied to its
tokenizer as any other is to its catalogue.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recjax.core.errors import ConfigError, DataError
from recjax.data.text import TextVocab, Tokenizer, is_json, train_prompt_pieces
from recjax.data.text_json import TokenizerJson
from recjax.data.vocab import FIRST_ITEM, ItemVocab
from recjax.prompts.chat import SPECIALS

WORDS = ("Yes", "No")
_OWN = ("</s>",)  # the end piece, which every model trained here has by itself


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer of a task's prompts; all tasks of a mixture, and all stages of a system, need the same one.

    `path` is a SentencePiece model, a `tokenizer.json`, or a folder with either. Without it a SentencePiece model of at
    most `size` pieces is trained on the catalogue and the users of the data, with bytes for what it has no piece for,
    with every special token of the built-in chat formats, and with one piece for each of `words`. `ids` is how many
    rows the embedding of an imported model has, where these are more than its tokens: the last ones spell nothing.
    """

    path: str = ""
    size: int = 4096
    words: tuple[str, ...] = WORDS
    ids: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))
        if self.size < 512:
            raise ConfigError(
                f"TokenizerConfig.size = {self.size}", expected="at least 512: 256 bytes, special tokens, characters"
            )

    def make(self, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer; `texts` is what it is trained on when none is given.

        Raises `DataError` when the file cannot be read, or the text has nothing to learn from, and `ConfigError` when
        it has more tokens than the embedding has rows.
        """
        if self.path:
            model, file = self._read()
            found = TokenizerJson.of(model, where=str(file)) if is_json(model) else TextVocab.of(model, where=str(file))
        else:
            found = TextVocab.of(_trained(frozenset(texts), self.size, self.words))
        if 0 < self.ids < found.size:
            raise ConfigError(
                f"a tokenizer of {found.size:,} tokens for an embedding of {self.ids:,} rows",
                where=self.path or "TokenizerConfig.size",
                expected="the tokenizer that the model was trained with",
                mend="give its files as TokenizerConfig.path, or correct TokenizerConfig.ids",
            )
        return dataclasses.replace(found, size=self.ids or found.size)

    def told(self) -> dict[str, Any]:
        """The settings as JSON: a tokenizer that is given by what it holds, wherever it lies."""
        if self.path:
            return {"model": hashlib.sha256(self._read()[0]).hexdigest(), "ids": self.ids}
        return {"size": self.size, "words": list(self.words), "specials": list(SPECIALS), "ids": self.ids}

    def _read(self) -> tuple[bytes, Path]:
        path = Path(self.path).expanduser()
        inside = (path / name for name in ("tokenizer.json", "tokenizer.model"))
        file = next((f for f in inside if f.is_file()), path / "tokenizer.json") if path.is_dir() else path
        try:
            return file.read_bytes(), file
        except OSError as error:
            raise DataError(
                f"cannot read the tokenizer: {error.strerror}",
                where=str(file),
                expected="a SentencePiece model, a tokenizer.json, or a folder with one",
                mend="correct TokenizerConfig.path, or leave it empty to train one",
            ) from None


@functools.lru_cache(maxsize=2)
def _trained(texts: frozenset[str], size: int, words: tuple[str, ...]) -> bytes:
    """The model for these texts, made once for all tasks of a mixture."""
    specials = [piece for piece in SPECIALS if piece not in _OWN]
    return train_prompt_pieces(texts, size=size, specials=specials, words=words)


def vocabulary_of(tokenizer: Tokenizer) -> ItemVocab:
    """The tokens as a catalogue: the piece of id t has row `FIRST_ITEM + t`."""
    return ItemVocab(tokenizer.pieces)


def rows_of(tokens: np.ndarray) -> np.ndarray:
    """int32: the rows of token ids."""
    return (tokens + FIRST_ITEM).astype(np.int32)
