"""Item ids and table rows: which row of an embedding table stands for which item.

Row 0 is padding, row 1 is every unknown item, and the items start at row 2. A vocabulary is frozen: once built, an
item keeps its row, and the content hash travels with examples, checkpoints and bundles so that a model is never
served with another numbering. Numpy and the standard library only, because servers load this file too. It refuses to
count interactions or to look at data: callers pass ids and counts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recjax.core.errors import DataError, ExamplesError

PAD = 0
OOV = 1
FIRST_ITEM = 2
ROW_MULTIPLE = 128
_FORMAT = "recjax.vocab/1"


def rows_for(num_items: int) -> int:
    """Number of table rows for `num_items` items: `FIRST_ITEM + num_items` rounded up to a multiple of 128."""
    return -(-(FIRST_ITEM + num_items) // ROW_MULTIPLE) * ROW_MULTIPLE


def stable_hash(ids: Any) -> np.ndarray:
    """uint64 [n]: the first 8 bytes of BLAKE2b over each id written as UTF-8 text.

    The same on every machine and Python; the id 12 and the id "12" have the same hash.
    """
    texts = [str(i).encode() for i in _as_list(ids)]
    digests = b"".join(hashlib.blake2b(t, digest_size=8).digest() for t in texts)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _as_list(ids: Any) -> list:
    return ids.tolist() if isinstance(ids, np.ndarray) else (ids.to_list() if hasattr(ids, "to_list") else list(ids))


def _valid_rows(num_items: int) -> np.ndarray:
    valid = np.zeros(rows_for(num_items), bool)
    valid[FIRST_ITEM : FIRST_ITEM + num_items] = True
    return valid


@dataclass(frozen=True)
class ItemVocab:
    """Frozen mapping between item ids and rows; `ids[k]` has row `FIRST_ITEM + k`.

    `ids` are kept as text; `dtype` ("int" or "str") says what `decode` gives back. Rows from
    `FIRST_ITEM + num_items` up to `num_rows` only fill the table and never stand for an item.
    """

    ids: tuple[str, ...]
    dtype: str = "str"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(str(i) for i in self.ids))
        if self.dtype not in ("int", "str"):
            raise ValueError(f'dtype is "int" or "str", not {self.dtype!r}')
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("an item id occurs twice in a vocabulary")

    @classmethod
    def from_counts(cls, ids: Any, counts: Any) -> ItemVocab:
        """Vocabulary in the order (most train interactions first, then id; integer ids by value)."""
        ids, counts = _as_list(ids), np.asarray(counts, np.int64)
        if len(ids) != len(counts):
            raise ValueError(f"{len(ids)} ids but {len(counts)} counts")
        is_int = len(ids) > 0 and all(isinstance(i, (int, np.integer)) for i in ids)
        keys = [int(i) for i in ids] if is_int else [str(i) for i in ids]
        by_id = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
        order = by_id[np.argsort(-counts[by_id], kind="stable")].tolist()
        return cls(tuple(str(keys[k]) for k in order), "int" if is_int else "str")

    @property
    def num_items(self) -> int:
        return len(self.ids)

    @property
    def num_rows(self) -> int:
        """Rows of a table for this vocabulary, padding, unknown and filling rows included."""
        return rows_for(self.num_items)

    @property
    def valid(self) -> np.ndarray:
        """bool [num_rows]: which rows stand for an item."""
        return _valid_rows(self.num_items)

    @functools.cached_property
    def hash(self) -> str:
        """16 hexadecimal digits of the SHA-256 of kind, dtype and ids in row order."""
        digest = hashlib.sha256(f"items\n{self.dtype}\n".encode())
        digest.update(b"".join(b"%d:" % len(b) + b for b in (i.encode() for i in self.ids)))
        return digest.hexdigest()[:16]

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {item: FIRST_ITEM + k for k, item in enumerate(self.ids)}

    @functools.cached_property
    def _sorted_ints(self) -> tuple[np.ndarray, np.ndarray]:
        values = np.array([int(i) for i in self.ids], np.int64)
        order = np.argsort(values)
        return values[order], (order + FIRST_ITEM).astype(np.int32)

    def encode(self, ids: Any) -> np.ndarray:
        """int32 [n]: the row of each id, `OOV` where the id is unknown or missing.

        Takes a list, a numpy array or a polars column. Ids are compared as text, so 12 and "12" are the same item.
        """
        if hasattr(ids, "to_numpy") and getattr(ids, "null_count", lambda: 1)() == 0:
            ids = ids.to_numpy()
        if self.dtype == "int" and isinstance(ids, np.ndarray) and ids.dtype.kind == "i" and self.ids:
            values, rows = self._sorted_ints
            at = np.minimum(np.searchsorted(values, ids), len(values) - 1)
            return np.where(values[at] == ids, rows[at], np.int32(OOV)).astype(np.int32)
        row_of, ids = self._row_of, _as_list(ids)
        return np.fromiter((OOV if i is None else row_of.get(str(i), OOV) for i in ids), np.int32, len(ids))

    def decode(self, rows: Any) -> list[int | str | None]:
        """The ids of the rows, as the integers or text they were; None for padding, unknown and filling rows."""
        rows = np.asarray(rows, np.int64).ravel()
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_rows):
            raise IndexError(f"rows must lie in [0, {self.num_rows})")
        last = FIRST_ITEM + self.num_items
        ids: list[Any] = [self.ids[r - FIRST_ITEM] if FIRST_ITEM <= r < last else None for r in rows.tolist()]
        return [None if i is None else int(i) for i in ids] if self.dtype == "int" else ids

    def save(self, path: str | os.PathLike) -> None:
        """Write one JSON file, beside and then renamed."""
        _write_json(path, {"kind": "items", "dtype": self.dtype, "hash": self.hash, "ids": self.ids})

    @classmethod
    def load(cls, path: str | os.PathLike) -> ItemVocab:
        """Read what `save` wrote. Raises `ExamplesError` when it is damaged or of another kind."""
        vocab = load_vocab(path)
        if not isinstance(vocab, cls):
            raise ExamplesError(
                "the vocabulary has hashed rows", where=str(path), expected="a vocabulary of listed items"
            )
        return vocab


@dataclass(frozen=True)
class HashVocab:
    """Rows by hash, for ids without end (users, pages, queries): `FIRST_ITEM + stable_hash(id) % num_buckets`.

    Nothing is stored per id and nothing is unknown; different ids may share a row. Same interface as `ItemVocab`,
    except that rows cannot be turned back into ids.
    """

    num_buckets: int

    def __post_init__(self) -> None:
        if self.num_buckets < 1:
            raise ValueError("num_buckets must be at least 1")

    @property
    def num_items(self) -> int:
        return self.num_buckets

    @property
    def num_rows(self) -> int:
        """Rows of a table for this vocabulary, padding, unknown and filling rows included."""
        return rows_for(self.num_buckets)

    @property
    def valid(self) -> np.ndarray:
        """bool [num_rows]: which rows an id can have."""
        return _valid_rows(self.num_buckets)

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of the SHA-256 of kind and number of buckets."""
        return hashlib.sha256(f"hashed\n{self.num_buckets}\n".encode()).hexdigest()[:16]

    def encode(self, ids: Any) -> np.ndarray:
        """int32 [n]: the bucket's row of each id, `OOV` where the id is None."""
        ids = _as_list(ids)
        unique = list(dict.fromkeys(i for i in ids if i is not None))
        rows = FIRST_ITEM + (stable_hash(unique) % np.uint64(self.num_buckets)).astype(np.int64)
        row_of: dict[Any, int] = dict(zip(unique, rows.tolist(), strict=True))
        return np.fromiter((row_of.get(i, OOV) for i in ids), np.int32, len(ids))

    def decode(self, rows: Any) -> list[int | str | None]:
        """Always raises `DataError`: several ids may share a row."""
        raise DataError(
            "hashed rows cannot be turned back into ids",
            where=f"vocabulary of {self.num_buckets} buckets",
            expected="a vocabulary of listed items (ItemVocab)",
            mend="use ItemVocab for whatever is to be recommended; hash only what is looked up",
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write one JSON file, beside and then renamed."""
        _write_json(path, {"kind": "hashed", "num_buckets": self.num_buckets, "hash": self.hash})


Vocab = ItemVocab | HashVocab


def _write_json(path: str | os.PathLike, content: dict) -> None:
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps({"format": _FORMAT, **content}, ensure_ascii=False), encoding="utf-8")
    os.replace(beside, path)


def load_vocab(path: str | os.PathLike) -> Vocab:
    """Read a vocabulary of either kind; its content must have the hash it was saved with (else `ExamplesError`)."""
    mend = "prepare the examples again, or copy the file again from where it was made"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExamplesError("the vocabulary is missing", where=str(path), mend=mend) from None
    except (ValueError, OSError) as e:
        raise ExamplesError(f"the vocabulary cannot be read: {e}", where=str(path), mend=mend) from None
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != _FORMAT:
        raise ExamplesError(f"unknown vocabulary format {found!r}", where=str(path), expected=_FORMAT, mend=mend)
    try:
        if content["kind"] == "hashed":
            vocab: Vocab = HashVocab(int(content["num_buckets"]))
        else:
            vocab = ItemVocab(_text_ids(content["ids"]), content["dtype"])
        stored = content["hash"]
    except (KeyError, TypeError, ValueError) as e:
        raise ExamplesError(f"the vocabulary is damaged: {e!r}", where=str(path), mend=mend) from None
    if vocab.hash != stored:
        raise ExamplesError(
            f"the vocabulary was changed: its content has hash {vocab.hash}",
            where=str(path),
            expected=stored,
            mend=mend,
        )
    return vocab


def _text_ids(ids: Sequence[Any]) -> tuple[str, ...]:
    if not all(isinstance(i, str) for i in ids):
        raise TypeError("ids must be text")
    return tuple(ids)
