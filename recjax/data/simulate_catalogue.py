"""Items, users, queries and judgments of the simulated world, in words that follow from its hidden laws."""

from __future__ import annotations

import numpy as np
import polars as pl

from recjax.data import lexicon
from recjax.data.draws import Stream
from recjax.data.simulate_log import PERIODS, Laws

_JUDGED = 20  # items of a query, at most
_FIRST_YEAR = 2020


def item_ids(seed: int, items: int) -> np.ndarray:
    """int64 [items]: the id of each item, 1..items shuffled, so that ids say nothing about the laws."""
    return Stream(seed, 20).order(items) + 1


def _makers(seed: int, laws: Laws) -> np.ndarray:
    """int64 [items]: number of the maker of each item; a maker works in one genre and has some twenty items."""
    per_genre = max(1, len(laws.genre) // (_JUDGED * laws.num_genres))
    return laws.genre * per_genre + Stream(seed, 21).below(per_genre, len(laws.genre))


def _maker_name(maker: int) -> str:
    return lexicon.name(lexicon.MAX_NAMES - 1 - maker)


def make_items(seed: int, laws: Laws) -> pl.DataFrame:
    """One row for each item, by item_id: title, genre, mood, maker, year, description."""
    ids, makers = item_ids(seed, len(laws.genre)), _makers(seed, laws)
    years = _FIRST_YEAR + laws.birth // (PERIODS // 2)
    patterns, phrases = Stream(seed, 22).below(1000, len(ids)), Stream(seed, 23).below(1000, len(ids))
    columns: dict[str, list] = {c: [] for c in ("title", "genre", "mood", "maker", "description")}
    for k in range(len(ids)):
        words = {"mood": lexicon.MOODS[laws.mood[k]], "genre": lexicon.genre_word(int(laws.genre[k]))}
        maker = _maker_name(int(makers[k]))
        columns["title"].append(lexicon.title(int(patterns[k]), name=lexicon.name(k), **words))
        columns["genre"].append(words["genre"])
        columns["mood"].append(words["mood"])
        columns["maker"].append(maker)
        sentence = lexicon.description(int(phrases[k]), maker=maker, year=str(years[k]), **words)
        columns["description"].append(sentence)
    return pl.DataFrame({"item_id": ids, **columns, "year": years}).sort("item_id")


def make_users(seed: int, users: int) -> pl.DataFrame:
    """One row for each user: country and age, neither of which says anything about taste."""
    country = pl.Series(lexicon.COUNTRIES)[Stream(seed, 24).below(len(lexicon.COUNTRIES), users)]
    age = Stream(seed, 25).below(60, users) + 15
    return pl.DataFrame({"user_id": np.arange(1, users + 1), "country": country, "age": age})


def make_vectors(seed: int, laws: Laws) -> tuple[np.ndarray, np.ndarray]:
    """Content vectors float32 [items, width] by item_id: place of the genre, a shift for the mood, and noise."""
    ids, width = item_ids(seed, len(laws.genre)), laws.centres.shape[1]
    shift = Stream(seed, 26).below(9, laws.num_moods * width).reshape(-1, width) - 4
    noise = Stream(seed, 27).below(5, len(ids) * width).reshape(-1, width) - 2
    vectors = (laws.centres[laws.genre] * 2 + shift[laws.mood] * 2 + noise).astype(np.float32) / 16
    by_id = np.argsort(ids)
    return vectors[by_id], ids[by_id]


def make_queries(seed: int, laws: Laws) -> tuple[pl.DataFrame, pl.DataFrame, np.ndarray]:
    """Queries (query_id, text), judgments (query_id, item_id, label 1..3), and the query of each cell.

    "quiet mystery" finds its cell (label 2) and the next mood of its genre (1); "mystery by Velora" finds a maker's
    items (2); the name of an item finds that item (3). The last array maps a cell to its query_id, 0 where empty.
    """
    ids, makers, rank = item_ids(seed, len(laws.genre)), _makers(seed, laws), laws.weight.sum(0)
    cell = laws.genre * laws.num_moods + laws.mood
    best = np.argsort(-rank, kind="stable")
    texts: list[str] = []
    judged: list[tuple[int, np.ndarray, int]] = []

    def add(text: str, *found: tuple[np.ndarray, int]) -> int:
        texts.append(text)
        judged.extend((len(texts), items, label) for items, label in found)
        return len(texts)

    of_cell = np.zeros(laws.num_genres * laws.num_moods, np.int64)
    by_cell = _groups(cell[best], best, len(of_cell))
    for k in np.flatnonzero(np.diff(laws.starts)):
        genre, mood = divmod(int(k), laws.num_moods)
        near = by_cell[genre * laws.num_moods + int(laws.next_mood[mood])]
        near = near if laws.next_mood[mood] != mood else near[:0]
        text = f"{lexicon.MOODS[mood]} {lexicon.genre_word(genre)}"
        of_cell[k] = add(text, (by_cell[k][:_JUDGED], 2), (near[: _JUDGED // 4], 1))
    by_maker = _groups(makers[best], best, int(makers.max()) + 1)
    for maker, items in enumerate(by_maker):
        if len(items):
            text = f"{lexicon.genre_word(int(laws.genre[items[0]]))} by {_maker_name(maker)}".lower()
            add(text, (items[:_JUDGED], 2))
    for k in range(0, len(ids), 4):
        add(lexicon.name(k).lower(), (np.array([k]), 3))
    queries = pl.DataFrame({"query_id": np.arange(1, len(texts) + 1), "text": texts})
    sizes = [len(items) for _, items, _ in judged]
    relevance = pl.DataFrame(
        {
            "query_id": np.repeat([q for q, _, _ in judged], sizes),
            "item_id": ids[np.concatenate([items for _, items, _ in judged])],
            "label": np.repeat([label for _, _, label in judged], sizes),
        }
    )
    return queries, relevance, of_cell


def _groups(keys: np.ndarray, values: np.ndarray, num_keys: int) -> list[np.ndarray]:
    """The values of each key 0..num_keys-1, in the order in which they came."""
    order = np.argsort(keys, kind="stable")
    return np.split(values[order], np.searchsorted(keys[order], np.arange(1, num_keys)))
