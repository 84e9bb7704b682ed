"""Semantic ids as an artifact: a short tuple of codes for every item, and the books that the codes point into.

Whoever makes the codes (an RQ-VAE, residual k-means, a file of someone else's), what later stages read is this: one
row of small numbers for each item, no two alike. Items whose content has the same codes are told apart by a last
level that numbers them; a catalogue that grew keeps the codes of the items it had (`extend`). It computes no codes
from vectors: that is `recjax.quantise`.

    codes        int32 [num_items, levels], in the order of the rows of the vocabulary
    sizes        int32 [levels]: how many codes a level has
    item_ids     text [num_items]
    codebooks    float32 [content levels, size, width], where they are known
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recjax.core.artifact import read_artifact, write_artifact
from recjax.core.errors import ArtifactError, DataError
from recjax.data.spread import spread
from recjax.data.vocab import ItemVocab, stable_hash

KIND = "codes"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Codes:
    """Codes of a catalogue.

    `codes` int32 [num_items, levels]: row i is that of the item in row FIRST_ITEM + i of the vocabulary, no two are
    alike, and those of level l are below `sizes[l]`. With `numbered` the last level numbers the items that share all
    others (0 for an item alone). `item_ids` are the items' ids as text, `codebooks` [content levels, size, width].
    Raises `DataError` for codes out of range or twice the same.
    """

    codes: np.ndarray
    sizes: tuple[int, ...]
    item_ids: tuple[str, ...]
    vocabulary_hash: str = ""
    numbered: bool = True
    codebooks: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", np.ascontiguousarray(self.codes, np.int32))
        if self.codes.shape != (len(self.item_ids), len(self.sizes)):
            raise DataError(
                f"codes of shape {list(self.codes.shape)}",
                expected=f"[{len(self.item_ids)} items, {len(self.sizes)} levels]",
            )
        beyond = (self.codes < 0) | (self.codes >= np.asarray(self.sizes, np.int32))
        if beyond.any():
            item, level = np.argwhere(beyond)[0]
            raise DataError(
                f"the item {self.item_ids[item]!r} has code {self.codes[item, level]} at level {level}",
                expected=f"0 to {self.sizes[level] - 1}",
            )
        groups = groups_of(self.codes)
        if groups.max(initial=0) + 1 < len(groups):
            item = int(np.argmax(np.bincount(groups)[groups] > 1))
            twins = [self.item_ids[i] for i in np.flatnonzero(groups == groups[item])[:5]]
            raise DataError(
                f"items share the codes {self.codes[item].tolist()}: {', '.join(twins)}",
                expected="codes of their own for every item",
                mend="ask for a level that numbers them (collisions above 0)",
            )

    @property
    def levels(self) -> int:
        """How many codes spell an item, the number of a collision included."""
        return len(self.sizes)

    @property
    def content(self) -> np.ndarray:
        """int32 [num_items, content levels]: the codes that come from content, which items may share."""
        return self.codes[:, :-1] if self.numbered else self.codes

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits of the vocabulary, the sizes and every code: the same whenever the codes are."""
        digest = hashlib.sha256(f"codes\n{self.vocabulary_hash}\n{self.sizes}\n".encode())
        digest.update(self.codes.astype("<i4").tobytes())
        return digest.hexdigest()[:16]


def tell_apart(
    vocab: ItemVocab, content: np.ndarray, books: np.ndarray, *, collisions: int, left: np.ndarray | None = None
) -> Codes:
    """`Codes` from the content codes [num_items, levels] of a vocabulary, which point into `books` [levels, size, d].

    A last level of `collisions` codes numbers items with the same content codes, in the order of a hash of their ids,
    which says nothing about the items. With 0 there is no such level, and colliding items are spread over other
    codes of the last one (`spread`), where `left` says what the levels before it left of them. Raises `DataError`
    where that is not enough.
    """
    facts = {"vocabulary_hash": vocab.hash, "numbered": collisions > 0, "codebooks": books}
    sizes = (books.shape[1],) * books.shape[0]
    if not collisions:
        content = content if left is None else spread(content, left, books[-1])
        return Codes(codes=content, sizes=sizes, item_ids=vocab.ids, **facts)
    numbers = _numbers(content, vocab.ids, np.full(len(content), -1, np.int64))
    return _numbered(vocab, content, numbers, (*sizes, collisions), **facts)


def extend(old: Codes, vocab: ItemVocab, content: np.ndarray, left: np.ndarray | None = None) -> Codes:
    """Codes for a vocabulary that has other items as well: whoever had codes keeps them.

    `content` [num_items, content levels] are the content codes of the items of `vocab`; those of items that `old`
    knows are not looked at. New items are numbered after the old ones of their group, also after such as are no
    longer there; without numbers they are spread over the codes that are free (`spread`, which reads `left`).
    Raises `DataError` when the last level is too small for that.
    """
    place = {item: i for i, item in enumerate(old.item_ids)}
    at = np.asarray([place.get(item, -1) for item in vocab.ids], np.int64)
    content = np.where((at >= 0)[:, None], old.content[at], content)
    facts = {"vocabulary_hash": vocab.hash, "numbered": old.numbered, "codebooks": old.codebooks}
    if not old.numbered:
        if left is not None and old.codebooks is not None:
            content = spread(content, left, old.codebooks[-1], fixed=at >= 0)
        return Codes(codes=content, sizes=old.sizes, item_ids=vocab.ids, **facts)
    gone = np.setdiff1d(np.arange(len(old.item_ids)), at)
    taken = np.concatenate([np.where(at >= 0, old.codes[at, -1], -1), old.codes[gone, -1]])
    numbers = _numbers(np.concatenate([content, old.content[gone]]), vocab.ids, taken)
    return _numbered(vocab, content, numbers[: len(at)], old.sizes, **facts)


