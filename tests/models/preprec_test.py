"""PrepRec: what its scores depend on and what they do not, and that no parameter belongs to an item."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.core.module import Functional, Rngs
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.data.popularity import decayed, windowed
from recjax.models.preprec import PrepRec, from_end, gaps_before, ranks, sinusoid, spread
from recjax.nn.transformer import TransformerConfig

ITEMS, ROWS, LENGTH = 40, 128, 12
DAY, COARSE, FINE = 86_400, 10 * 86_400, 2 * 86_400
ORIGIN = 1_500_000_000
SMALL = TransformerConfig(num_layers=2, width=10, num_heads=1, mlp_width=10, ffn="relu", position="none")
PUBLISHED = TransformerConfig(num_layers=2, width=50, num_heads=1, mlp_width=50, ffn="relu", position="none")


def make(encoder: TransformerConfig = SMALL, num_rows: int = ROWS, **settings: Any) -> Functional:
    return Functional(functools.partial(PrepRec, num_rows=num_rows, encoder=encoder, **settings))


MODEL = make()
PARAMS = MODEL.init(jax.random.key(0))


def a_log(seed: int = 0, events: int = 600, days: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Rows and times of a log in which some items come and go."""
    rng = np.random.default_rng(seed)
    rows = 2 + rng.integers(0, ITEMS, events) * rng.integers(0, 2, events)
    return rows, ORIGIN + np.sort(rng.integers(0, days * DAY, events))


