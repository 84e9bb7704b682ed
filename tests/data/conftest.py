from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recjax.data.examples import Examples, write_examples
from recjax.data.record import Column, Field
from recjax.data.vocab import ItemVocab


@pytest.fixture(scope="session")
def train_examples(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[int]], Examples]:
    """Examples of these lengths; all items are different rows, from row 2 on, and a time is 10 times a row."""
    vocab = ItemVocab.from_counts(list(range(200_000)), [1] * 200_000)

    def write(lengths: list[int]) -> Examples:
        path: Path = tmp_path_factory.mktemp("prepared") / "examples"
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        items = np.arange(2, 2 + offsets[-1], dtype=np.int32)
        schema = [Field(name="user_index", dtype="int64", rank=0), Field(name="items", dtype="int32", rank=1)]
        schema.append(Field(name="times", dtype="int64", rank=1))
        columns = {
            "user_index": Column(np.arange(len(lengths)) * 3),  # not the number of the example
            "items": Column(items, offsets),
            "times": Column(items.astype(np.int64) * 10, offsets),
        }
        frame = pl.DataFrame({"row": [2], "item_id": [0], "train_count": [1]})
        with write_examples(path, vocab=vocab, items=frame, users=frame, facts={"content_hash": "x"}) as writer:
            writer.add("train", schema, columns)
        return Examples.open(path)

    return write
