"""A prepared folder: examples, vocabulary, catalogue and the manifest that says what they are.

    manifest.json                             what, from what, how split, how many, sizes and checksums of all files
    vocabulary.json                           item ids <-> rows
    items.parquet                             row, item_id, train_count and, when there are titles, title: for people
    item_count.npy, titles.json               the same by row: for programs
    users.parquet                             user_index, user_id
    text.model                                the text vocabulary of tasks with text (see `text.py`)
    features.json, features.npz               the fields of a ranker (see `ranker_features.py`)
    <split>-00000-of-0000N.arrayrecord        the examples (see `record.py` and the schema in the manifest)
    <split>-lengths.npy                       int32: how many items each example has

`write_examples` makes such a folder whole or not at all; `Examples.open` reads it, and needs neither TensorFlow nor
(but for `user_ids`) polars, because training machines may have neither. It knows nothing of tasks, and never repairs:
what is missing, shortened, altered or of another format is an `ExamplesError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recjax.core.errors import ExamplesError
from recjax.core.folder import check_files, new_folder, read_manifest, write_manifest
from recjax.data.record import Field, RawColumns, Schema
from recjax.data.shards import SHARD_BYTES, DiskSource, ExampleSource, ShardWriter, read_all
from recjax.data.text import Tokenizer, load_text
from recjax.data.vocab import ItemVocab

FORMAT = 3
MEMORY_BYTES = 2 * 2**30
_WHAT = "folder of prepared examples"
_TEXT = "text.model"


class ExamplesWriter:
    """Collects the parts of a prepared folder; made by `write_examples`."""

    def __init__(self, folder: Path, *, shard_bytes: int) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._splits: dict[str, tuple[ShardWriter, Schema, list[np.ndarray]]] = {}

    def add(self, split: str, schema: Schema, columns: RawColumns) -> None:
        """Append examples to a split; the schema must be the same each time and have a list field `items`."""
        if split not in self._splits:
            self._splits[split] = ShardWriter(self._folder, split, schema, shard_bytes=self._shard_bytes), schema, []
        writer, _, lengths = self._splits[split]
        writer.add(columns)
        lengths.append(columns["items"].lengths.astype(np.int32))

    def examples(self, split: str) -> int:
        """How many examples the split has by now."""
        return self._splits[split][0].examples

    def close(self) -> dict[str, dict[str, Any]]:
        """Finish all files; split -> what the manifest says about it."""
        told = {}
        for split, (writer, schema, lengths) in self._splits.items():
            all_lengths = np.concatenate([np.empty(0, np.int32), *lengths])
            np.save(self._folder / f"{split}-lengths.npy", all_lengths)
            told[split] = {
                "examples": writer.examples,
                "items": int(all_lengths.sum(dtype=np.int64)),
                "bytes": writer.nbytes,
                "shards": writer.close(),
                "schema": [dataclasses.asdict(field) for field in schema],
            }
        return told


@contextlib.contextmanager
def write_examples(
    path: str | os.PathLike[str],
    *,
    vocab: ItemVocab,
    items: Any,
    users: Any,
    facts: Mapping[str, Any],
    text: Tokenizer | None = None,
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[ExamplesWriter]:
    """Write a prepared folder, which appears when the block ends well; raises `ExamplesError` when `path` exists.

    `items` and `users` are the polars frames to keep, `files` what else there is to keep, by name; `facts` is what the
    manifest says besides what is counted here, and may be added to meanwhile.
    """
    with new_folder(path, error=ExamplesError) as folder:
        writer = ExamplesWriter(folder, shard_bytes=shard_bytes)
        try:
            yield writer
        finally:
            splits = writer.close()
        vocab.save(folder / "vocabulary.json")
        _write_catalogue(folder, items, vocab.num_rows)
        users.write_parquet(folder / "users.parquet")
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content)
        sizes = {"vocabulary_hash": vocab.hash, "num_items": vocab.num_items, "num_rows": vocab.num_rows}
        if text is not None:
            (folder / _TEXT).write_bytes(text.model)
            sizes |= {"text_hash": text.hash, "text_size": text.size}
        write_manifest(folder, {"format": FORMAT, **facts, **sizes, "splits": splits})


@dataclasses.dataclass(frozen=True)
class Examples:
    """A checked prepared folder."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> Examples:
        """Raises `ExamplesError` when the folder is missing or damaged.

        Shards carry checksums of their own, which are compared when they are read; `verify` reads every byte now.
        """
        folder = Path(path)
        manifest = read_manifest(folder, format_version=FORMAT, what=_WHAT, error=ExamplesError)
        check_files(folder, manifest, verify=verify, error=ExamplesError)
        small = {name: file for name, file in manifest["files"].items() if not name.endswith(".arrayrecord")}
        check_files(folder, {"files": small}, verify=True, error=ExamplesError)
        return cls(folder, manifest)

    @property
    def hash(self) -> str:
        """Hexadecimal digits that are the same for the same task, data and format, whenever prepared."""
        return self.manifest["content_hash"]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest["splits"])

    @functools.cached_property
    def vocab(self) -> ItemVocab:
        return ItemVocab.load(self.path / "vocabulary.json")

    @functools.cached_property
    def text_vocab(self) -> Tokenizer | None:
        """The vocabulary of the field `text`; None where the examples have no text."""
        return load_text(self.path / _TEXT, self.manifest["text_size"]) if "text_hash" in self.manifest else None

    def query_ids(self, query: str) -> np.ndarray:
        """int32 [n]: a query as the field `text` spells it, prompt and all. Raises `ExamplesError` without text."""
        if self.text_vocab is None:
            raise _no_text(self.path)
        return self.text_vocab.encode(self.manifest.get("prompt", "") + query)

    def query_text(self, ids: np.ndarray) -> str:
        """The query that the field `text` spells, without the prompt and as the text model normalises it."""
        if self.text_vocab is None:
            raise _no_text(self.path)
        prompt = self.text_vocab.decode(self.text_vocab.encode(self.manifest.get("prompt", "")))
        return self.text_vocab.decode(ids).removeprefix(prompt).strip()

    @functools.cached_property
    def item_count(self) -> np.ndarray:
        """float32 [num_rows]: how often each row occurs in the training events; 0 for padding and unknown."""
        return np.load(self.path / "item_count.npy", allow_pickle=False)

    def titles(self) -> list[str | None]:
        """The title of each row, None where there is none."""
        return json.loads((self.path / "titles.json").read_text(encoding="utf-8"))

    def user_ids(self) -> list[int | str]:
        """The user id of each `user_index`."""
        import polars as pl

        return pl.read_parquet(self.path / "users.parquet").get_column("user_id").to_list()

    def count(self, split: str) -> int:
        """How many examples a split has."""
        return self._split(split)["examples"]

    def schema(self, split: str) -> tuple[Field, ...]:
        """The fields of the examples of a split."""
        return tuple(Field(**f) for f in self._split(split)["schema"])

    def source(self, split: str, *, memory_bytes: int = MEMORY_BYTES) -> ExampleSource:
        """The examples of a split by number, decoded in memory when they fit in `memory_bytes`, else read from disk."""
        told, schema = self._split(split), self.schema(split)
        lengths = np.load(self.path / f"{split}-lengths.npy", allow_pickle=False)
        paths = [self.path / name for name in told["shards"]]
        if told["bytes"] > memory_bytes:
            return DiskSource(paths, schema, lengths)
        return read_all(paths, schema, lengths)

    def _split(self, split: str) -> Mapping[str, Any]:
        if split not in self.manifest["splits"]:
            raise ExamplesError(
                f"there is no split {split!r}", where=str(self.path), expected=f"one of: {', '.join(self.splits)}"
            )
        return self.manifest["splits"][split]


def _no_text(path: Path) -> ExamplesError:
    return ExamplesError(
        "these examples have no text vocabulary", where=str(path), expected="examples of a search task"
    )


def _write_catalogue(folder: Path, items: Any, num_rows: int) -> None:
    rows = items["row"].to_numpy()
    count = np.zeros(num_rows, np.float32)
    count[rows] = items["train_count"].to_numpy()
    titles: list[str | None] = [None] * num_rows
    if "title" in items.columns:
        for row, title in zip(rows.tolist(), items["title"].to_list(), strict=True):
            titles[row] = title
    items.write_parquet(folder / "items.parquet")
    np.save(folder / "item_count.npy", count)
    (folder / "titles.json").write_text(json.dumps(titles, ensure_ascii=False), encoding="utf-8")
