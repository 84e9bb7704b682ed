"""Data directories: what loads, in which order, and the message for everything that does not."""

import gzip
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import DataError
from recjax.data.identity import source_hash
from recjax.data.sources import DataDir
from recjax.data.titles import title_column

T = 1_700_000_000
LOG = {"user_id": [2, 1, 1, 2, 1], "item_id": [7, 5, 9, 7, 9], "timestamp": [T + 30, T + 20, T + 10, T + 10, T + 20]}
CSV = "user_id,item_id,timestamp\n1,5,1700000000\n"


def put(folder, **tables):
    for name, columns in tables.items():
        pl.DataFrame(columns).write_parquet(folder / f"{name}.parquet")
    return str(folder)


def log(folder, columns=None):
    return DataDir(path=str(folder), columns=columns or {}).load().interactions


def refuses(folder, columns=None, *, match, where="", mend=""):
    with pytest.raises(DataError) as e:
        DataDir(path=str(folder), columns=columns or {}).load()
    assert match in e.value.what and where in e.value.where and mend in e.value.mend, str(e.value)
    assert e.value.where.startswith(str(folder))


def test_events_are_sorted_by_user_then_time_then_place_in_the_file(tmp_path):
    put(tmp_path, interactions=LOG | {"rating": [1, 2, 3, 4, 5]})
    frame = log(tmp_path)
    assert frame["user_id"].to_list() == [1, 1, 1, 2, 2]
    assert frame["rating"].to_list() == [3, 2, 5, 4, 1]
    assert frame["order"].to_list() == [0, 1, 2, 0, 1] and frame["order"].dtype == pl.Int64
    assert frame["timestamp"].dtype == pl.Int64


@pytest.mark.parametrize("seed", range(3))
def test_order_equals_a_stable_sort_in_plain_python(tmp_path, seed):
    rng = np.random.default_rng(seed)
    n = 400
    rows = [{"user_id": int(u), "item_id": int(i), "timestamp": int(t), "position": int(p), "row": k}
            for k, (u, i, t, p) in enumerate(rng.integers(0, [9, 50, 20, 3], (n, 4)))]  # fmt: skip
    put(tmp_path, interactions=rows)
    expected = sorted(rows, key=lambda r: (r["user_id"], r["timestamp"], r["position"]))
    assert log(tmp_path)["row"].to_list() == [r["row"] for r in expected]


def test_position_alone_orders_and_milliseconds_order_within_a_second(tmp_path):
    put(tmp_path, interactions={"user_id": [1, 1, 1], "item_id": [1, 2, 3], "position": [2, 0, 1]})
    assert log(tmp_path)["item_id"].to_list() == [2, 3, 1]
    milli = 1_700_000_000_000
    put(tmp_path, interactions={"user_id": [1, 1], "item_id": [1, 2], "timestamp": [milli + 7, milli + 2]})
    frame = log(tmp_path)
    assert frame["item_id"].to_list() == [2, 1] and frame["timestamp"].to_list() == [1_700_000_000] * 2


def test_every_format_gives_the_same_log(tmp_path):
    frame = pl.DataFrame(LOG | {"note": list("abcde")})
    writers = {
        "interactions.parquet": frame.write_parquet,
        "interactions.csv": frame.write_csv,
        "interactions.tsv": lambda p: frame.write_csv(p, separator="\t"),
        "interactions.csv.gz": lambda p: p.write_bytes(gzip.compress(frame.write_csv().encode())),
        "interactions.tsv.gz": lambda p: p.write_bytes(gzip.compress(frame.write_csv(separator="\t").encode())),
    }
    logs = []
    for name, write in writers.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        write(folder / name)
        logs.append(log(folder))
    assert all(frame.equals(logs[0]) for frame in logs)


def test_text_files_with_byte_order_mark_crlf_quotes_and_spaces_in_the_header(tmp_path):
    text = '\ufeffuser_id, item_id ,timestamp,note\r\n1,"5",2024-05-01,"a, b"\r\n'
    (tmp_path / "interactions.csv").write_bytes(text.encode())
    assert log(tmp_path).row(0) == (1, 5, 1714521600, "a, b", 0)


