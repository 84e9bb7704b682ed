"""Requests and rows through one object: joined, imputed, encoded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recjax.core.errors import ConfigError, DataError, ExamplesError
from recjax.data.field_encoder import FieldEncoder
from recjax.data.fields import Categorical, MultiValued, Numeric, SameAs, Vector, Words
from recjax.data.imputation import UNICORN, Impute, imputed
from recjax.data.ranker_features import RankerFeatures, SideTable, completed
from recjax.data.raw import Raw

ITEMS = SideTable(
    "item_id", ("1", "2", "3"), {"genres": Raw.of([["a", "b"], ["b"], None]), "price": Raw.of([1.0, None, 3.0])}
)
SOURCES = SideTable("source_id", ("1", "2", "3"), {"source_title": Raw.of(["Red Shoes", "Blue Hat", None])})
DECLARED = (
    Categorical(columns=("user_id", "item_id", "task", "user_cluster")),
    SameAs(columns=("source_id",), of="item_id"),
    MultiValued(columns=("genres",)),
    Numeric(columns=("price",)),
    Words(columns=("query",), buckets=1000),
    Numeric(columns=("query.present", "source_id.present"), scale="none", presence=False),
    Vector(columns=("item_id",)),
)
VECTORS = {"content": (np.eye(3, dtype=np.float32), [1, 2, 3])}
CONTEXTS: list[dict[str, Any]] = [
    {"user_id": "u1", "task": "search", "query": "red shoes", "user_cluster": "4"},
    {"user_id": "u2", "task": "similar", "source_id": 1, "user_cluster": "5"},
    {"user_id": "u1", "task": "similar", "source_id": 3},
    {"user_id": None, "task": "page"},
]


@pytest.fixture(scope="module")
def features() -> RankerFeatures:
    rows = [{**context, "item_id": item} for context in CONTEXTS for item in (1, 2, 3)]
    names = ("user_id", "task", "query", "user_cluster", "source_id", "item_id")
    columns = {name: Raw.of([row.get(name) for row in rows]) for name in names}
    complete = completed(columns, (ITEMS, SOURCES), UNICORN)
    return RankerFeatures((ITEMS, SOURCES), UNICORN, FieldEncoder.fit(DECLARED, complete, VECTORS))


def test_contexts_are_imputed_as_the_table_says() -> None:
    """Card of UniCoRn: a missing query is the name of the source, a missing source or user stays missing."""
    columns = {n: Raw.of([c.get(n) for c in CONTEXTS]) for n in ("user_id", "query", "source_id", "user_cluster")}
    columns["source_title"] = Raw.of([None, "Red Shoes", None, None])
    found = imputed(columns, UNICORN)

    def shown(name: str) -> list[Any]:
        column = found[name]
        return [None if m else v for v, m in zip(column.values.tolist(), column.missing.tolist(), strict=True)]

    assert shown("query") == ["red shoes", "red shoes", None, None]  # one key, typed or filled in
    assert shown("query.present") == [1, 0, 0, 0]
    assert shown("source_id") == [None, 1, 3, None] and shown("source_id.present") == [0, 1, 1, 0]
    assert shown("user_id") == ["u1", "u2", "u1", None] and shown("user_id.present") == [1, 1, 1, 0]
    assert shown("user_cluster") == ["4", "5", "0", "0"] and shown("user_cluster.present") == [1, 1, 0, 0]


def test_without_sources_a_column_stays_missing() -> None:
    found = imputed({"query": Raw.of(["a", None])}, (Impute(column="query"),))
    assert found["query"].missing.tolist() == [False, True] and found["query.present"].values.tolist() == [1, 0]
    assert (
        imputed({"x": Raw.of([1, 2])}, (Impute(column="query", value="all"),))["query"].values.tolist() == ["all"] * 2
    )
    with pytest.raises(DataError, match="filled from title"):
        imputed({"query": Raw.of(["a", None])}, (Impute(column="query", sources=("title",)),))
    with pytest.raises(ConfigError):
        Impute(column="")


def test_a_name_asks_as_the_same_words_do(features: RankerFeatures) -> None:
    named = features.rows([{"task": "similar", "source_id": 1, "item_id": 2}])
    typed = features.rows([{"task": "similar", "source_id": 1, "item_id": 2, "query": "Red shoes"}])
    np.testing.assert_array_equal(named["field/query"], typed["field/query"])
    assert named["field/query.present"] == 0 and typed["field/query.present"] == 1


def test_a_request_is_its_rows(features: RankerFeatures) -> None:
    for context in CONTEXTS:
        together = features.request(context, [3, 1, 99, 2])
        for k, item in enumerate((3, 1, 99, 2)):
            for name, values in features.rows([{**context, "item_id": item}]).items():
                assert values[0].tobytes() == together[name][k].tobytes(), name
    brought = features.request({}, [{"item_id": 1, "user_id": "u1"}, {"item_id": 1, "user_id": "u2"}])["field/user_id"]
    assert brought[0] != brought[1]


def test_what_candidates_do_not_change_is_made_once_and_is_the_same(features: RankerFeatures) -> None:
    """Whatever columns candidates bring, and however many requests go together."""
    requests = [
        (CONTEXTS[0], [{"item_id": 1}, {"item_id": 99}, {}]),
        (CONTEXTS[1], [{"item_id": 3}]),
        ({**CONTEXTS[2], "item_id": 2}, [{}, {}]),
        (CONTEXTS[3], [{"item_id": 2, "query": "Hat"}, {"source_id": 2}]),
    ]
    for some in ([requests[0]], [requests[1]], requests[:2], requests[:3], [requests[3]], requests):
        found = features.fields_of(some)
        rows = [{**context, **row} for context, candidates in some for row in candidates]
        for name, wanted in features.rows(rows).items():
            assert found[name].tobytes() == wanted.tobytes() and found[name].dtype == wanted.dtype, name
    once, each = features._parts(frozenset({"item_id"}))
    assert {f.shape.name for f in each.fields} == {"item_id", "genres", "price", "item_id.vector"}
    once, each = features._parts(frozenset({"source_id"}))
    named = {f.shape.name for f in once.fields}
    assert {"user_id", "item_id", "genres"} <= named and not named & {"source_id", "query", "query.present"}


@pytest.mark.parametrize("slot", ["user_id", "task", "query", "source_id", "user_cluster", "item_id"])
def test_every_slot_may_be_missing(features: RankerFeatures, slot: str) -> None:
    for context in CONTEXTS:
        row = {name: value for name, value in {**context, "item_id": 1}.items() if name != slot}
        batch = features.rows([row])
        assert list(batch) == [f"field/{shape.name}" for shape in features.encoder.shapes]
        assert all(np.isfinite(values).all() for values in batch.values())


def test_what_is_saved_is_what_is_loaded(features: RankerFeatures, tmp_path: Path) -> None:
    for name, content in features.files().items():
        (tmp_path / name).write_bytes(content)
    again = RankerFeatures.load(tmp_path)
    assert again.hash == features.hash and again.asked == features.asked
    for context in CONTEXTS:
        ours, theirs = again.request(context, [1, 2, 3, None]), features.request(context, [1, 2, 3, None])
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    (tmp_path / "features.json").write_text("{}")
    with pytest.raises(ExamplesError, match="cannot be read"):
        RankerFeatures.load(tmp_path)


def test_only_what_a_client_can_know_is_asked(features: RankerFeatures) -> None:
    assert set(features.asked) == {"user_id", "item_id", "task", "user_cluster", "source_id", "query"}


def test_texts_spelt_before_are_spelt_the_same(features: RankerFeatures) -> None:
    """Few rows are looked up among texts spelt before; many are spelt anew."""
    rng = np.random.default_rng(0)
    words = ("red", "Blue", "hat", "shoes", "coat", "grün")
    texts = [" ".join(rng.choice(words, int(rng.integers(0, 4)))) or None for _ in range(5000)]
    rows = [{"item_id": 1, "task": "search", "query": text} for text in texts]
    whole = features.rows(rows)["field/query"]
    for start in (0, 100, 0):
        found = features.rows(rows[start : start + 100])["field/query"]
        assert found.tobytes() == whole[start : start + 100].tobytes()
