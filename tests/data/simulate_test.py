"""The simulated world: same bytes everywhere, the shape of a real log, and a next item worth predicting."""

import hashlib
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.data import lexicon
from recjax.data.draws import Stream, halving, power
from recjax.data.identity import source_hash
from recjax.data.simulate import START, World, write
from recjax.data.simulate_log import PERIODS, YEAR, history_lengths
from recjax.data.sources import DataDir

SMALL = World(num_events=1000, seed=3, searches=True)


def digest(tables) -> str:
    """SHA-256 over every value of every table, whatever the file format."""
    content = hashlib.sha256()
    for frame in (tables.interactions, tables.items, tables.users, tables.queries, tables.relevance):
        for column in frame:
            content.update(column.name.encode())
            text = column.to_list() if column.dtype == pl.String else column.cast(pl.Int64).fill_null(-1).to_list()
            content.update("\n".join(map(str, text)).encode())
    array, ids = tables.vectors["content"]
    content.update(array.astype("<f4").tobytes() + ids.astype("<i8").tobytes())
    return content.hexdigest()


def test_one_seed_gives_the_same_bytes_on_every_machine(small):
    assert digest(small) == "7bca21b574d11c6275ce3b57519a0834b2f924e14f3183e955234147e69cb062"
    assert World(num_events=1000).hash == "eac02974c56b0375ed710e82420bcadd2dcf008d5029b52f355a5adeb8f8cfdf"


def test_seeds_and_settings_give_other_worlds(small):
    others = [replace(SMALL, seed=4), replace(SMALL, zipf=1.0)]
    assert len({digest(small), *(digest(w.tables()) for w in others)}) == 3
    assert len({w.hash for w in (SMALL, *others)}) == 3


def test_streams_are_raw_philox_and_weights_are_powers():
    assert Stream(7, 1).below(1000, 5).tolist() == [882, 369, 517, 331, 718]
    numbers = Stream(7, 2).below(6, 60_000)
    assert abs(np.bincount(numbers, minlength=6) - 10_000).max() < 500
    assert sorted(Stream(1, 1).order(50).tolist()) == list(range(50))
    base = np.array([1.0, 2.0, 7.5, 1000.0])
    for sixteenths in (-33, -12, 0, 5, 16, 40):
        np.testing.assert_allclose(power(base, sixteenths), base ** (sixteenths / 16), rtol=1e-12)
    np.testing.assert_allclose(halving(16), 1024 * 2 ** (-np.arange(65) / 16), atol=0.51)


@pytest.fixture(scope="module")
def small():
    return SMALL.tables()


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def tables(world):
    return world.tables()


def test_shape_of_the_tables(world, tables):
    log = tables.interactions
    assert log.height == world.num_events and tables.simulated
    assert log.columns == ["user_id", "item_id", "timestamp", "order"]
    assert log["user_id"].n_unique() == world.users == tables.users.height
    assert tables.items["item_id"].to_list() == list(range(1, world.items + 1))
    again = log.sort("user_id", "timestamp", maintain_order=True)
    assert again.equals(log)
    assert log["order"].to_list() == [
        k for n in log.group_by("user_id", maintain_order=True).len()["len"] for k in range(n)
    ]
    assert log["timestamp"].min() >= START and log["timestamp"].max() < START + 2 * YEAR
    assert log["item_id"].is_in(tables.items["item_id"].implode()).all()
    assert all(frame.null_count().sum_horizontal().item() == 0 for frame in (log, tables.items, tables.users))


