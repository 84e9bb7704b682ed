"""`check`: every problem of a bad directory with its address, and what was understood of a good one."""

import polars as pl
import pytest

from recjax.core.errors import DataError
from recjax.data.check import check
from recjax.data.simulate import World, write
from recjax.data.sources import DataDir

T = 1_700_000_000


@pytest.fixture
def bad(tmp_path):
    (tmp_path / "interactions.csv").write_text(
        f"user_id,item_id,timestamp,position\n1,a,{T},0\n,b,soon,1\n-3,a,{T},x\n1,a,,3\n", encoding="utf-8"
    )
    (tmp_path / "items.csv").write_text("itemid,title\n1,x\n", encoding="utf-8")
    (tmp_path / "users.parquet").write_text("user_id,age\n1,30\n", encoding="utf-8")
    (tmp_path / "queries.tsv").write_text("", encoding="utf-8")
    (tmp_path / "relevance.csv").write_text("query_id,item_id,label\n1,2,3\n1,2,3,4\n", encoding="utf-8")
    return tmp_path


def test_all_problems_are_found_at_once_with_their_addresses(bad):
    report = check(DataDir(path=str(bad), columns={"rating": "stars"}))
    assert not report.ok
    found = {(p.where.removeprefix(str(bad)).strip("/"), p.what) for p in report.problems}
    expected = [
        ("interactions.csv, row 2, column user_id", "missing in 1 row"),
        ("interactions.csv, row 3, column user_id", "negative"),
        ("interactions.csv, row 2, column timestamp", "'soon' is not understood as a time"),
        ("interactions.csv, row 4, column timestamp", "missing"),
        ("interactions.csv, column position", "cannot be of type String"),
        ("items.csv, column item_id", "no column item_id"),
        ("users.parquet", "named .parquet but is text"),
        ("queries.tsv", "empty (0 bytes)"),
        ("relevance.csv, row 2", "4 cells"),
        ("", 'no table has the column "stars"'),
    ]
    for where, what in expected:
        assert any(w == where and what in text for w, text in found), (where, what, found)
    assert len(found) == len(report.problems) == len(expected)
    assert all(p.mend for p in report.problems)


def test_the_report_reads_top_to_bottom(bad):
    text = check(DataDir(path=str(bad))).render()
    lines = text.splitlines()
    assert lines[0] == f"Data directory {bad}"
    assert "Problems: 9 errors, 0 warnings" in lines
    assert lines[-1] == "This directory cannot be used yet."
    assert any("mend:" in line and '"item_id": "itemid"' in line for line in lines)


def test_load_raises_what_check_lists_first(bad):
    with pytest.raises(DataError) as e:
        DataDir(path=str(bad)).load()
    first = check(DataDir(path=str(bad))).problems[0]
    assert (e.value.what, e.value.where) == (first.what, first.where)
    assert f"{8} more" in e.value.mend


def test_what_is_understood_is_said(tmp_path):
    log = {"user_id": [1, 1, 1, 2], "item_id": [5, 6, 5, 9], "timestamp": [T * 1000, T * 1000, T * 1000 + 5, T * 1000]}
    pl.DataFrame(log).write_parquet(tmp_path / "interactions.parquet")
    pl.DataFrame({"item_id": [5, 6, 7, 8], "name": ["a", "", None, "d"]}).write_parquet(tmp_path / "items.parquet")
    report = check(DataDir(path=str(tmp_path)))
    text = report.render()
    assert report.ok and "This directory can be used." in text
    for line in (
        "interactions.parquet: 4 rows; user_id = id, whole numbers; item_id = id, whole numbers; "
        "timestamp = time, milliseconds since 1970 (by magnitude)",
        "order of events: by timestamp, which 2 of 4 events (50.0%) share",
        "log: 4 events of 2 users with 3 items",
        "time: from 2023-11-14 22:13:20 to 2023-11-14 22:13:20 (UTC)",
        "events per user: least 1, quartiles 1, 3, 3, most 3; 1 users have fewer than 3",
        "catalogue: 4 items, of which 2 (50%) occur in the log",
        "title: column name, empty for 2 items",
    ):
        assert line in text, text
    (warning,) = report.problems
    assert warning.severity == "warning" and "items does not have in 1 row" in warning.what


def test_statistics_are_given_in_spite_of_errors_elsewhere(tmp_path):
    columns = {"user_id": [1], "item_id": [5], "timestamp": [T]}
    pl.DataFrame(columns).write_parquet(tmp_path / "interactions.parquet")
    pl.DataFrame({"item_id": [5, 5]}).write_parquet(tmp_path / "items.parquet")
    report = check(DataDir(path=str(tmp_path)))
    assert not report.ok and any(line.startswith("log: 1 events") for line in report.understood)


def test_a_missing_directory_is_a_report_too(tmp_path):
    report = check(DataDir(path=str(tmp_path / "none")))
    assert not report.ok and "nothing" in report.render() and "no such data directory" in report.render()


def test_simulated_worlds_say_so(tmp_path):
    world = World(num_events=300)
    write(world, tmp_path / "world")
    for data in (DataDir(simulate=world), DataDir(path=str(tmp_path / "world"))):
        report = check(data)
        assert report.ok and not report.problems and "this is simulated data" in report.understood


def test_what_search_has_to_work_with_is_said(tmp_path):
    log = {"user_id": [1, 1], "item_id": [5, 6], "timestamp": [T, T + 1]}
    pl.DataFrame(log).write_parquet(tmp_path / "interactions.parquet")
    pl.DataFrame({"user_id": [1]}).write_parquet(tmp_path / "users.parquet")
    pl.DataFrame({"query_id": [1, 2, 3], "text": ["a", "b", "c"]}).write_parquet(tmp_path / "queries.parquet")
    judged = {"query_id": [1, 1, 2], "item_id": [5, 9, 5], "label": [2, 1, 2], "user_id": [1, 7, None]}
    pl.DataFrame(judged).write_parquet(tmp_path / "relevance.parquet")
    report = check(DataDir(path=str(tmp_path)))
    for line in (
        "search: 3 queries, 3 judged pairs of query and item",
        "labels: 2 in 67%, 1 in 33%",
        "judged items: 2, of which 1 (50%) occur in the log",
        "queries without a judgment: 1",
        "leakage of held-out events into search: 2 judgments name their user",
    ):
        assert line in report.understood, report.understood
    assert report.ok and ["user_id that users does not have" in p.what for p in report.problems] == [True]