def write_codes(
    path: str | os.PathLike[str],
    codes: Codes,
    *,
    recipe: str = "",
    step: int = 0,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write an artifact of kind "codes" at `path`; its manifest holds the `report` too. `path` must not exist."""
    arrays = {
        "codes": codes.codes,
        "sizes": np.asarray(codes.sizes, np.int32),
        "item_ids": np.asarray(codes.item_ids, np.str_),
    }
    if codes.codebooks is not None:
        arrays["codebooks"] = codes.codebooks
    facts = {"numbered": codes.numbered, "codes_hash": codes.hash, "report": report(codes), **(about or {})}
    write_artifact(
        path, arrays, kind=KIND, recipe=recipe, step=step, vocabulary_hash=codes.vocabulary_hash, about=facts
    )


def read_codes(path: str | os.PathLike[str], *, vocabulary_hash: str = "") -> Codes:
    """The codes at `path`; raises `ArtifactError` when they are missing, damaged or of another vocabulary."""
    artifact = read_artifact(path, kind=KIND, vocabulary_hash=vocabulary_hash)
    try:
        return Codes(
            codes=np.asarray(artifact["codes"]),
            sizes=tuple(np.asarray(artifact["sizes"]).tolist()),
            item_ids=tuple(np.asarray(artifact["item_ids"]).tolist()),
            vocabulary_hash=artifact.manifest["vocabulary_hash"],
            numbered=artifact.manifest["about"]["numbered"],
            codebooks=np.asarray(artifact["codebooks"]) if "codebooks" in artifact else None,
        )
    except (DataError, KeyError) as error:
        raise ArtifactError(f"these are no codes: {error}", where=str(path), mend="make them again") from error


def report(codes: Codes) -> dict[str, Any]:
    """How well the codes of a catalogue are used: the `statistics` of their content codes."""
    return statistics(codes.content, codes.sizes[0])


def statistics(content: np.ndarray, size: int) -> dict[str, Any]:
    """What content codes [items, levels], each below `size`, say of a quantiser.

    For each level the codes in use and their perplexity exp(H), H the entropy over items; `distinct` tuples over
    items, `alone` the share of items that share theirs with nobody, `largest` group of sharers.
    """
    shared = np.bincount(groups_of(content))
    levels = []
    for level in range(content.shape[1]):
        count = np.bincount(content[:, level], minlength=size)
        share = count[count > 0] / max(count.sum(), 1)
        perplexity = float(np.exp(-(share * np.log(share)).sum()))
        levels.append({"size": size, "used": int((count > 0).sum()), "perplexity": round(perplexity, 2)})
    return {
        "items": len(content),
        "levels": levels,
        "distinct": round(len(shared) / max(len(content), 1), 5),
        "alone": round(int((shared == 1).sum()) / max(len(content), 1), 5),
        "largest": int(shared.max(initial=0)),
    }


def groups_of(codes: np.ndarray) -> np.ndarray:
    """int64 [n]: equal numbers, from 0 on, for equal rows of `codes` [n, levels]."""
    return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)


def _numbered(
    vocab: ItemVocab, content: np.ndarray, numbers: np.ndarray, sizes: tuple[int, ...], **facts: Any
) -> Codes:
    """Raises `DataError` when a number does not fit the last level."""
    if numbers.max(initial=0) >= sizes[-1]:
        worst = int(numbers.argmax())
        raise DataError(
            f"{numbers[worst] + 1:,} items have the content codes {content[worst].tolist()}",
            where=f"among them the item {vocab.ids[worst]!r}",
            expected=f"at most {sizes[-1]}, the codes of the last level",
            mend="take more levels or larger codebooks, raise collisions, or give better content vectors "
            "(items without any all share one group)",
        )
    return Codes(codes=np.concatenate([content, numbers[:, None]], axis=1), sizes=sizes, item_ids=vocab.ids, **facts)


def _numbers(content: np.ndarray, ids: Sequence[str], taken: np.ndarray) -> np.ndarray:
    """int64 [n]: the number of each row of `content` in its group; `taken` [n] are those given before, or -1.

    New ones follow the largest of their group, by the hash of `ids`. Rows beyond `ids` only take numbers.
    """
    groups, numbers = groups_of(content), taken.copy()
    following = np.zeros(groups.max(initial=-1) + 1, np.int64)
    np.maximum.at(following, groups, taken + 1)
    new = np.flatnonzero(taken < 0)
    known = np.asarray(ids, np.str_)[new]
    by_hash = new[np.lexsort((known, stable_hash(known), groups[new]))]
    group = groups[by_hash]
    first = np.searchsorted(group, group, side="left")
    numbers[by_hash] = following[group] + np.arange(len(group)) - first
    return numbers
