import json
import shutil
from pathlib import Path

import grain
import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ExamplesError
from recjax.core.folder import hash_of
from recjax.data.examples import Examples, write_examples
from recjax.data.record import Column, Field
from recjax.data.shards import DiskSource, MemorySource
from recjax.data.vocab import FIRST_ITEM, ItemVocab

SCHEMA = (
    Field(name="user_index", dtype="int64", rank=0),
    Field(name="items", dtype="int32", rank=1),
    Field(name="times", dtype="int64", rank=1),
)
VOCAB = ItemVocab.from_counts([10, 20, 30], [5, 9, 0])


def columns(seed: int, count: int) -> dict[str, Column]:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], rng.integers(0, 30, count).cumsum()])
    return {
        "user_index": Column(np.arange(count)),
        "items": Column(rng.integers(2, 5, offsets[-1]).astype(np.int32), offsets),
        "times": Column(rng.integers(0, 2**40, offsets[-1]), offsets),
    }


def write(path: Path, *, shard_bytes: int = 10_000, parts: int = 3) -> list[dict[str, Column]]:
    written = [columns(k, 40) for k in range(parts)]
    items = pl.DataFrame(
        {"row": [2, 3, 4], "item_id": [20, 10, 30], "train_count": [9, 5, 0], "title": ["b", None, "c"]}
    )
    users = pl.DataFrame({"user_index": [0, 1], "user_id": ["x", "y"]})
    facts = {"content_hash": "abc", "task": "next_item"}
    with write_examples(path, vocab=VOCAB, items=items, users=users, facts=facts, shard_bytes=shard_bytes) as writer:
        for part in written:
            writer.add("train", SCHEMA, part)
        writer.add("test", SCHEMA, columns(0, 0))
    return written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "prepared")
    return tmp_path / "prepared"


def test_memory_and_disk_give_back_what_was_written(tmp_path: Path) -> None:
    written = write(tmp_path / "prepared")
    examples = Examples.open(tmp_path / "prepared", verify=True)
    assert len(examples.manifest["splits"]["train"]["shards"]) > 1
    assert examples.manifest["splits"]["train"]["shards"][0].startswith("train-00000-of-0000")
    memory, disk = examples.source("train"), examples.source("train", memory_bytes=0)
    assert isinstance(memory, MemorySource) and isinstance(disk, DiskSource)
    assert len(memory) == len(disk) == 120
    for k in range(120):
        part, i = written[k // 40], k % 40
        for one in (memory[k], disk[k]):
            assert list(one) == ["user_index", "items", "times"]
            for name in one:
                np.testing.assert_array_equal(one[name], part[name][i])
                assert one[name].dtype == part[name].values.dtype
        assert memory.lengths[k] == len(part["items"][i])
    for source in (memory, disk):
        for number in (-1, 120):
            with pytest.raises(IndexError):
                source[number]
        many = source.__getitems__([7, 3, 119])
        np.testing.assert_array_equal(many[2]["items"], written[2]["items"][39])


def test_reading_many_at_once_is_reading_each(folder: Path) -> None:
    examples = Examples.open(folder)
    indices = np.array([119, 0, 55, 55, 41])
    for source in (examples.source("train"), examples.source("train", memory_bytes=0)):
        for asked in (indices, indices[:0]):
            found = source.read(asked, ["items", "times", "user_index"])
            for name, (values, starts) in found.items():
                assert len(starts) == len(asked)
                for start, index in zip(starts, asked, strict=True):
                    one = source[index][name]
                    np.testing.assert_array_equal(
                        values[start] if one.ndim == 0 else values[start : start + len(one)], one
                    )


def test_sources_feed_grain(folder: Path) -> None:
    source = Examples.open(folder).source("train")
    dataset = grain.MapDataset.source(source).shuffle(seed=1)
    assert sorted(int(dataset[k]["user_index"]) for k in range(len(dataset))) == sorted(list(range(40)) * 3)


def test_the_catalogue_is_read_by_row(folder: Path) -> None:
    examples = Examples.open(folder)
    assert examples.vocab == VOCAB
    assert examples.item_count.shape == (VOCAB.num_rows,) and examples.item_count.dtype == np.float32
    assert examples.item_count[:6].tolist() == [0, 0, 9, 5, 0, 0]
    assert examples.titles()[FIRST_ITEM : FIRST_ITEM + 3] == ["b", None, "c"]
    assert examples.user_ids() == ["x", "y"]
    assert examples.hash == "abc"


def test_a_split_may_be_empty(folder: Path) -> None:
    examples = Examples.open(folder)
    assert len(examples.source("test")) == 0
    assert examples.splits == ("train", "test")
    with pytest.raises(ExamplesError, match="no split 'valid'"):
        examples.source("valid")


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def alter_manifest(folder: Path, **fields: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.update(fields)
    manifest["manifest_hash"] = hash_of({k: v for k, v in manifest.items() if k != "manifest_hash"})
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "there is no folder of prepared examples"),
        (lambda f: (f / "manifest.json").unlink(), "there is no folder of prepared examples"),
        (lambda f: shorten(f / "manifest.json"), "cannot read the manifest"),
        (lambda f: alter_manifest(f, format=0), "has format 0"),
        (lambda f: shorten(next(f.glob("train-00001*"))), "train-00001-of-.* has .* bytes"),
        (lambda f: next(f.glob("train-00000*")).unlink(), "train-00000-of-.* is missing"),
        (lambda f: shorten(f / "vocabulary.json"), "vocabulary.json has .* bytes"),
    ],
)
def test_damage_is_told(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(ExamplesError, match=message):
        Examples.open(folder)


def test_altered_bytes_of_a_shard_are_told_when_read(folder: Path) -> None:
    shard = next(folder.glob("train-00001*"))
    data = bytearray(shard.read_bytes())
    for k in range(len(data) // 2, len(data) // 2 + 40):
        data[k] ^= 0xFF
    shard.write_bytes(bytes(data))
    examples = Examples.open(folder)
    with pytest.raises(ExamplesError, match="cannot be read"):
        examples.source("train")
    disk = examples.source("train", memory_bytes=0)
    with pytest.raises(ExamplesError, match="cannot be read"):
        disk.__getitems__(range(len(disk)))
    with pytest.raises(ExamplesError, match="was altered"):
        Examples.open(folder, verify=True)


def test_nothing_is_left_of_a_folder_whose_writing_failed(tmp_path: Path) -> None:
    items = pl.DataFrame({"row": [2], "item_id": [20], "train_count": [9]})
    with pytest.raises(RuntimeError, match="stop"):
        with write_examples(tmp_path / "x", vocab=VOCAB, items=items, users=items, facts={}) as writer:
            writer.add("train", SCHEMA, columns(0, 40))
            raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ExamplesError, match="will not overwrite"):
        write(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
