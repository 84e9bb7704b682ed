"""Turns public sets of TensorFlow Datasets into data directories (`recjax prepare --from tfds:movielens/1m-ratings`).

TFDS stores examples shuffled by a hash of their row number, so the order of the published file, which decides ties
between equal timestamps, is restored from that hash. TensorFlow is imported inside functions only; no training
process comes here. Sets whose meaning is not known here are refused rather than guessed at.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.columns import read_ids
from recjax.data.directory import check_free, write_directory
from recjax.data.problems import Findings, nearest

PREFIX = "tfds:"
# whether the published file lists its ratings user by user, which tells whether its order was restored
SETS = {
    "movielens/100k": False,
    "movielens/1m": True,
    "movielens/20m": True,
    "movielens/25m": True,
    "movielens/latest-small": True,
}
_USER_COLUMNS = {
    "user_gender": "gender",
    "raw_user_age": "age",
    "bucketized_user_age": "age_group",
    "user_occupation_text": "occupation",
    "user_zip_code": "zip",
}
_BATCH = 16_384


def import_tfds(name: str, out_dir: str | Path, data_dir: str | Path | None = None) -> Path:
    """Write the set `name` ("movielens/1m-ratings", "tfds:movielens/1m") as a data directory at `out_dir`.

    `data_dir` is where TFDS keeps prepared sets (its default when None); what is there is not downloaded again. The
    directory holds interactions (user_id, item_id, rating, timestamp, in the order of the published file), items
    (title, genres) and, for sets that have them, users. Raises `DataError` for a set that is not known here, when
    something is at `out_dir` already, without TensorFlow, and when the download fails.
    """
    base = name.removeprefix(PREFIX).removesuffix("-ratings")
    if base not in SETS:
        close = nearest(base, SETS)
        raise DataError(
            f"no TFDS set {name!r} is known here",
            expected=f"one of {', '.join(f'{PREFIX}{s}-ratings' for s in SETS)}",
            mend=f"did you mean {PREFIX}{close}-ratings?" if close else "write its tables as Parquet by yourself",
        )
    out = check_free(out_dir)
    builder = _prepared(f"{base}-ratings", data_dir)
    ratings, movies, users = _read(builder)
    ratings = _in_file_order(ratings, builder, by_user=SETS[base])
    # the set of movies alone also lists those that nobody rated
    catalogue = _read(_prepared(f"{base}-movies", data_dir))[1]
    items = pl.concat([catalogue, movies]).unique("item_id", keep="first", maintain_order=True)
    frames = {"interactions": ratings, "items": items, "users": users}
    typed = {key: None if frame is None else _type_ids(frame) for key, frame in frames.items()}
    for key, column in (("items", "item_id"), ("users", "user_id")):
        frame = typed[key]
        typed[key] = None if frame is None else frame.sort(column)
    return write_directory(out, typed)


def _prepared(name: str, data_dir: str | Path | None) -> Any:
    """The TFDS builder of a set, downloaded and prepared."""
    try:
        tfds = importlib.import_module("tensorflow_datasets")
    except ImportError as e:
        raise _not_installed(e) from None
    try:
        builder = tfds.builder(name, data_dir=None if data_dir is None else str(Path(data_dir).expanduser()))
        builder.download_and_prepare()
    except ImportError as e:  # TFDS imports much of itself at first use
        raise _not_installed(e) from None
    except Exception as e:  # the network, the disk, a checksum: each library below has its own exceptions
        text = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise DataError(
            f"{PREFIX}{name} could not be downloaded: {type(e).__name__}: {text}",
            where=str(data_dir or "the default TFDS data_dir (~/tensorflow_datasets)"),
            expected="a prepared set there, or a way to its server",
            mend="try again later; or prepare the set with tensorflow_datasets on a machine with network, copy that "
            "folder here and name it as data_dir",
        ) from None
    return builder


def _not_installed(e: ImportError) -> DataError:
    return DataError(
        f"TensorFlow Datasets cannot be imported: {e}",
        expected="tensorflow and tensorflow-datasets with what they need, which exist for Python 3.11",
        mend='pip install "recjax[seqio]"',
    )


def _read(builder: Any) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame | None]:
    """Ratings, movies and users of a prepared set, in the order in which TFDS stores them."""
    tfds = importlib.import_module("tensorflow_datasets")
    features = builder.info.features
    genre_names = pl.Series(features["movie_genres"].feature.names)
    described = [c for c in _USER_COLUMNS if c in features]
    one_by_one = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    stored = builder.as_dataset(split="train", shuffle_files=False, read_config=one_by_one)
    ratings, movies, users = [], [], []
    seen: set[bytes] = set()
    for batch in stored.ragged_batch(_BATCH).as_numpy_iterator():
        first = [k for k, movie in enumerate(batch["movie_id"].tolist()) if not (movie in seen or seen.add(movie))]
        genres = batch["movie_genres"]
        lists = [genre_names[genres[k]].to_list() for k in first]
        movies.append(
            pl.DataFrame(
                {
                    "item_id": _text(batch["movie_id"][first]),
                    "title": _text(batch["movie_title"][first]),
                    "genres": pl.Series(lists, dtype=pl.List(pl.String)),
                }
            )
        )
        if "user_id" not in features:
            continue
        columns = {"user_id": _text(batch["user_id"]), "item_id": _text(batch["movie_id"])}
        ratings.append(pl.DataFrame({**columns, "rating": batch["user_rating"], "timestamp": batch["timestamp"]}))
        if described:
            columns = {"user_id": _text(batch["user_id"])}
            for column in described:
                values = batch[column]
                columns[_USER_COLUMNS[column]] = _text(values) if values.dtype == object else pl.Series(values)
            users.append(pl.DataFrame(columns).unique("user_id", keep="first", maintain_order=True))
    everyone = pl.concat(users).unique("user_id", keep="first", maintain_order=True) if users else None
    if everyone is not None and "gender" in everyone.columns:
        gender = pl.when(pl.col("gender")).then(pl.lit("M")).otherwise(pl.lit("F"))
        everyone = everyone.with_columns(gender.alias("gender"))
    return pl.concat(ratings) if ratings else pl.DataFrame(), pl.concat(movies), everyone


def _text(values: np.ndarray) -> pl.Series:
    return pl.Series(values.tolist(), dtype=pl.Binary).cast(pl.String).str.strip_chars()


def _in_file_order(ratings: pl.DataFrame, builder: Any, *, by_user: bool) -> pl.DataFrame:
    """The ratings in the order of the published file.

    TFDS sorts by the MD5 of (split name, row number); sorting the row numbers in the same way tells which row each
    stored example was. For files that go user by user the result is checked.
    """
    if builder.info.disable_shuffling:
        return ratings
    salted = hashlib.md5(b"train", usedforsecurity=False)

    def digest(row: int) -> bytes:
        salted_row = salted.copy()
        salted_row.update(b"%d" % row)
        return salted_row.digest()

    row_of = sorted(range(ratings.height), key=digest)
    restored = ratings.with_columns(row=pl.Series(row_of, dtype=pl.Int64)).sort("row").drop("row")
    runs = int((restored["user_id"] != restored["user_id"].shift(1)).fill_null(True).sum())
    if by_user and runs != restored["user_id"].n_unique():
        raise DataError(
            "the order of the published file cannot be restored from what TFDS stored",
            where=f"{builder.info.full_name} in {builder.data_dir}",
            expected="examples stored in the order of their hashed row numbers, one user after another",
            mend="remove that folder, so that it is prepared anew by tensorflow-datasets 4.9 or later",
        )
    return restored


def _type_ids(frame: pl.DataFrame) -> pl.DataFrame:
    """user_id and item_id as whole numbers when all are."""
    for column in {"user_id", "item_id"} & set(frame.columns):
        ids = read_ids(frame[column], Findings(), column, from_text=True)
        frame = frame if ids is None else frame.with_columns(ids[0].alias(column))
    return frame
