"""Fields: fitted once, and then the same bytes for a row whether it comes alone or among others."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from recjax.core.errors import ConfigError, DataError, ExamplesError
from recjax.data.field_encoder import FieldEncoder
from recjax.data.fields import (
    FIRST_ROW,
    Bucketed,
    CatalogueItem,
    Categorical,
    Cross,
    Declaration,
    FieldShape,
    MultiValued,
    Numeric,
    SameAs,
    SequenceOf,
    Vector,
    Words,
    shapes_of,
    table_rows,
)
from recjax.data.raw import Raw

VECTORS = {"content": (np.arange(12, dtype=np.float32).reshape(4, 3), [10, 11, 12, 13])}
DECLARED = (
    Categorical(columns=("user", "item")),
    Categorical(columns=("item",), suffix=".often", min_count=20),
    Categorical(columns=("item",), suffix=".hashed", buckets=7),
    Categorical(columns=("item",), suffix=".twice", buckets=50, hashes=2),
    MultiValued(columns=("tags",), limit=3),
    SequenceOf(columns=("past",), of="item", limit=4),
    SameAs(columns=("source",), of="item"),
    Words(columns=("query",), buckets=100, limit=10),
    Numeric(columns=("price",), log=True),
    Numeric(columns=("age",), scale="quantile", presence=False),
    Bucketed(columns=("price",), quantiles=4),
    Bucketed(columns=("age",), suffix=".range", edges=(20, 40)),
    Cross(columns=("user", "tags2"), buckets=1000),
    Vector(columns=("item",)),
)


def random_rows(seed: int, count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)

    def maybe(value: Any) -> Any:
        return None if rng.random() < 0.15 else value

    def tags() -> list[str]:
        return [f"t{k}" for k in rng.integers(0, 6, rng.integers(0, 6))]

    return [
        {
            "user": maybe(f"u{rng.integers(0, 9)}"),
            "item": maybe(int(rng.zipf(1.5)) + 9),
            "source": maybe(int(rng.zipf(1.5)) + 9),
            "tags": maybe(tags()),
            "tags2": maybe(str(rng.integers(0, 4))),
            "past": maybe((rng.zipf(1.5, rng.integers(0, 9)) + 9).tolist()),
            "query": maybe(" ".join(rng.choice(["red", "shoes", "Green", "hat"], rng.integers(1, 4)))),
            "price": maybe(float(np.round(rng.lognormal(2, 1), 2))),
            "age": maybe(int(rng.integers(10, 90))),
        }
        for _ in range(count)
    ]


def columns_of(rows: list[dict[str, Any]]) -> dict[str, Raw]:
    return {name: Raw.of([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return random_rows(0, 400)


@pytest.fixture(scope="module")
def encoder(rows: list[dict[str, Any]]) -> FieldEncoder:
    return FieldEncoder.fit(DECLARED, columns_of(rows), VECTORS)


def rows_of(encoder: FieldEncoder, name: str) -> FieldShape:
    return next(shape for shape in encoder.shapes if shape.name == name)


def test_a_row_alone_and_among_others_gives_the_same_bytes(encoder: FieldEncoder) -> None:
    asked = random_rows(1, 300)
    together = encoder.encode(columns_of(asked))
    for k, row in enumerate(asked):
        alone = encoder.encode({name: Raw.of([value]) for name, value in json.loads(json.dumps(row)).items()})
        assert list(alone) == list(together)
        for name, values in alone.items():
            assert values.dtype == together[name].dtype and values[0].tobytes() == together[name][k].tobytes(), name


def test_what_was_saved_encodes_alike(encoder: FieldEncoder) -> None:
    told = json.loads(json.dumps(encoder.told()))
    again = FieldEncoder.from_told(told, encoder.arrays())
    assert again.hash == encoder.hash and again.shapes == encoder.shapes
    columns = columns_of(random_rows(2, 50))
    for name, values in encoder.encode(columns).items():
        np.testing.assert_array_equal(again.encode(columns)[name], values)
    changed = FieldEncoder.from_told(told, {name: array + 1 for name, array in encoder.arrays().items()})
    assert changed.hash != encoder.hash
    with pytest.raises(ExamplesError, match="format"):
        FieldEncoder.from_told({**told, "format": 0}, {})


def test_every_batch_is_what_its_shape_says(encoder: FieldEncoder) -> None:
    batch = encoder.encode(columns_of(random_rows(3, 77)))
    assert list(batch) == [f"field/{shape.name}" for shape in encoder.shapes]
    for shape in encoder.shapes:
        values = batch[f"field/{shape.name}"]
        assert values.shape == ((77, shape.width) if shape.width else (77,)), shape
        assert values.dtype == (np.float32 if shape.kind in ("numeric", "vector") else np.int32), shape
        assert values.flags.c_contiguous
        if shape.rows:
            low, high = shape.offset, shape.offset + shape.rows
            assert (((values >= low) & (values < high)) | (values == 0)).all(), shape
            assert (values > 0).all() or shape.kind in ("multi_valued", "sequence"), shape
    told = {"fields": json.loads(json.dumps([shape.told() for shape in encoder.shapes]))}
    assert shapes_of(told) == encoder.shapes


def test_fields_own_rows_that_do_not_meet(encoder: FieldEncoder) -> None:
    owned = np.zeros(encoder.table_rows, int)
    for shape in encoder.shapes:
        if shape.rows and not shape.of:
            owned[shape.offset : shape.offset + shape.rows] += 1
    end = FIRST_ROW + int(owned.sum())
    assert (owned[:FIRST_ROW] == 0).all() and (owned[FIRST_ROW:end] == 1).all() and not owned[end:].any()
    assert encoder.table_rows % 128 == 0 and encoder.table_rows - end < 128
    assert table_rows(encoder.shapes) == encoder.table_rows


def test_a_vocabulary_is_in_order_of_counts_and_leaves_rare_values_out(
    encoder: FieldEncoder, rows: list[dict[str, Any]]
) -> None:
    counts = Counter(str(row["item"]) for row in rows if row["item"] is not None)
    ordered = sorted(counts, key=lambda item: (-counts[item], item))
    shape, often = rows_of(encoder, "item"), rows_of(encoder, "item.often")
    frequent = [item for item in ordered if counts[item] >= 20]
    assert shape.rows == 2 + len(ordered) and often.rows == 2 + len(frequent) and 0 < len(frequent) < len(ordered)
    asked = [None, "never seen", *ordered]
    batch = encoder.encode(columns_of([{**rows[0], "item": item} for item in asked]))
    assert (batch["field/item"] - shape.offset).tolist() == list(range(2 + len(ordered)))
    wanted = [0, 1, *(2 + frequent.index(item) if item in frequent else 1 for item in ordered)]
    assert (batch["field/item.often"] - often.offset).tolist() == wanted


def test_a_sequence_is_the_newest_items_of_another_field(encoder: FieldEncoder, rows: list[dict[str, Any]]) -> None:
    for asked in random_rows(4, 100):
        past = asked["past"]
        batch = encoder.encode(columns_of([{**asked, "item": item} for item in (past or [None])]))
        shown = batch["field/past"][0].tolist()
        if past is None:
            assert shown == [rows_of(encoder, "item").offset, 0, 0, 0]
        else:
            kept = batch["field/item"].tolist()[-4:] if past else []
            assert shown == kept + [0] * (4 - len(kept))
    batch = encoder.encode(columns_of([{**rows[0], "item": 12, "source": 12}]))
    assert batch["field/source"] == batch["field/item"]


def test_values_of_a_bag_keep_their_order_up_to_the_limit(encoder: FieldEncoder, rows: list[dict[str, Any]]) -> None:
    texts = ["|".join(row["tags"] or []) for row in rows]
    as_text = {**columns_of(rows), "tags": Raw.of(texts)}
    lists, cut = encoder.encode(columns_of(rows))["field/tags"], encoder.encode(as_text)["field/tags"]
    empty = np.array([row["tags"] == [] for row in rows])
    np.testing.assert_array_equal(lists[~empty], cut[~empty])
    assert (lists[empty] == 0).all() and (cut[empty][:, 0] == rows_of(encoder, "tags").offset).all()
    lengths = np.array([1 if row["tags"] is None else min(len(row["tags"]), 3) for row in rows])
    np.testing.assert_array_equal((lists > 0).sum(1), lengths)


def test_numbers_are_on_the_scale_of_training(encoder: FieldEncoder, rows: list[dict[str, Any]]) -> None:
    batch = encoder.encode(columns_of(rows))
    there = np.array([row["price"] is not None for row in rows])
    price = np.log1p([row["price"] for row in rows if row["price"] is not None])
    np.testing.assert_allclose(batch["field/price"][there], (price - price.mean()) / price.std(), rtol=1e-5, atol=1e-6)
    assert (batch["field/price"][~there] == 0).all()
    np.testing.assert_array_equal(batch["field/price.present"], there.astype(np.float32))
    far = encoder.encode(columns_of([{**rows[0], "price": 1e30}, {**rows[0], "price": -1e30}]))
    assert far["field/price"].tolist() == [5, -5]
    ages = np.array([row["age"] for row in rows if row["age"] is not None])
    known = np.array([row["age"] is not None for row in rows])
    below = np.array([((ages < age).mean() + (ages <= age).mean()) / 2 for age in ages])
    np.testing.assert_allclose(batch["field/age"][known], 2 * below - 1, atol=0.04)
    ranges = encoder.encode(columns_of([{**rows[0], "age": age} for age in (None, 19, 20, 39, 40)]))["field/age.range"]
    assert (ranges - rows_of(encoder, "age.range").offset).tolist() == [0, 2, 3, 3, 4]
    counts = np.bincount(batch["field/price.bucket"][there] - rows_of(encoder, "price.bucket").offset)[2:]
    assert len(counts) == 4 and counts.max() - counts.min() <= 4


def test_hashes_collide_as_their_buckets_say(rows: list[dict[str, Any]]) -> None:
    declared = (
        Categorical(columns=("x",), buckets=1000),
        Categorical(columns=("x",), suffix="2", buckets=1000, hashes=2),
        Cross(columns=("x", "y"), buckets=1000),
    )
    columns = {"x": Raw.of(list(range(2000))), "y": Raw.of(["a"] * 2000)}
    batch = FieldEncoder.fit(declared, columns).encode(columns)
    for name in ("x", "x_x_y"):
        used = len(np.unique(batch[f"field/{name}"]))
        assert abs(used - 1000 * (1 - np.exp(-2))) < 40
    first, second = batch["field/x2"].T
    assert len(np.unique(first * 10_000 + second)) > 1980 and abs((first == second).mean() - 0.001) < 0.01


def test_a_cross_tells_missing_parts_from_values() -> None:
    cells = [(x, y) for x in (None, "a", "b", "") for y in (None, "a", "b")]
    columns = {"x": Raw.of([x for x, _ in cells]), "y": Raw.of([y for _, y in cells])}
    encoder = FieldEncoder.fit((Cross(columns=("x", "y"), buckets=10**6),), columns)
    rows = encoder.encode(columns)["field/x_x_y"] - FIRST_ROW
    different = len({(x or None, y) for x, y in cells})
    assert len(np.unique(rows)) == different and rows[0] == 0 and (rows == 0).sum() == 2


def test_vectors_are_found_by_id(encoder: FieldEncoder, rows: list[dict[str, Any]]) -> None:
    batch = encoder.encode(columns_of([{**rows[0], "item": item} for item in (11, 99, None, 13)]))
    np.testing.assert_array_equal(batch["field/item.vector"], [[3, 4, 5], [0, 0, 0], [0, 0, 0], [9, 10, 11]])
    assert batch["field/item.vector.present"].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    "declared, error, message",
    [
        ((Categorical(columns="x"), Categorical(columns="x")), ConfigError, "two fields are named x"),
        ((SequenceOf(columns="y", of="x"),), ConfigError, "share the rows of 'x'"),
        ((Categorical(columns="nowhere"),), DataError, "no column nowhere"),
        ((Categorical(columns="lists"),), DataError, "holds lists"),
        ((Vector(columns="x"),), DataError, "no vectors 'content'"),
        ((Numeric(columns="word"),), DataError, "not a number"),
        ((Numeric(columns="x"), Numeric(columns="x", suffix=".present")), ConfigError, "named alike: x.present"),
        ((), ConfigError, "without fields"),
    ],
)
def test_mistakes_are_told(declared: tuple[Declaration, ...], error: type[Exception], message: str) -> None:
    columns = {"x": Raw.of([1]), "y": Raw.of([[1]]), "lists": Raw.of([[1]]), "word": Raw.of(["a"])}
    with pytest.raises(error, match=message):
        FieldEncoder.fit(declared, columns).encode(columns)


@pytest.mark.parametrize(
    "kind, settings",
    [
        (Categorical, {"columns": ()}),
        (Categorical, {"columns": "x", "hashes": 2}),
        (Categorical, {"columns": "x", "min_count": 0}),
        (Cross, {"columns": "x", "buckets": 5}),
        (Numeric, {"columns": "x", "scale": "cube"}),
        (Bucketed, {"columns": "x", "edges": (2, 1)}),
        (Words, {"columns": "x", "buckets": 5, "ngrams": (3, 2)}),
    ],
)
def test_declarations_refuse_what_makes_no_field(kind: type[Declaration], settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        kind(**settings)


def test_an_item_is_found_by_its_row_in_the_catalogue(rows: list[dict[str, Any]]) -> None:
    declared = (CatalogueItem(columns=("item",)), SequenceOf(columns=("past",), of="item", limit=4))
    catalogue = [str(number) for number in range(500, 9, -1)]
    encoder = FieldEncoder.fit(declared, columns_of(rows), catalogue=catalogue)
    asked = [{"item": 500, "past": [499, 7]}, {"item": None, "past": None}, {"item": 5, "past": [10]}]
    got = encoder.encode(columns_of(asked))
    np.testing.assert_array_equal(got["field/item"], [2, 0, 1])
    np.testing.assert_array_equal(got["field/past"], [[3, 1, 0, 0], [0, 0, 0, 0], [492, 0, 0, 0]])
    assert encoder.table_rows == 0  # it takes none
    assert FieldEncoder.from_told(json.loads(json.dumps(encoder.told())), {}).hash == encoder.hash