def test_no_item_comes_twice_or_before_its_birth(world, tables):
    log = tables.interactions
    repeats = log.height - log.select("user_id", "item_id").n_unique()
    assert repeats <= log.height // 1000
    laws = world.laws()
    events = world.log(laws)
    period = np.minimum(events.seconds * PERIODS // YEAR, PERIODS - 1)
    assert (laws.weight[period, events.item] > 0).all()


def test_popularity_is_long_tailed_and_drifts(world, tables):
    counts = tables.interactions["item_id"].value_counts()["count"].sort(descending=True)
    assert counts.head(world.items // 10).sum() > 0.25 * world.num_events
    assert counts.head(world.items // 10).sum() < 0.60 * world.num_events
    half = tables.interactions.with_columns(late=pl.col("timestamp") > START + YEAR // 2)
    early, late = (half.filter(pl.col("late") == x)["item_id"].value_counts(sort=True).head(100) for x in (False, True))
    assert len(set(early["item_id"]) & set(late["item_id"])) < 70


def test_lengths_add_up_and_are_skewed():
    lengths = history_lengths(0, 1000, 20_000)
    assert lengths.sum() == 20_000 and (np.diff(lengths) <= 0).all() and lengths[-1] >= 1
    assert lengths[0] > 5 * 20 and np.median(lengths) < 20
    assert (lengths < 3).any()


def test_sessions_are_bursts(world, tables):
    gaps = tables.interactions.select(pl.col("timestamp").diff().over("user_id")).drop_nulls().to_series()
    assert (gaps > 0).all()
    share = (gaps < 700).mean()
    assert abs(share - (1 - 1 / world.session_length)) < 0.03


def recall_at_10(score, histories, targets):
    """Leave-one-out over the whole catalogue, seen items removed."""
    score = np.array(score, np.float64)
    for row, seen in enumerate(histories):
        score[row, seen] = -np.inf
    own = score[np.arange(len(targets)), targets][:, None]
    return ((score > own).sum(1) < 10).mean()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_next_item_is_far_more_predictable_than_counts_can_tell(seed):
    world = World(seed=seed)
    laws = world.laws()
    log = world.log(laws)
    starts = np.flatnonzero(np.diff(log.user, prepend=-1))
    parts = [p for p in np.split(np.arange(len(log.user)), starts[1:]) if len(p) >= 4]
    ends = np.array([p[-1] for p in parts])
    users, target = log.user[ends], log.item[ends]
    seen, train = [log.item[p[:-1]] for p in parts], [log.item[p[:-2]] for p in parts]

    items = len(laws.genre)
    follows, bought = np.zeros((items, items)), np.zeros((len(parts), items))
    for row, items_of in enumerate(train):
        np.add.at(follows, (items_of[:-1], items_of[1:]), 1)
        bought[row, items_of] = 1
    popular = bought.sum(0)
    together = bought.T @ bought / np.sqrt(np.maximum(np.outer(popular, popular), 1))
    np.fill_diagonal(together, 0)
    period = np.minimum(log.seconds[ends] * PERIODS // YEAR, PERIODS - 1)
    best = laws.next_item(users, log.item[ends - 1], log.item[ends - 2], period)
    np.testing.assert_allclose(best.sum(1), 1, rtol=1e-9)

    recalls = {
        "popularity": recall_at_10(np.tile(popular, (len(parts), 1)), seen, target),
        "transitions": recall_at_10(follows[log.item[ends - 1]] + popular * 1e-6, seen, target),
        "item-kNN": recall_at_10(bought @ together, seen, target),
        "oracle": recall_at_10(best, seen, target),
    }
    others = max(v for name, v in recalls.items() if name != "oracle")
    assert recalls["oracle"] > 0.28 and recalls["oracle"] > 1.8 * others, recalls
    assert recalls["popularity"] < 0.1, recalls


def test_the_oracle_knows_the_frequencies_of_what_happens():
    """Predicted genres and moods of all next events sum to those that came (law of large numbers)."""
    world = World(num_events=30_000, seed=5)
    laws = world.laws()
    log = world.log(laws)
    at = np.flatnonzero(log.user[2:] == log.user[:-2]) + 2
    genres = laws.genre_chances(log.user[at], log.item[at - 1])
    moods = laws.mood_chances(log.user[at], log.item[at - 1], log.item[at - 2])
    came = np.bincount(laws.genre[log.item[at]], minlength=laws.num_genres) / len(at)
    np.testing.assert_allclose(genres.mean(0), came, atol=0.02)
    hit = moods[np.arange(len(at)), laws.mood[log.item[at]]]
    assert abs(hit.mean() - (moods**2).sum(1).mean()) < 0.03


def test_words_say_what_items_are(tables):
    items = tables.items
    assert items["title"].n_unique() == items.height
    lower = items.with_columns(pl.col("title").str.to_lowercase())
    assert lower.select(pl.col("title").str.contains(pl.col("genre"), literal=True)).to_series().all()
    says_mood = lower.select(pl.col("title").str.contains(pl.col("mood"), literal=True)).to_series().mean()
    assert 0.7 < says_mood < 0.9
    names = {lexicon.name(k) for k in range(50_000)}
    assert len(names) == 50_000 and all(n.isalpha() for n in names)
    assert len({lexicon.genre_word(k) for k in range(lexicon.MAX_GENRES)}) == lexicon.MAX_GENRES


def test_queries_find_what_they_name(tables):
    assert tables.queries["text"].n_unique() == tables.queries.height
    judged = tables.relevance.join(tables.queries, on="query_id").join(tables.items, on="item_id")
    assert judged.height == tables.relevance.height and set(judged["label"]) == {1, 2, 3}
    assert tables.relevance.select("query_id", "item_id").n_unique() == judged.height
    by_name = judged.filter(label=3).with_columns(pl.col("title").str.to_lowercase())
    assert by_name.select(pl.col("title").str.contains(pl.col("text"), literal=True)).to_series().all()
    cell = judged.filter(label=2).filter(~pl.col("text").str.contains(" by "))
    assert (cell["text"] == cell["mood"] + " " + cell["genre"]).all()
    near = judged.filter(label=1)
    said = near["text"].str.contains(near["genre"], literal=True)
    assert said.all() and not near["text"].str.contains(near["mood"], literal=True).any()


def test_content_vectors_of_a_cell_lie_together(world, tables):
    array, ids = tables.vectors["content"]
    assert array.dtype == np.float32 and ids.tolist() == tables.items["item_id"].to_list()
    cell = (tables.items["genre"] + tables.items["mood"]).to_numpy()
    distance = ((array[:, None] - array) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    assert (cell[distance.argmin(1)] == cell).mean() > 0.9


def test_searches_open_sessions_with_the_query_of_what_follows(small):
    tables = small
    asked = (
        tables.interactions.drop_nulls("query_id").join(tables.queries, on="query_id").join(tables.items, on="item_id")
    )
    assert 0.05 < asked.height / tables.interactions.height < 0.25
    assert (asked["text"] == asked["mood"] + " " + asked["genre"]).all()


def test_ratings_tell_taste_and_change_nothing_else(small):
    world = replace(SMALL, ratings=True)
    rated = world.tables()
    assert digest(replace(rated, interactions=rated.interactions.drop("rating"))) == digest(small)
    assert world.hash != SMALL.hash
    ratings = rated.interactions["rating"]
    shares = np.bincount(ratings, minlength=6)[1:] / len(ratings)
    assert ratings.min() == 1 and ratings.max() == 5 and shares.min() > 0.02 and shares.max() < 0.5
    # The mean of the user's other ratings of the genre says more than that of all of them.
    log = rated.interactions.join(rated.items.select("item_id", "genre"), on="item_id")
    others = (pl.col("rating").sum() - pl.col("rating")) / (pl.len() - 1)
    log = log.with_columns(of_genre=others.over("user_id", "genre"), of_all=others.over("user_id")).drop_nans()
    by_genre, by_user = (log.select(pl.corr("rating", name)).item() for name in ("of_genre", "of_all"))
    assert by_genre > by_user + 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"num_events": 1},
        {"num_events": 64, "num_users": 64},
        {"num_events": 300, "num_items": 10, "num_genres": 1, "num_moods": 1},
    ],
)
def test_worlds_of_any_size(settings):
    world = World(**settings)
    tables = world.tables()
    assert tables.interactions.height == world.num_events
    assert tables.interactions["user_id"].n_unique() <= world.users


def test_written_worlds_load_again_the_same_and_say_they_are_simulated(tmp_path, small):
    write(SMALL, tmp_path / "a")
    loaded, tables = DataDir(path=str(tmp_path / "a")).load(), small
    assert loaded.simulated and not loaded.warnings
    for name in ("interactions", "items", "users", "queries", "relevance"):
        assert getattr(loaded, name).equals(getattr(tables, name)), name
    assert np.array_equal(loaded.vectors["content"][0], tables.vectors["content"][0])
    write(SMALL, tmp_path / "b")
    for file in sorted(p for p in (tmp_path / "a").rglob("*") if p.is_file()):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(DataError, match="will not be overwritten"):
        write(SMALL, tmp_path)
    with pytest.raises(DataError, match="will not be overwritten"):
        write(SMALL, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "x"


def test_the_default_data_directory_is_the_simulated_world():
    assert source_hash(DataDir(simulate=SMALL)) == SMALL.hash


@pytest.mark.parametrize(
    "settings",
    [
        {"num_events": 0},
        {"zipf": -1.0},
        {"stay": 0.8, "step": 0.3},
        {"num_moods": 99},
        {"num_users": 21_000},
        {"seed": -1},
    ],
)
def test_settings_that_make_no_world(settings):
    with pytest.raises(ConfigError, match="World"):
        World(**settings)
