"""The text vocabulary: a SentencePiece model that turns queries into numbers, given or trained on a task's own text.

A prepared folder holds the model's bytes, so that training, `infer` and a server spell a query in the same way; reading
it needs neither TensorFlow nor the text it was trained on. Training is deterministic: the same text and settings give
the same bytes. It knows nothing of token tables: which row spells text id t is `tokens.py`'s matter.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from recjax.core.errors import ConfigError, DataError
from recjax.data.text_json import TokenizerJson
from recjax.data.vocab import stable_hash

# As in T5's vocabulary; a model that is given may have others.
PAD, END, UNKNOWN = 0, 1, 2
SPECIAL = 3
MAX_TEXTS = 1_000_000
_MAX_BYTES = 4192  # of one text: the trainer leaves out longer ones


@runtime_checkable
class Tokenizer(Protocol):
    """What spells texts: a `TextVocab`, or the tokenizer of an imported model (`text_json.py`)."""

    @property
    def model(self) -> bytes:
        """The file that it is read from."""
        ...

    @property
    def size(self) -> int:
        """Ids are below it."""
        ...

    @property
    def hash(self) -> str: ...

    @property
    def pieces(self) -> tuple[str, ...]:
        """What stands for each id, all different."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """int32 [n]: the ids of a text, none of which is special."""
        ...

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: np.ndarray | Sequence[int]) -> str: ...

    def special(self, piece: str) -> int | None:
        """The id of a token that no text is spelt with, such as the end of a turn; None where there is none."""
        ...


@dataclass(frozen=True)
class TextVocab:
    """A SentencePiece model by its bytes, and the `size` of the vocabulary: its pieces, and ids that spell nothing."""

    model: bytes = field(repr=False)
    size: int

    @classmethod
    def of(cls, model: bytes, *, extra_ids: int = 0, where: str = "") -> TextVocab:
        """The vocabulary of a model, with `extra_ids` ids behind its pieces (T5 has 100 sentinels there).

        Raises `DataError` when the bytes are no SentencePiece model.
        """
        return cls(model, _processor(model, where).get_piece_size() + extra_ids)

    @functools.cached_property
    def _pieces(self) -> Any:
        return _processor(self.model)

    @property
    def hash(self) -> str:
        """16 hexadecimal digits, the same for the same model and size."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> str:
        return hashlib.sha256(self.model + self.size.to_bytes(8, "little")).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        """int32 [n]: the ids of the text's pieces; what the model has no piece for is its unknown id."""
        return np.array(self._pieces.encode(text), np.int32)

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """The text of these ids, normalised as the model does; ids that spell nothing are left out."""
        return self._pieces.decode([i for i in np.asarray(ids).tolist() if 0 <= i < self._pieces.get_piece_size()])

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each of many texts."""
        return [np.array(ids, np.int32) for ids in self._pieces.encode(list(texts), num_threads=1)]

    def special(self, piece: str) -> int | None:
        """The id of a control piece, which no text is spelt with; None where there is none of that name."""
        found = self._pieces.piece_to_id(piece)
        return found if self._pieces.is_control(found) else None

    @property
    def pieces(self) -> tuple[str, ...]:
        """What stands for each id, all different."""
        return self._names

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        known = self._pieces.get_piece_size()
        return tuple(self._pieces.id_to_piece(i) if i < known else f"<no piece {i}>" for i in range(self.size))


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text vocabulary a task uses.

    `model` is the path of a SentencePiece model. Without one, a unigram model is trained on the titles of the catalogue
    and the queries of the training split, of at most `size` pieces: fewer where the text does not have as many.
    `fold_case` makes it blind to upper and lower case. `extra_ids` ids behind the pieces spell no text.
    """

    model: str = ""
    size: int = 8192
    fold_case: bool = True
    extra_ids: int = 0

    def __post_init__(self) -> None:
        if self.size <= SPECIAL:
            raise ConfigError(f"TextConfig.size = {self.size}", expected=f"more than {SPECIAL}")
        if self.extra_ids < 0:
            raise ConfigError(f"TextConfig.extra_ids = {self.extra_ids}", expected="at least 0")

    def make(self, texts: Iterable[str]) -> TextVocab:
        """The vocabulary; `texts` is what it is trained on when no model is given.

        Raises `DataError` when the model cannot be read, or the text has nothing to learn from.
        """
        if self.model:
            return TextVocab.of(self._bytes(), extra_ids=self.extra_ids, where=self.model)
        return TextVocab.of(train_pieces(texts, size=self.size, fold_case=self.fold_case), extra_ids=self.extra_ids)

    def told(self) -> dict[str, Any]:
        """The settings as JSON: a model that is given by what it holds, wherever it lies."""
        if self.model:
            return {"model": hashlib.sha256(self._bytes()).hexdigest(), "extra_ids": self.extra_ids}
        return {"size": self.size, "fold_case": self.fold_case, "extra_ids": self.extra_ids}

    def _bytes(self) -> bytes:
        try:
            return Path(self.model).expanduser().read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read the text model: {error.strerror}",
                where=self.model,
                expected="a SentencePiece model file",
                mend="correct TextConfig.model, or leave it empty to train one",
            ) from None


