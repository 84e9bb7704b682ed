"""Vectors passed on by value: what arrives where, what is too young, what a ranker makes of it, what never moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ArtifactError, ConfigError
from recjax.core.module import Functional
from recjax.data.examples import Examples
from recjax.data.field_tables import FieldCounts, FieldTables, coverage, write_tables
from recjax.data.fields import Categorical, shapes_of
from recjax.data.fitted_fields import OneRow, Vocabulary
from recjax.data.ranker_features import RankerFeatures
from recjax.data.rated_world import RatedWorld
from recjax.data.rows_feed import RowReader
from recjax.data.sources import DataDir
from recjax.models.ranker import Head, Ranker
from recjax.nn.field_vectors import FieldConfig
from recjax.nn.interaction import Flat
from recjax.nn.past_vectors import PastVectors
from recjax.nn.tower import TowerConfig
from recjax.tasks.cache import place_of
from recjax.tasks.impressions import Impressions

WORLD, WIDTH = RatedWorld(rows=2000, users=60, items=40), 4


@pytest.fixture(scope="module")
def prepared(prepare_here: Callable[..., None]) -> Callable[..., Examples]:
    def make(buckets: int = 0, columns: tuple[str, ...] = ("user_id", "item_id"), **more: Any) -> Examples:
        fields = (Categorical(columns=columns, buckets=buckets),)
        task = Impressions(data=DataDir(simulate=WORLD), labels={"click": "click"}, fields=fields, **more)
        prepare_here(task)
        return Examples.open(place_of(task).path)

    return make


def encoder(examples: Examples) -> dict[str, OneRow]:
    return {f.shape.name: f for f in RankerFeatures.load(examples.path).encoder.fields if isinstance(f, OneRow)}


def table(examples: Examples) -> np.ndarray:
    rows = RankerFeatures.load(examples.path).encoder.table_rows
    return np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("buckets", [0, 32])
def test_every_value_finds_its_vector_in_another_table(prepared: Callable, tmp_path: Path, buckets: int) -> None:
    old = prepared(buckets, window=(0.0, 0.4))
    new = prepared(buckets, columns=("device", "item_id", "user_id"), window=(0.4, 1.0))
    vectors = table(old)
    write_tables(tmp_path / "a", old, vectors)
    found = FieldTables(path=str(tmp_path / "a"), name="old")([new])
    arrived, known = found["item/old"], found["item/old.known"]
    before, after, count = encoder(old), encoder(new), np.zeros(len(vectors), int)
    reader = RowReader(old, "train")
    batch = reader.read(np.arange(len(reader)))
    for name in before:
        count += np.bincount(batch[f"field/{name}"], minlength=len(vectors))
    shared = 0
    for name, field in after.items():
        there, here = before.get(name), range(field.shape.offset, field.shape.offset + field.shape.rows)
        for k, row in enumerate(here):
            place = None
            if there is not None and k >= 2:
                a, b = field.coding, there.coding
                if isinstance(a, Vocabulary) and isinstance(b, Vocabulary):
                    place = 2 + b.texts.index(a.texts[k - 2]) if a.texts[k - 2] in b.texts else None
                else:
                    place = k
            at = None if there is None or place is None else there.shape.offset + place
            if at is None or not count[at]:
                assert known[row] == 0 and not arrived[row].any()
            else:
                np.testing.assert_array_equal(arrived[row], vectors[at])
                shared += 1
                assert known[row] == 1
    assert shared > 30
    assert coverage(found, "old", new)["device"] == 0.0 < coverage(found, "old", new)["item_id"] <= 1.0


def test_passing_on_and_back_changes_nothing_of_what_is_shared(prepared: Callable, tmp_path: Path) -> None:
    one = prepared(window=(0.0, 0.4))
    write_tables(tmp_path / "a", one, table(one))
    found = FieldTables(path=str(tmp_path / "a"), earlier=False)([one])
    write_tables(tmp_path / "b", one, found["item/start"])
    again = FieldTables(path=str(tmp_path / "b"), earlier=False)([one])
    for name in found:
        np.testing.assert_array_equal(found[name], again[name])
    unit = FieldTables(path=str(tmp_path / "a"), earlier=False, length=0.3)([one])
    length = np.linalg.norm(unit["item/start"], axis=1)
    np.testing.assert_allclose(length, 0.3 * unit["item/start.known"], rtol=1e-5, atol=1e-7)


def test_nothing_is_taken_from_the_future(prepared: Callable, tmp_path: Path) -> None:
    early, late, whole = (prepared(window=w) for w in ((0.0, 0.4), (0.4, 1.0), (0.0, 1.0)))
    for name, examples in (("early", early), ("late", late)):
        write_tables(tmp_path / name, examples, table(examples))
    FieldTables(path=str(tmp_path / "early"))([late])
    for path, reader in (("late", early), ("late", late), ("early", whole)):
        with pytest.raises(ArtifactError, match="trained on rows until"):
            FieldTables(path=str(tmp_path / path))([reader])
    with pytest.raises(ArtifactError, match="no table of device"):
        FieldTables(path=str(tmp_path / "early"), fields=("device",))([late])
    with pytest.raises(ArtifactError, match="is hashed there|vocabulary"):
        hashed = prepared(32, window=(0.4, 1.0))
        FieldTables(path=str(tmp_path / "early"))([hashed])


def test_counts_are_those_of_positives(prepared: Callable) -> None:
    one = prepared()
    reader = RowReader(one, "train")
    batch = reader.read(np.arange(len(reader)))
    found = FieldCounts(field="item_id", head="click")([one])["item/count"]
    want = np.bincount(batch["field/item_id"][batch["label/click"] >= 0.5], minlength=len(found))
    np.testing.assert_array_equal(found, want)
    with pytest.raises(ConfigError, match="no head"):
        FieldCounts(head="nobody")([one])


def ranker(examples: Examples, rows: int, **inputs: Any) -> Functional:
    start = inputs.pop("start", "")
    return Functional(
        lambda rngs: Ranker(
            num_rows=rows,
            fields=shapes_of(examples.manifest),
            heads=(Head(name="click"),),
            interaction=Flat(deep=TowerConfig(widths=(8,))),
            inputs=FieldConfig(width=WIDTH, **inputs),
            start=start,
            rngs=rngs,
        )
    )


def test_a_ranker_starts_from_what_is_known_and_draws_the_rest(prepared: Callable, tmp_path: Path) -> None:
    old, new = prepared(window=(0.0, 0.4)), prepared(window=(0.4, 1.0))
    write_tables(tmp_path / "a", old, table(old))
    facts = FieldTables(path=str(tmp_path / "a"), min_count=20)([new])
    model = ranker(new, len(facts["item/start"]), start="start")
    fresh = model.init(jax.random.key(0))
    fitted = model.fit(fresh, facts, jax.random.key(1))
    known = facts["item/start.known"] > 0
    assert 0 < known.sum() < len(known)
    np.testing.assert_array_equal(fitted["table"][known], facts["item/start"][known])
    np.testing.assert_array_equal(fitted["table"][~known], fresh["table"][~known])
    wrong = {**facts, "item/start": np.zeros((len(known), WIDTH + 1), np.float32)}
    with pytest.raises(ConfigError, match=f"vectors of {WIDTH + 1}"):
        model.fit(fresh, wrong, jax.random.key(1))


def test_tables_of_months_are_read_by_id_and_can_be_aggregated_beforehand(prepared: Callable, tmp_path: Path) -> None:
    """What the graph gives a row is what was computed once for its id; an id that nobody knows gets the default."""
    old, new = prepared(window=(0.0, 0.4)), prepared(window=(0.4, 1.0))
    write_tables(tmp_path / "a", old, table(old))
    facts = {}
    for name, least in (("one", 1), ("two", 25)):
        facts |= jax.tree.map(jnp.asarray, FieldTables(path=str(tmp_path / "a"), name=name, min_count=least)([new]))
    past = PastVectors(name="past", fields=("one", "two"), of="item_id", width=WIDTH)
    rows = len(facts["item/one"])
    model = ranker(new, rows, past=(past,), unread=("item_id",))
    assert jax.eval_shape(model.init, jax.random.key(0))["fields"].keys() == {"past0"}
    draw = np.random.default_rng(3)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.float32(draw.normal(size=s.shape)), shapes)
    ids = np.arange(encoder(new)["item_id"].shape.offset, encoder(new)["item_id"].shape.offset + 20, dtype=np.int32)
    batch = {"field/user_id": jnp.full(20, 3, jnp.int32), "field/item_id": jnp.asarray(ids), **facts}

    def loss(params: Any, facts: Any) -> jax.Array:
        return model.apply(params, {**batch, **facts}, train=False, key=None)["logit/click"].sum()

    module: Any = model.bind(params)
    layers = module.fields.past0
    past_of = jnp.stack([facts["item/one"], facts["item/two"]], axis=1)
    known = np.stack([facts["item/one.known"], facts["item/two.known"]], axis=1) > 0
    whole = layers(past_of, jnp.asarray(known))  # one vector for every row of the table
    in_graph = layers.of_batch(batch)
    np.testing.assert_allclose(in_graph, np.asarray(whole)[ids], rtol=1e-6, atol=1e-6)
    nobody = ~known[ids].any(1)
    assert nobody.any() and (~nobody).any()
    np.testing.assert_array_equal(
        np.asarray(in_graph)[nobody], np.broadcast_to(params["fields"]["past0"]["default"], (nobody.sum(), WIDTH))
    )
    gradient = jax.grad(loss)(params, facts)
    assert np.any(np.asarray(gradient["fields"]["past0"]["value"]))
    paths = [path for path in gradient if path.startswith("item")]
    assert not paths  # tables are no parameters: nothing to differentiate, no state, nothing in a checkpoint
