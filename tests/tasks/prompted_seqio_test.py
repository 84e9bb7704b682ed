"""Tasks in words as seqio sees them, and through `recjax prepare`, with either kind of tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recjax.data.examples import Examples
from recjax.data.sources import DataDir, World
from recjax.data.text import Tokenizer
from recjax.data.text_json import TokenizerJson
from recjax.prepare import prepare
from recjax.prompts.tokenizer import TokenizerConfig, vocabulary_of
from recjax.prompts.writer import Budget
from recjax.tasks import seqio_bridge
from recjax.tasks.documents import Documents
from recjax.tasks.mixtures import Mixture
from recjax.tasks.prompted import Prompted, Told, Wording
from recjax.tasks.prompted_conversations import Conversations, Instructions
from recjax.tasks.prompted_ranking import GenreAffinity, Relevance, WatchNext
from recjax.tasks.work import columns_of, examples_of

DATA = DataDir(simulate=World(num_events=800))
COMMON: dict[str, Any] = {"told": Told(data=DATA, wording=Wording(tokenizer=TokenizerConfig(size=700)))}
SHORT = Budget(length=400)


def columns(work: Any, split: str) -> dict[str, np.ndarray]:
    found = columns_of(list(examples_of(work, split)), work.schemas[split])
    return _flat([found], [field.name for field in work.schemas[split]])


def _flat(parts: list[Any], names: list[str]) -> dict[str, np.ndarray]:
    found = {}
    for name in names:
        found[name] = np.concatenate([part[name].values for part in parts])
        if parts[0][name].offsets is not None:
            found[f"{name} lengths"] = np.concatenate([part[name].lengths for part in parts])
    return found


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "task",
    [
        Documents(**COMMON),
        Conversations(**COMMON, budget=SHORT, negatives=1),
        Instructions(**COMMON),
        WatchNext(**COMMON, budget=SHORT),
        GenreAffinity(**COMMON, budget=SHORT, mask=False, together=2),
        Relevance(**COMMON),
    ],
    ids=lambda task: task.name,
)
def test_seqio_and_numpy_give_the_same_examples(task: Prompted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seqio_bridge, "_AT_ONCE", 64)
    work: Any = task.work()  # type: ignore[attr-defined]
    converted = seqio_bridge.seqio_task(work)
    for split, schema in work.schemas.items():
        parts = list(seqio_bridge.materialise(converted, split))
        found, expected = _flat(parts, [field.name for field in schema]), columns(work, split)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


def llama_like(folder: Path) -> Path:
    """A byte-level tokenizer.json with the special tokens of two formats and the label words as single tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(["Yes No the member watched genres history"] * 50, trainer)
    found.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.tensorflow
def test_a_prepared_folder_carries_its_tokenizer(tmp_path: Path) -> None:
    given = Told(data=DATA, wording=Wording(tokenizer=TokenizerConfig(path=str(llama_like(tmp_path))), chat="chatml"))
    tasks = [
        WatchNext(told=given),
        Documents(told=given, begin="<|endoftext|>", end="<|endoftext|>"),
        WatchNext(**COMMON, name="next_by_pieces"),
    ]
    paths = prepare(Mixture(tasks=tasks), tmp_path / "cache")
    ranking, documents, pieces = map(Examples.open, paths)
    assert ranking.vocab.hash == documents.vocab.hash != pieces.vocab.hash
    assert isinstance(ranking.text_vocab, TokenizerJson) and isinstance(pieces.text_vocab, Tokenizer)
    for examples in (ranking, pieces):
        text = examples.text_vocab
        assert text is not None and vocabulary_of(text).hash == examples.vocab.hash
        assert text.hash == examples.manifest["text_hash"] and text.size == examples.vocab.num_items
        rows = examples.manifest["label_rows"]
        assert examples.vocab.decode(rows) == ["No", "Yes"] == examples.manifest["label_words"]
        record = examples.source("test")[0]
        assert len(record["labels"]) == len(record["suffix_lengths"])
        assert record["suffix_lengths"].sum() == len(record["suffixes"])
        assert examples.manifest["kind"] == "ranking" and examples.manifest["asks"] == "WatchNext"
    assert [field.name for field in documents.schema("train")] == ["user_index", "items"]
    assert documents.item_count.sum() == sum(documents.source("train").lengths)