def facts(rows: np.ndarray, times: np.ndarray, num_rows: int = ROWS) -> dict[str, Any]:
    since = times - ORIGIN
    return {
        "item/coarse": decayed(rows, since // COARSE, num_rows, decay=0.5),
        "item/fine": windowed(rows, since // FINE, num_rows, window=4),
        "item/popularity_origin": np.int32(ORIGIN),
        "item/coarse_seconds": np.int32(COARSE),
        "item/fine_seconds": np.int32(FINE),
    }


def a_batch(*rows: list[list[tuple[int, int]]], asked: int = 390, length: int = LENGTH) -> dict[str, Any]:
    """Each argument is a row of packed histories of (item, day); after each the next item is asked for on `asked`."""
    names = ("history_ids", "positions", "segment_ids", "history_time", "query_time")
    batch = {name: np.zeros((len(rows), length), np.int64 if "time" in name else np.int32) for name in names}
    for i, histories in enumerate(rows):
        at = 0
        for segment, history in enumerate(histories, 1):
            here = slice(at, at + len(history))
            items, days = (np.array(x) for x in zip(*history, strict=True))
            batch["history_ids"][i, here], batch["history_time"][i, here] = items, ORIGIN + days * DAY
            batch["query_time"][i, here] = ORIGIN + np.append(days[1:], asked) * DAY
            batch["positions"][i, here], batch["segment_ids"][i, here] = np.arange(len(history)), segment
            at += len(history)
    return batch


HISTORY = [(5, 30), (9, 33), (7, 130), (11, 131), (5, 300)]
OTHER = [(6, 40), (8, 41), (12, 250)]


@functools.partial(jax.jit, static_argnums=0)
def _scores(model: Functional, params: Any, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    out = model.apply(params, batch, train=False, key=None)
    last = jnp.maximum((batch["segment_ids"] > 0).sum(1) - 1, 0)[:, None, None]
    query = jnp.take_along_axis(out["hidden"], last, axis=1)[:, 0]
    return jnp.einsum("bd,bvd->bv", query, out["table"]), out["hidden"]


def scores(batch: dict[str, Any], known: dict[str, Any], model: Functional = MODEL, params: Any = None) -> np.ndarray:
    """[b, v]: every item's score for the query after the last event of each row."""
    return np.asarray(_scores(model, PARAMS if params is None else params, {**batch, **known})[0])


def test_an_encoding_adds_up_to_one_and_gives_the_percentile_back() -> None:
    percent = jnp.asarray(np.linspace(0, 100, 1001), jnp.float32)
    for bins in (10, 5):
        numbers = np.asarray(spread(percent, bins))
        assert numbers.shape == (1001, bins + 1) and not numbers[0].any()
        np.testing.assert_allclose(numbers[1:].sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(numbers @ np.linspace(0, 100, bins + 1), percent, atol=1e-3)
        assert (numbers > 1e-5).sum(1).max() == 2
    np.testing.assert_allclose(spread(jnp.float32([37.0]), 10)[0], [0, 0, 0, 0.3, 0.7, 0, 0, 0, 0, 0, 0], atol=1e-5)


def test_nothing_that_happens_from_the_query_on_is_known() -> None:
    """Up to the end of the period before the query: what happens later changes no score."""
    rows, times = a_log()
    asked = 301
    batch = a_batch([HISTORY], asked=asked)
    before = scores(batch, facts(rows, times))
    later = times >= ORIGIN + asked * DAY
    assert 50 < later.sum() < 200
    changed = np.where(later, 2 + (rows + 7) % ITEMS, rows)
    np.testing.assert_array_equal(scores(batch, facts(changed, times)), before)
    kept = ~later
    np.testing.assert_array_equal(scores(batch, facts(rows[kept], times[kept])), before)
    # The day before the query is in the same fine period; the days before that one are not.
    earlier = (times >= ORIGIN + (asked - 30) * DAY) & ~later
    changed = np.where(earlier, 2 + (rows + 7) % ITEMS, rows)
    assert np.abs(scores(batch, facts(changed, times)) - before).max() > 1e-3


def test_an_event_is_encoded_as_it_was_known_before_it() -> None:
    rows, times = a_log()
    batch = {**a_batch([HISTORY, OTHER]), **facts(rows, times)}
    hidden = np.asarray(_scores(MODEL, PARAMS, batch)[1])
    later = times >= ORIGIN + 131 * DAY
    changed = np.where(later, 2 + (rows + 7) % ITEMS, rows)
    other = np.asarray(_scores(MODEL, PARAMS, {**batch, **facts(changed, times)})[1])
    np.testing.assert_array_equal(hidden[0, :4], other[0, :4])
    assert np.abs(hidden[0, 4] - other[0, 4]).max() > 1e-3


def test_a_score_changes_with_the_time_of_the_query() -> None:
    known = facts(*a_log())
    early, late = (scores(a_batch([HISTORY], asked=day), known)[0] for day in (310, 380))
    moved = (known["item/coarse"][:, 30] != known["item/coarse"][:, 37]) & (np.arange(ROWS) < 2 + ITEMS)
    assert moved.sum() > ITEMS / 2 and (np.abs(early - late)[moved] > 1e-4).mean() > 0.9
    np.testing.assert_array_equal(early[2 + ITEMS :], late[2 + ITEMS :])  # never seen, at either time


def test_after_the_end_of_the_log_the_last_period_holds() -> None:
    known = facts(*a_log())
    one, two = (scores(a_batch([HISTORY], asked=day), known) for day in (3000, 4000))
    np.testing.assert_array_equal(one, two)
    assert np.ptp(one[0, 2 : 2 + ITEMS]) > 1e-3


def test_names_of_items_do_not_matter() -> None:
    rows, times = a_log()
    name = np.arange(ROWS)
    name[2 : 2 + ITEMS] = 2 + np.random.default_rng(3).permutation(ITEMS)
    renamed = [(int(name[item]), day) for item, day in HISTORY]
    before = scores(a_batch([HISTORY]), facts(rows, times))
    after = scores(a_batch([renamed]), facts(name[rows], times))
    np.testing.assert_array_equal(after[:, name], before)


@pytest.mark.parametrize("settings", [{}, {"gap_rank": "past"}, {"gap": "after"}, {"count_from": "end"}])
def test_only_the_order_of_gaps_matters(settings: dict[str, Any]) -> None:
    """Gaps are stretched inside a world that stands still, so that all else is the same."""
    rows, model = np.arange(2, 2 + ITEMS), make(SMALL, **settings)
    still = facts(np.repeat(rows, rows), np.full(rows.sum(), ORIGIN))
    late = 40  # long after the window of the fine table is empty
    stretched = [(item, late + 3 * (day - HISTORY[0][1])) for item, day in HISTORY]
    plain = [(item, late + day - HISTORY[0][1]) for item, day in HISTORY]
    swapped = [(5, late), (9, late + 100), (7, late + 103), (11, late + 104), (5, late + 274)]
    first, second, third = (scores(a_batch([h], asked=2000), still, model) for h in (plain, stretched, swapped))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - third).max() > 1e-3


def test_ranks_of_gaps() -> None:
    """Within a segment, from 1, equal gaps alike; the first event of a segment has a gap of 0."""
    times = jnp.asarray([[10, 50, 60, 60, 160, 7, 9, 0]])
    segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 0]])
    gaps = gaps_before(times, segments)
    np.testing.assert_array_equal(gaps[:, :7], [[0, 40, 10, 0, 100, 0, 2]])
    np.testing.assert_array_equal(ranks(gaps, segments), [[1, 4, 3, 1, 5, 1, 2, 0]])
    np.testing.assert_array_equal(ranks(gaps, segments, is_causal=True), [[1, 2, 2, 1, 5, 1, 2, 0]])
    np.testing.assert_array_equal(from_end(segments), [[4, 3, 2, 1, 0, 1, 0, 0]])


