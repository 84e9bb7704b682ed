"""BM25 in the harness: its settings by validation, its texts from the catalogue and the training queries alone."""

from pathlib import Path

import numpy as np
import pytest

from recjax.baselines.bm25 import Bm25Settings, TextMatch, documents, grid
from recjax.baselines.fit import BASELINES, Ground
from recjax.baselines.harness import rank_batches
from recjax.baselines.records import Records
from recjax.core.errors import ConfigError
from recjax.data.examples import Examples, write_examples
from recjax.data.simulate import World
from recjax.data.sources import DataDir
from recjax.evaluation import Evaluation, Evaluator, rank_baselines, result_of
from recjax.index.bm25 import Bm25
from recjax.metrics.topk import merge, topk_state
from recjax.tasks.next_item import NextItem
from recjax.tasks.search import Search
from recjax.tasks.work import columns_of, examples_of


@pytest.fixture(scope="module")
def searches(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    work = Search(log=NextItem(data=DataDir(simulate=World(num_events=3000))), prompt="find: ").work()
    path: Path = tmp_path_factory.mktemp("prepared") / "search"
    facts = {"content_hash": "x", **work.facts}
    kept = {"vocab": work.vocab, "items": work.items, "users": work.users, "text": work.text}
    with write_examples(path, facts=facts, **kept) as writer:
        for split, schema in work.schemas.items():
            writer.add(split, schema, columns_of(list(examples_of(work, split)), schema))
    return Examples.open(path)


def ground_of(examples: Examples) -> Ground:
    splits = {name: Records.of(examples, split) for name, split in (("train", "train"), ("tuning", "valid"))}
    return Ground(**splits, item_count=examples.item_count, valid=examples.vocab.valid, titles=examples.titles())


def test_records_have_the_queries_and_what_is_seen(searches: Examples) -> None:
    records, source = Records.of(searches, "test"), searches.source("test")
    assert records.text is not None and searches.text_vocab is not None
    for k in range(0, len(records), 7):
        assert "find: " + records.text[k] == searches.text_vocab.decode(source[k]["text"])
    part = records.take(np.array([4, 2]))
    assert part.text is not None and part.text.tolist() == [records.text[4], records.text[2]]
    items, bounds = part.seen_items()
    np.testing.assert_array_equal(items[bounds[0] : bounds[1]], source[4]["seen"])


def test_a_text_is_the_title_and_the_training_queries(searches: Examples) -> None:
    train = Records.of(searches, "train")
    assert train.text is not None
    titles, rows = searches.titles(), searches.vocab.num_rows
    plain = documents(train, titles, rows, queries=False)
    full = documents(train, titles, rows, queries=True)
    assert plain == [t or "" for t in titles] and len(full) == rows
    for row in range(2, 40):
        asked = [t for t, item in zip(train.text, train.items, strict=True) if item == row]
        assert full[row] == " ".join([titles[row] or "", *asked])
    scores = TextMatch(full, Bm25Settings(k1=1.5, b=0.5)).scores(train.take(np.arange(5)))
    np.testing.assert_array_equal(scores, Bm25(full, k1=1.5, b=0.5).scores(train.text[:5].tolist()))


def test_it_finds_what_popularity_does_not(searches: Examples) -> None:
    """Queries of the simulated world name genre and mood, which titles and other queries of an item do too."""
    ground, test = ground_of(searches), Records.of(searches, "test")
    recall = {}
    for name in ("bm25", "popularity", "item_graph"):
        state: dict = {}
        for found in rank_batches(BASELINES[name](ground), test, ground.valid, 10, remove_seen=True):
            state = merge(state, topk_state(found.rank, (10,)))
        recall[name] = state["recall@10"].value
    assert recall["bm25"] > 0.3 > 2 * recall["popularity"]
    settings = BASELINES["bm25"](ground).settings
    assert Bm25Settings(k1=settings["k1"], b=settings["b"], queries=bool(settings["queries"])) in grid()


def test_answers_to_a_query_are_resampled_together(searches: Examples) -> None:
    evaluator = Evaluator(searches, split="test", config=Evaluation(k=(10,), baselines=("popularity",)))
    result = result_of(evaluator, rank_baselines(evaluator), {})
    records = Records.of(searches, "test")
    assert result.cluster is not None and records.text is not None
    text = records.text[np.argsort(records.user_index)]
    np.testing.assert_array_equal(result.cluster[:, None] == result.cluster, text[:, None] == text)
    assert 1 < len(np.unique(result.cluster)) < len(text)
    assert "over queries" in result.metrics()["protocol"]["interval"]


def test_a_task_without_queries_is_told(records_of) -> None:
    with pytest.raises(ConfigError, match="needs queries"):
        documents(records_of([]), [], 4, queries=True)
