"""The text vocabulary of an imported language model: a `tokenizer.json` of Hugging Face, read by package `tokenizers`.

The same small interface as `text.TextVocab`, so that prompts, prepared folders and servers need not know which of the
two they have. The library is imported when a text is spelt, and never before: most recipes do without it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recjax.core.errors import DataError


@dataclass(frozen=True)
class TokenizerJson:
    """A tokenizer by the bytes of its file, and the `size` of the vocabulary, added tokens included."""

    model: bytes = field(repr=False)
    size: int

    @classmethod
    def of(cls, model: bytes, *, where: str = "") -> TokenizerJson:
        """Raises `DataError` when the bytes are no tokenizer, or the library is not installed."""
        return cls(model, 1 + max(_tokenizer(model, where).get_vocab(with_added_tokens=True).values(), default=-1))

    @property
    def hash(self) -> str:
        """16 hexadecimal digits, the same for the same file and size."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> str:
        return hashlib.sha256(self.model + self.size.to_bytes(8, "little")).hexdigest()[:16]

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return _tokenizer(self.model)

    @functools.cached_property
    def _specials(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def encode(self, text: str) -> np.ndarray:
        """int32 [n]: the ids of the text alone. What looks like a special token is spelt as the text it is."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same for many texts."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in found]

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """The text of these ids; special tokens and ids that spell nothing are left out."""
        known = [i for i in np.asarray(ids).tolist() if 0 <= i < self.size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def special(self, piece: str) -> int | None:
        """The id of a special token; None where there is none that is spelt so."""
        return self._specials.get(piece)

    @property
    def pieces(self) -> tuple[str, ...]:
        """What stands for each id, all different."""
        return self._names

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        found = (self._tokenizer.id_to_token(i) for i in range(self.size))
        return tuple(f"<no piece {i}>" if piece is None else piece for i, piece in enumerate(found))


def _tokenizer(model: bytes, where: str = "") -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError(
            "reading a tokenizer of Hugging Face needs the library tokenizers",
            where=where,
            mend="pip install tokenizers",
        ) from None
    try:
        found = Tokenizer.from_buffer(model)
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"this is not a tokenizer: {error}", where=where, expected="a file tokenizer.json of Hugging Face"
        ) from None
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = True  # a title cannot smuggle in the end of a turn
    return found