def test_columns_are_mapped_everywhere_or_in_one_table(tmp_path):
    put(
        tmp_path,
        interactions={"userId": [1], "movieId": [5], "ts": [1_700_000_000], "timestamp": ["old"]},
        items={"movieId": [5], "name": ["x"]},
        queries={"qid": [1], "query": ["q"]},
    )
    columns = {"user_id": "userId", "item_id": "movieId", "timestamp": "ts", "items.title": "name"}
    columns |= {"query_id": "qid", "queries.text": "query"}
    tables = DataDir(path=str(tmp_path), columns=columns).load()
    assert tables.interactions.columns == ["user_id", "item_id", "timestamp", "order"]
    assert tables.items.columns == ["item_id", "title"] and tables.queries.columns == ["query_id", "text"]
    assert any("set aside" in note for note in tables.notes)


def test_all_tables_are_read_and_extra_columns_pass_through(tmp_path):
    put(
        tmp_path,
        interactions=LOG | {"context": [[1.5]] * 5, "query_id": [None, 1, 2, 1, 1]},
        items={"item_id": [5, 7, 9], "tags": [["a"], [], ["b"]]},
        users={"user_id": [1, 2], "age": [30, None]},
        queries={"query_id": [1, 2], "text": ["a", "b"]},
        relevance={"query_id": [1], "item_id": [5], "label": ["E"]},
    )
    (tmp_path / "vectors").mkdir()
    np.save(tmp_path / "vectors/text.npy", np.eye(3, dtype=np.float32))
    pl.DataFrame({"item_id": [9, 7, 5]}).write_parquet(tmp_path / "vectors/text_ids.parquet")
    tables = DataDir(path=str(tmp_path)).load()
    assert tables.interactions["context"].to_list() == [[1.5]] * 5
    assert tables.interactions["query_id"].null_count() == 1
    assert tables.items["tags"].to_list() == [["a"], [], ["b"]]
    assert tables.users["age"].to_list() == [30, None] and tables.relevance["label"].to_list() == ["E"]
    array, ids = tables.vectors["text"]
    assert array.shape == (3, 3) and ids.tolist() == [9, 7, 5]
    assert not tables.warnings and tables.has_times and not tables.simulated


def test_odd_but_usable_things_are_kept_and_counted(tmp_path):
    columns = {name: values + values[:1] for name, values in LOG.items()}
    put(
        tmp_path,
        interactions=columns,
        items={"item_id": [5]},
        relevance={"query_id": [1], "item_id": [8], "label": [1]},
    )
    tables = DataDir(path=str(tmp_path)).load()
    assert tables.interactions.height == 6
    text = "\n".join(tables.warnings)
    assert "interactions.parquet, row 6: 1 of 6 events repeat an earlier one" in text
    assert "item_id that items does not have in 5 rows (2 different)" in text
    assert "relevance.parquet, column item_id: item_id that items does not have in 1 row (1 different)" in text
    assert any("ties by file order" in note and "4 of 6 events" in note for note in tables.notes)


def test_hash_follows_the_bytes_and_the_mapping(tmp_path):
    put(tmp_path, interactions=LOG | {"other": LOG["item_id"]})
    first = source_hash(DataDir(path=str(tmp_path)))
    assert source_hash(DataDir(path=str(tmp_path))) == first and len(first) == 64
    assert source_hash(DataDir(path=str(tmp_path), columns={"item_id": "other"})) != first
    put(tmp_path, items={"item_id": [5]})
    assert source_hash(DataDir(path=str(tmp_path))) != first


def test_text_ids_that_hold_numbers_join_numbers(tmp_path):
    put(tmp_path, interactions=LOG, items={"item_id": ["5", "7", "9"]})
    assert DataDir(path=str(tmp_path)).load().items["item_id"].to_list() == [5, 7, 9]
    put(tmp_path, items={"item_id": ["5", "x7"]})
    refuses(tmp_path, match="mixed types: item_id is text here ('x7')", where="items.parquet, row 2")


def test_missing_directory_file_and_folder(tmp_path):
    refuses(tmp_path / "none", match="no such data directory", mend="folder")
    (tmp_path / "file").write_text("")
    refuses(tmp_path / "file", match="is a file")
    refuses(tmp_path, match="no interactions file; the folder holds", mend="save the interactions table")
    (tmp_path / "Interaction.parquet").write_text("")
    refuses(tmp_path, match="no interactions file", mend="Interaction")
    (tmp_path / "interactions.parquet").mkdir()
    refuses(tmp_path, match="is a folder", where="interactions.parquet")