def test_sinusoids_are_those_of_the_paper() -> None:
    found = np.asarray(sinusoid(jnp.asarray([[0, 7]]), 6))[0, 1]
    angles = 7 / 10000 ** (np.arange(0, 6, 2) / 6)
    np.testing.assert_allclose(found, np.stack([np.sin(angles), np.cos(angles)], 1).ravel(), rtol=1e-5)


def test_an_item_that_nobody_touched_changes_nothing() -> None:
    rows, times = a_log()
    few, many = facts(rows, times), facts(rows, times, num_rows=2 * ROWS)
    np.testing.assert_array_equal(scores(a_batch([HISTORY]), many)[:, :ROWS], scores(a_batch([HISTORY]), few))


def test_no_parameter_belongs_to_an_item() -> None:
    """Card: about 45,000 parameters; 5,100 more here for the output projections of attention."""
    one, two = (make(PUBLISHED, num_rows=n) for n in (1024, 8192))
    shapes = [jax.tree.map(lambda p: p.shape, jax.eval_shape(m.init, jax.random.key(0))) for m in (one, two)]
    assert shapes[0] == shapes[1]
    sizes = [int(np.prod(s)) for s in jax.tree.leaves(shapes[0], is_leaf=lambda x: isinstance(x, tuple))]
    assert sum(sizes) == 18_950 + 25_900 + 100 + 2 * 2_550
    axes = jax.tree.leaves(one.axes, is_leaf=lambda x: isinstance(x, tuple))
    assert not any("items" in names for names in axes)


@pytest.mark.parametrize("settings", [{}, {"gap": "after", "count_from": "end"}])
def test_packed_rows_equal_rows_of_their_own(settings: dict[str, Any]) -> None:
    known, model = facts(*a_log()), make(SMALL, **settings)
    _, packed = _scores(model, PARAMS, {**a_batch([HISTORY, OTHER]), **known})
    _, alone = _scores(model, PARAMS, {**a_batch([HISTORY], [OTHER]), **known})
    np.testing.assert_allclose(packed[0, :5], alone[0, :5], atol=1e-5)
    np.testing.assert_allclose(packed[0, 5:8], alone[1, :3], atol=1e-5)


