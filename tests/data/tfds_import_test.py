"""Importing TFDS sets: the real MovieLens builders run over small made-up files, without network."""

import sys

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import DataError
from recjax.data.sources import DataDir
from recjax.data.tfds_import import import_tfds

RNG = np.random.default_rng(0)
GENRES = ["Action", "Comedy", "Drama", "Film-Noir"]
MOVIES = [(m, f"Müvie {m} (19{m % 90 + 10})", [GENRES[m % 4], "War"][: 1 + m % 2]) for m in range(1, 61)]
# user by user, many equal timestamps, movies 51..60 never rated
RATINGS = [
    (u, int(m), int(RNG.integers(1, 6)), 900_000_000 + int(RNG.integers(0, 4)))
    for u in range(1, 31)
    for m in RNG.permutation(50)[:20] + 1
]


def write_1m(folder):
    folder.mkdir(parents=True)
    lines = {
        "movies.dat": [f"{m}::{title}::{'|'.join(genres)}" for m, title, genres in MOVIES],
        "users.dat": [f"{u}::{'FM'[u % 2]}::25::{u % 21}::{10000 + u}" for u in range(1, 31)],
        "ratings.dat": ["::".join(map(str, r)) for r in RATINGS],
    }
    for name, text in lines.items():
        (folder / name).write_bytes("".join(f"{line}\n" for line in text).encode("latin1"))


def write_csv(folder):
    folder.mkdir(parents=True)
    movies = "".join(f'{m},"{title}",{"|".join(genres)}\n' for m, title, genres in MOVIES)
    (folder / "movies.csv").write_text("movieId,title,genres\n" + movies, encoding="utf-8")
    ratings = "".join(f"{u},{m},{r}.5,{t}\n" for u, m, r, t in RATINGS)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + ratings, encoding="utf-8")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Stands in for the server: what would be downloaded and unpacked is made here."""
    import tensorflow_datasets as tfds

    write_1m(tmp_path / "server/ml-1m")
    write_csv(tmp_path / "server/ml-latest-small")
    asked = []

    def fetch(self, url):
        asked.append(url)
        return tmp_path / "server"

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fetch)
    return asked


@pytest.mark.tensorflow
def test_ml_1m_comes_back_row_by_row(tmp_path, published):
    out = import_tfds("tfds:movielens/1m-ratings", tmp_path / "out", data_dir=tmp_path / "tfds")
    log = pl.read_parquet(out / "interactions.parquet")
    assert log.columns == ["user_id", "item_id", "rating", "timestamp"]
    assert log.rows() == RATINGS  # in the order of ratings.dat, though TFDS stored them shuffled

    items = pl.read_parquet(out / "items.parquet")
    assert items.rows() == MOVIES  # with those that nobody rated
    users = pl.read_parquet(out / "users.parquet")
    assert users["user_id"].to_list() == list(range(1, 31))
    assert users.row(2, named=True)["gender"] == "M" and users.row(2, named=True)["zip"] == "10003"
    assert {"age_group", "occupation"} <= set(users.columns)

    tables = DataDir(path=str(out)).load()
    expected = sorted(RATINGS, key=lambda r: (r[0], r[3]))  # stable: ties in file order
    assert tables.interactions["item_id"].to_list() == [r[1] for r in expected]
    assert not tables.warnings

    count = len(published)
    import_tfds("movielens/1m", tmp_path / "again", data_dir=tmp_path / "tfds")
    assert len(published) == count  # what is prepared is not downloaded again


@pytest.mark.tensorflow
def test_sets_without_users_and_with_half_stars(tmp_path, published):
    out = import_tfds("movielens/latest-small-ratings", tmp_path / "out", data_dir=tmp_path / "tfds")
    assert pl.read_parquet(out / "interactions.parquet")["rating"].to_list() == [r[2] + 0.5 for r in RATINGS]
    assert sorted(p.name for p in out.iterdir()) == ["interactions.parquet", "items.parquet"]


@pytest.mark.tensorflow
def test_a_stored_order_that_is_not_the_hashed_one_is_refused(tmp_path, published, monkeypatch):
    from tensorflow_datasets.core import hashing

    monkeypatch.setattr(hashing.Hasher, "hash_key", lambda self, key: hash((key, "other")) % 2**128)
    with pytest.raises(DataError, match="order of the published file cannot be restored"):
        import_tfds("movielens/1m", tmp_path / "out", data_dir=tmp_path / "tfds")
    assert not (tmp_path / "out").exists()


@pytest.mark.tensorflow
def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def fail(self, url):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fail)
    with pytest.raises(DataError, match="no route to host") as e:
        import_tfds("movielens/100k-ratings", tmp_path / "out", data_dir=tmp_path / "tfds")
    assert "data_dir" in e.value.mend and not (tmp_path / "out").exists()


def test_without_tensorflow_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match="cannot be imported") as e:
        import_tfds("movielens/100k", tmp_path / "out")
    assert "recjax[seqio]" in e.value.mend


def test_unknown_sets_and_taken_places_are_refused_before_any_work(tmp_path):
    with pytest.raises(DataError, match="movielens/10m-ratings") as e:
        import_tfds("tfds:movielens/10m-ratings", tmp_path / "out")
    assert "movielens/" in e.value.mend and "movielens/1m-ratings" in e.value.expected
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(DataError, match="will not be overwritten"):
        import_tfds("movielens/1m", tmp_path / "out")
