"""Tags as queries: what `benchmarks/tags_as_queries.py` writes is what the tables say, and a search task can use it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

from recjax.data.check import check
from recjax.data.sources import DataDir
from recjax.tasks.next_item import NextItem
from recjax.tasks.search import Search

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "tags_as_queries.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tags_as_queries", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_columns_of_the_items_become_queries(script: ModuleType) -> None:
    items = pl.DataFrame(
        {"item_id": [1, 2], "genres": [["Drama", "Comedy"], ["Comedy"]], "actors": ["A|B", None], "year": [1990, 1991]}
    )

    def queries(*columns: str) -> set[tuple[int, str]]:
        return set(script.described(items, columns).select("item_id", "text").iter_rows())

    assert queries("genres") == {(1, "Drama"), (1, "Comedy"), (2, "Comedy")}
    assert queries("actors") == {(1, "A"), (1, "B")}
    assert queries("genres", "year") == {(1, "Drama 1990"), (1, "Comedy 1990"), (2, "Comedy 1991")}
    assert queries("genres", "genres") == {(1, "Comedy Drama")}


def test_a_log_with_tags_becomes_a_directory_for_search(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    rated = [(user, item) for user in range(6) for item in range(8) if (user + item) % 3] + [(0, 99)]
    log = pl.DataFrame(rated, schema=["user_id", "item_id"], orient="row")
    log.with_columns(timestamp=pl.int_range(pl.len()) + 10**9).write_parquet(source / "interactions.parquet")
    titles = pl.DataFrame({"item_id": [*range(8), 99], "title": [f"Film {k}" for k in range(9)]})
    titles.with_columns(genres=pl.lit("Drama|War")).write_parquet(source / "items.parquet")
    tags = [(0, 1, "Great  fun"), (1, 1, "great fun"), (2, 4, "Great Fun "), (2, 5, "lonely"), (0, 99, "great fun")]
    pl.DataFrame(tags, schema=["user_id", "item_id", "tag"], orient="row").write_parquet(source / "tags.parquet")
    words = ["tags", str(source), str(out), "--describe", "genres", "--min-users", "2", "--min-items", "2"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    assert "queries=3" in capsys.readouterr().out
    report = check(DataDir(path=str(out)))
    assert report.ok and not report.problems
    tables = DataDir(path=str(out)).load()
    assert tables.queries is not None and tables.relevance is not None
    assert tables.queries["text"].to_list() == ["drama", "great fun", "war"]
    judged = tables.relevance.filter(pl.col("query_id") == 2).select("item_id", "user_id")
    assert set(judged.iter_rows()) == {(1, 0), (1, 1), (4, 2)}
    assert tables.relevance["user_id"].null_count() == 16
    work = Search(log=NextItem(data=DataDir(path=str(out)))).work()
    assert work.facts["counts"]["train"]["examples"] > 5 and "own held-out" in work.facts["leak_rule"]