@pytest.mark.parametrize("gap_rank", ["past", "none"])
def test_no_event_knows_a_later_one(gap_rank: str) -> None:
    model = make(gap_rank=gap_rank)
    known = facts(*a_log())
    later = [*HISTORY[:3], (20, 200), (21, 201)]
    one, two = (_scores(model, PARAMS, {**a_batch([h]), **known})[1] for h in (HISTORY, later))
    np.testing.assert_allclose(one[0, :3], two[0, :3], atol=1e-5)
    assert np.abs(one[0, 3] - two[0, 3]).max() > 1e-3


def test_vectors_of_training_are_those_of_evaluation() -> None:
    """At the time of each slot's query: those of the last slot of each row are the catalogue of the row."""
    batch = {**a_batch([HISTORY], [OTHER], [HISTORY[:2]]), **facts(*a_log())}

    @jax.jit
    def both(batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        trained = MODEL.apply(PARAMS, batch, train=True, key=None)["table"]
        ids = jnp.broadcast_to(jnp.arange(ROWS), (3, LENGTH, ROWS))
        return trained.rows(ids), MODEL.apply(PARAMS, batch, train=False, key=None)["table"]

    rows, table = both(batch)
    for i, last in enumerate((4, 2, 1)):
        np.testing.assert_allclose(rows[i, last], table[i], atol=1e-5)
    _, table = both({**batch, "query_at": np.array([[1, 3], [2, 0], [0, -1]], np.int32)})
    assert table.shape == (6, ROWS, 10)
    for i, (row, slot) in enumerate([(0, 1), (0, 3), (1, 2), (1, 0), (2, 0)]):
        np.testing.assert_allclose(rows[row, slot], table[i], atol=1e-5)


def test_rows_on_several_devices_are_those_of_one() -> None:
    batch = {**a_batch(*([h] for h in (HISTORY, OTHER, HISTORY[:2], OTHER[:2]) * 2)), **facts(*a_log())}

    def table(batch: dict[str, Any]) -> jax.Array:
        return MODEL.apply(PARAMS, batch, train=False, key=None)["table"]

    expected = jax.jit(table)(batch)
    mesh = make_mesh(MeshConfig(shape="data=4,model=2", preset="fsdp_model"))
    by_row = {name: mesh.sharding(("items",) if np.ndim(x) else ()) for name, x in batch.items() if "item/" in name}
    by_batch = {name: mesh.sharding(("batch",)) for name in batch if "item/" not in name}
    placed = jax.device_put(batch, {**by_row, **by_batch})
    with mesh.activate():
        found = jax.jit(lambda b: table(b))(placed)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("bins", [{"coarse_bins": 0}, {"fine_bins": 0}])
def test_one_horizon_alone(bins: dict[str, Any]) -> None:
    model = make(SMALL, **bins)
    params = model.init(jax.random.key(0))
    assert params["inner"].shape[0] == (6 if "coarse_bins" in bins else 132)
    assert np.ptp(scores(a_batch([HISTORY]), facts(*a_log()), model, params)[0, 2 : 2 + ITEMS]) > 1e-3


def test_what_is_missing_from_the_recipe_is_told() -> None:
    batch, known = a_batch([HISTORY]), facts(*a_log())
    with pytest.raises(ConfigError, match="popularity.Dynamics"):
        scores(batch, {})
    with pytest.raises(ConfigError, match="Feed.times"):
        scores({name: x for name, x in batch.items() if name != "query_time"}, known)


@pytest.mark.parametrize(
    "bad",
    [
        {"coarse_bins": 0, "fine_bins": 0},
        {"coarse_history": 0},
        {"fine_bins": -1},
        {"gap_rank": "seconds"},
        {"gap": "both"},
    ],
)
def test_settings_that_make_no_model(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="PrepRec"):
        PrepRec(num_rows=ROWS, encoder=SMALL, rngs=Rngs(params=0), **bad)
    with pytest.raises(ConfigError, match="fixed sinusoids"):
        PrepRec(num_rows=ROWS, encoder=TransformerConfig(position="learned"), rngs=Rngs(params=0))