@pytest.mark.parametrize(
    "name, content, match, mend",
    [
        ("interactions.parquet", b"", "empty (0 bytes)", "again"),
        ("interactions.csv", b"", "empty (0 bytes)", "again"),
        ("interactions.csv", b"user_id,item_id,timestamp\n", "no rows", "again"),
        ("interactions.csv.gz", gzip.compress(b"", mtime=0), "no rows", "again"),
        ("interactions.parquet", CSV.encode(), "named .parquet but is text", "rename"),
        ("interactions.csv", b"PAR1xxxxPAR1", "is Parquet", "rename"),
        ("interactions.csv", gzip.compress(CSV.encode(), mtime=0), "is gzip", "rename"),
        ("interactions.csv.gz", CSV.encode(), "is text", "rename"),
        ("interactions.csv", b"PK\x03\x04xxxx", "zip archive", "rename"),
        ("interactions.csv.gz", gzip.compress(CSV.encode() * 99, mtime=0)[:-20], "damaged gzip", "again"),
        ("interactions.parquet", b"PAR1" + b"x" * 40, "damaged Parquet", "again"),
        ("interactions.parquet", b"PAR1" + b"x" * 40 + b"PAR1", "damaged Parquet", "again"),
        ("interactions.csv", CSV.encode() + b"1,5,6,7\n", "the row has 4 cells", "double quotes"),
        ("interactions.csv", CSV.encode() + "1,é,6\n".encode("latin1"), "not UTF-8", "iconv"),
        ("interactions.csv", b"user_id;item_id;timestamp\n1;5;6\n", "no column user_id", "commas"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, match, mend):
    (tmp_path / name).write_bytes(content)
    refuses(tmp_path, match=match, where=name, mend=mend)


def test_the_row_of_a_broken_line_is_told(tmp_path):
    (tmp_path / "interactions.csv").write_bytes(CSV.encode() + b"1,5,6\n1,5,6,7\n")
    refuses(tmp_path, match="4 cells", where="row 3")
    (tmp_path / "interactions.csv").write_bytes(CSV.encode() + b"1,\xff,6\n")
    refuses(tmp_path, match="UTF-8", where="row 2")


def test_two_files_for_one_table(tmp_path):
    put(tmp_path, interactions=LOG)
    (tmp_path / "interactions.csv").write_text(CSV)
    refuses(tmp_path, match="2 files claim to be the interactions table", mend="move")


@pytest.mark.parametrize(
    "change, match, mend",
    [
        ({"user_id": None, "UserID": [1] * 5}, "no column user_id", '"user_id": "UserID"'),
        ({"item_id": None, "movieId": [1] * 5}, "no column item_id", '"item_id": "movieId"'),
        ({"timestamp": None, "unixReviewTime": [1] * 5}, "neither a timestamp nor a position", '"unixReviewTime"'),
        ({"item_id": [1, None, 2, 3, 4]}, "missing in 1 row", "drop"),
        ({"timestamp": [1.0, float("nan"), 2, 3, 4]}, "time is missing in 1 row", "drop"),
        ({"user_id": [1, -2, 2, 3, 4]}, "negative", "drop"),
    ],
)
def test_columns_that_are_missing_renamed_or_hold_bad_values(tmp_path, change, match, mend):
    put(tmp_path, interactions={k: v for k, v in (LOG | change).items() if v is not None})
    refuses(tmp_path, match=match, where="interactions.parquet", mend=mend)


def test_mappings_that_cannot_be_meant(tmp_path):
    put(tmp_path, interactions=LOG)
    refuses(tmp_path, {"title": "titel"}, match='no table has the column "titel"', mend="correct or drop")
    refuses(tmp_path, {"rating": "time stamp"}, match='"time stamp"', mend='did you mean "timestamp"?')
    refuses(tmp_path, {"movieId": "item_id"}, match="no column item_id", mend="takes it away")
    put(tmp_path, interactions={"user_id": [1], "movieId": [5], "timestamp": [1]})
    refuses(tmp_path, {"movieId": "item_id"}, match="no column item_id")


@pytest.mark.parametrize("table, column", [("items", "item_id"), ("users", "user_id"), ("queries", "query_id")])
def test_described_twice(tmp_path, table, column):
    put(tmp_path, interactions=LOG, **{table: {column: [4, 3, 4], "text": ["a", "b", "c"]}})
    refuses(tmp_path, match=f"{column} 4 occurs again", where=f"{table}.parquet, row 3")


@pytest.mark.parametrize(
    "array, ids, match",
    [
        (np.zeros((2, 3), np.float32), [1], "2 vectors for 1 ids"),
        (np.zeros(2, np.float32), [1, 2], "shape [2]"),
        (np.zeros((2, 3), np.int64), [1, 2], "int64"),
        (np.array([[1.0], [np.nan]]), [1, 2], "NaN"),
        (np.zeros((2, 1)), [1, 1], "occurs again"),
        (np.zeros((2, 1)), None, "without their ids"),
        (np.array([{}, {}]), [1, 2], "not a file of one numpy array"),
    ],
)
def test_vectors_that_do_not_fit(tmp_path, array, ids, match):
    put(tmp_path, interactions=LOG)
    (tmp_path / "vectors").mkdir()
    np.save(tmp_path / "vectors/text.npy", array, allow_pickle=True)
    if ids is not None:
        pl.DataFrame({"item_id": ids}).write_parquet(tmp_path / "vectors/text_ids.parquet")
    refuses(tmp_path, match=match, where="vectors/text")


@pytest.mark.parametrize(
    "table, columns, match, row",
    [
        ("queries", {"query_id": [1, 2], "text": ["a", " "]}, "text is missing", 2),
        ("queries", {"query_id": [1, 2], "text": [3, 4]}, "cannot be of type Int64", None),
        ("relevance", {"query_id": [1], "item_id": [1], "label": [None]}, "label is missing", 1),
        ("relevance", {"query_id": [1], "item_id": [None], "label": [1]}, "id is missing", 1),
    ],
)
def test_queries_and_judgments_that_cannot_be_used(tmp_path, table, columns, match, row):
    put(tmp_path, interactions=LOG, **{table: columns})
    refuses(tmp_path, match=match, where=f"{table}.parquet" + (f", row {row}" if row else ""))


def test_titles_of_digits_stay_text_and_a_column_named_order_is_set_aside(tmp_path):
    put(tmp_path, interactions=LOG | {"order": [9] * 5})
    (tmp_path / "items.csv").write_text("item_id,title,year\n5,1984,1949\n", encoding="utf-8")
    tables = DataDir(path=str(tmp_path)).load()
    assert tables.items.rows() == [(5, "1984", 1949)]
    assert tables.interactions["order"].to_list() == [0, 1, 2, 0, 1]
    assert any("column order set aside" in note for note in tables.notes)


def test_more_problems_are_announced(tmp_path):
    put(tmp_path, interactions=LOG | {"item_id": [None] * 4 + [1], "user_id": [-1] * 5})
    refuses(tmp_path, match="", mend="1 more")


def test_nothing_in_the_directory_is_changed(tmp_path):
    put(tmp_path, interactions=LOG, items={"item_id": [5, 5]})
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    refuses(tmp_path, match="again")
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}


def test_title_column():
    def pick(*columns):
        return title_column(pl.DataFrame({c: ["x"] for c in columns}))

    assert pick("name", "title") == "title" and pick("Name", "brand") == "Name"
    assert pick("brand", "description") is None and title_column(None) is None
    assert title_column(pl.DataFrame({"title": [1], "product_name": ["x"]})) == "product_name"


def test_real_directories_load_where_they_are_at_hand():
    """Only with RECJAX_SHARED_DATA: every folder there that has a log loads, sorted and whole."""
    root = os.environ.get("RECJAX_SHARED_DATA")
    for path in sorted(Path(root).glob("*/interactions.parquet")) if root else []:
        tables = DataDir(path=str(path.parent)).load()
        frame = pl.read_parquet(path)
        assert tables.interactions.height == frame.height
        assert (
            tables.interactions.select(pl.col("order").max()).item() == frame.group_by("user_id").len()["len"].max() - 1
        )
        assert not tables.simulated