def train_pieces(texts: Iterable[str], *, size: int, fold_case: bool = True) -> bytes:
    """The bytes of a unigram model with at most `size` pieces (Kudo 2018, arXiv:1804.10959).

    Neither the order of the texts nor repeats of one matter. Of more than `MAX_TEXTS` texts as many are taken, by hash.
    Raises `DataError` when there is nothing to learn from, or `size` has no room for the characters of the text.
    """
    return _trained(
        texts,
        vocab_size=size,
        character_coverage=0.9995,
        normalization_rule_name="nmt_nfkc_cf" if fold_case else "nmt_nfkc",
    )


def train_prompt_pieces(texts: Iterable[str], *, size: int, specials: Sequence[str], words: Sequence[str]) -> bytes:
    """The bytes of a unigram model for prompts and answers, of at most `size` pieces.

    A text is spelt as it is, spaces, lines and capitals too, bytes where there is no piece, so that parts of a prompt
    can be spelt one by one. `specials` become control pieces, which no text is spelt with; each of `words`, alone or
    after a space, is one piece wherever it stands. Raises what `train_pieces` raises.
    """
    whole = [word for each in words for word in (each, f"\u2581{each}")]
    return _trained(
        texts,
        vocab_size=size,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        control_symbols=list(specials),
        user_defined_symbols=["\n", *whole],
    )


def _trained(texts: Iterable[str], **settings: Any) -> bytes:
    import sentencepiece

    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_chosen(texts)),
            model_writer=out,
            model_type="unigram",
            hard_vocab_limit=False,
            max_sentence_length=_MAX_BYTES,
            pad_id=PAD,
            eos_id=END,
            unk_id=UNKNOWN,
            bos_id=-1,  # none
            num_threads=1,  # sums of several threads need not come in one order
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        said = str(error)
        if "sentences_.empty()" in said:
            raise DataError(
                "there is no text to train a vocabulary on",
                where="items and queries",
                expected="titles, or queries with words",
                mend="bring a column title, or give a model: TextConfig.model",
            ) from None
        if "smaller than required_chars" in said:
            raise DataError(
                f"a text vocabulary of {settings['vocab_size']} has no room for the characters of the text",
                where="TextConfig.size",
                expected=said.rpartition("required_chars.")[2].strip() or "a larger one",
                mend="raise TextConfig.size",
            ) from None
        raise DataError(f"no text vocabulary could be trained: {said.strip()}", where="items and queries") from None
    return out.getvalue()


def load_text(path: str | os.PathLike[str], size: int) -> TextVocab | TokenizerJson:
    """The vocabulary of a prepared folder's `text.model`, whichever of the two kinds it is."""
    model = Path(path).read_bytes()
    return TokenizerJson(model, size) if is_json(model) else TextVocab(model, size)


def is_json(model: bytes) -> bool:
    """Whether this is the file of a Hugging Face tokenizer, and not that of a SentencePiece model."""
    return model.lstrip()[:1] == b"{"


def _chosen(texts: Iterable[str]) -> Sequence[str]:
    """Every text once, in an order that is theirs alone; at most `MAX_TEXTS`."""
    different = sorted({" ".join(text.split()) for text in texts} - {""})
    if len(different) <= MAX_TEXTS:
        return different
    taken = np.argpartition(stable_hash(different), MAX_TEXTS)[:MAX_TEXTS]
    return [different[k] for k in np.sort(taken)]


def _processor(model: bytes, where: str = "") -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError, TypeError):
        raise DataError(
            "this is not a SentencePiece model", where=where, expected="a file such as text.model"
        ) from None
