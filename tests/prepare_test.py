"""Preparing once: found again, whole or not at all, and told clearly when it cannot be done."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recjax import cli
from recjax import prepare as verb
from recjax.core import config
from recjax.core.errors import ConfigError, DataError, ExamplesError
from recjax.core.flags import Flags
from recjax.core.remote import local_cache
from recjax.data.examples import Examples
from recjax.data.sources import DataDir, World
from recjax.prepare import ensure_prepared, main, prepare
from recjax.tasks import cache as places
from recjax.tasks import seqio_bridge
from recjax.tasks.cache import place_of
from recjax.tasks.mixtures import Mixture
from recjax.tasks.next_item import NextItem
from recjax.tasks.search import Search
from recjax.tasks.work import examples_of

ROOT = Path(__file__).resolve().parents[1]
SMALL = World(num_events=3000)


def mixture(**settings) -> Mixture:
    return Mixture(tasks=(NextItem(data=DataDir(simulate=SMALL), **settings),))


def write_log(folder: Path, *, item: str = "item_id", shift: int = 0) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    log = pl.DataFrame({"user_id": rng.integers(0, 30, 400), item: rng.integers(0, 50, 400) + shift})
    log.with_columns(timestamp=pl.int_range(400)).write_parquet(folder / "interactions.parquet")
    return folder


def log_task(folder: Path, **settings) -> NextItem:
    return NextItem(data=DataDir(path=str(folder)), **settings)


def start(code: str, *arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


PREPARE = """
import sys
from recjax.data.sources import DataDir
from recjax.prepare import prepare
from recjax.tasks.mixtures import Mixture
from recjax.tasks.next_item import NextItem
print(prepare(Mixture(tasks=(NextItem(data=DataDir(path=sys.argv[1])),)), sys.argv[2])[0])
"""


def test_the_place_follows_settings_and_data_but_not_where_the_data_lies(tmp_path: Path) -> None:
    first = write_log(tmp_path / "a")
    same = write_log(tmp_path / "b" / "c")
    other = write_log(tmp_path / "d", shift=1)
    place = place_of(log_task(first), tmp_path)
    assert place == place_of(log_task(same), tmp_path)
    assert place.path.name == f"next_item-{place.content_hash[:12]}"
    different = [
        log_task(other),
        log_task(first, min_events=2),
        log_task(first, split="global_time"),
        log_task(first, name="again"),
        NextItem(data=DataDir(path=str(first), columns={"item_id": "item_id"})),
        NextItem(data=DataDir(simulate=SMALL)),
        NextItem(data=DataDir(simulate=World(num_events=3001))),
    ]
    assert len({place.path, *(place_of(t, tmp_path).path for t in different)}) == 8
    pl.DataFrame({"item_id": [1]}).write_parquet(same / "items.parquet")
    (first / "README.md").write_text("not data")
    assert place_of(log_task(same), tmp_path) != place == place_of(log_task(first), tmp_path)


def test_another_format_is_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = place_of(NextItem(), tmp_path)
    monkeypatch.setattr(places, "FORMAT", 999)
    assert place_of(NextItem(), tmp_path).path != before.path


def test_the_cache_is_the_argument_or_the_variable_or_in_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECJAX_CACHE", "/somewhere")
    assert local_cache("here") == Path("here")
    assert local_cache() == Path("/somewhere")
    monkeypatch.delenv("RECJAX_CACHE")
    assert local_cache() == local_cache("s3://shop/cache") == Path.home() / ".cache" / "recjax"


def test_what_is_prepared_is_what_the_task_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (path,) = prepare(mixture(), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert list(dict.fromkeys(line.split()[1] for line in lines)) == ["train", "valid", "test"]
    examples = Examples.open(path, verify=True)
    task = mixture().tasks[0]
    assert isinstance(task, NextItem)
    work = task.work()
    for split in ("train", "valid", "test"):
        source, expected = examples.source(split), list(examples_of(work, split))
        assert len(source) == len(expected) == examples.manifest["counts"][split]["examples"]
        for k, example in enumerate(expected):
            assert set(source[k]) == set(example)
            for name in example:
                np.testing.assert_array_equal(source[k][name], example[name])
    manifest = examples.manifest
    assert manifest["task"] == "next_item" and manifest["simulated"] is True
    assert manifest["config"]["data"]["simulate"]["num_events"] == 3000
    assert manifest["source_hash"] == SMALL.hash
    assert {"split_rule", "tie_rule", "catalogue_rule", "vocabulary_hash", "num_items", "num_rows"} <= set(manifest)
    assert examples.vocab == work.vocab
    assert examples.item_count.sum() == manifest["counts"]["train"]["events"]
    assert any(examples.titles())
    assert len(examples.user_ids()) == manifest["counts"]["log"]["users"]
    before = {p: p.stat().st_mtime_ns for p in path.iterdir()}
    assert prepare(mixture(), tmp_path) == [path]
    assert {p: p.stat().st_mtime_ns for p in path.iterdir()} == before
    assert capsys.readouterr().err == ""


def test_two_processes_at_once_make_one_folder(tmp_path: Path) -> None:
    data, cache = write_log(tmp_path / "data"), tmp_path / "cache"
    both = [start(PREPARE, data, cache) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert sorted("examples" in text for text in said) == [False, True]  # one made it, one waited
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [place_of(log_task(data), cache).path.name]
    Examples.open(said[0].split()[-1], verify=True)


def test_a_killed_process_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    data, cache = write_log(tmp_path / "data"), tmp_path / "cache"
    stuck = PREPARE.replace(
        "print(",
        "from recjax import prepare as b\nmake = b.in_parts\n"
        "def slow(*a):\n    yield from make(*a)\n    print('half', flush=True)\n    __import__('time').sleep(60)\n"
        "b.in_parts = slow\nprint(",
    )
    process = start(stuck, data, cache)
    assert process.stdout is not None
    while "half" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    place = place_of(log_task(data), cache).path
    leftovers = [p for p in cache.iterdir() if p.is_dir()]
    assert len(leftovers) == 1 and leftovers[0].name.startswith(".") and not place.exists()
    (path,) = prepare(Mixture(tasks=(log_task(data),)), cache)
    assert [p for p in cache.iterdir() if p.is_dir()] == [path] == [place]
    Examples.open(path, verify=True)


def test_another_process_prepares_so_that_this_one_stays_without_tensorflow(tmp_path: Path) -> None:
    code = """
import sys
from recjax.core.errors import DataError
from recjax.data.sources import DataDir
from recjax.prepare import ensure_prepared
from recjax.tasks.mixtures import Mixture
from recjax.tasks.next_item import NextItem
(examples,) = ensure_prepared(Mixture(tasks=(NextItem(data=DataDir(path=sys.argv[1])),)), sys.argv[2])
print(len(examples.source("train")), "tensorflow" in sys.modules, "seqio" in sys.modules)
try:
    ensure_prepared(Mixture(tasks=(NextItem(data=DataDir(path=sys.argv[1]), catalogue="items"),)), sys.argv[2])
except DataError as error:
    print(error.what)
"""
    data = write_log(tmp_path / "data")
    process = start(code, data, tmp_path / "cache")
    said = process.communicate()[0].splitlines()
    assert "30 False False" in said
    assert said[-1] == 'NextItem.catalogue = "items" needs an items table'
    assert not any("Traceback" in line for line in said)


def test_what_is_there_is_read_without_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recjax.data.examples import write_examples
    from recjax.tasks.work import columns_of

    task = log_task(write_log(tmp_path / "data"))
    work, place = task.work(), place_of(task, tmp_path)
    facts = {"content_hash": place.content_hash}
    with write_examples(place.path, vocab=work.vocab, items=work.items, users=work.users, facts=facts) as writer:
        writer.add("train", work.schemas["train"], columns_of(list(examples_of(work, "train")), work.schemas["train"]))
    monkeypatch.setattr(seqio_bridge, "_NEEDED", ("tensorflow_that_is_not_there",))
    monkeypatch.setattr(verb.sys, "executable", "/bin/false")
    assert ensure_prepared(Mixture(tasks=(task,)), tmp_path)[0].path == place.path
    assert len(prepare(mixture(), tmp_path)) == 1  # which has no text
    with pytest.raises(ExamplesError, match="not installed"):
        prepare(Mixture(tasks=(Search(log=NextItem(data=DataDir(simulate=SMALL))),)), tmp_path)
    next(place.path.glob("*.arrayrecord")).unlink()
    with pytest.raises(ExamplesError, match="is missing"):
        ensure_prepared(Mixture(tasks=(task,)), tmp_path)


def test_a_process_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb.sys, "executable", "/bin/false")
    with pytest.raises(ExamplesError, match="ended with status 1"):
        ensure_prepared(mixture(), tmp_path)


def test_data_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data directory"):
        ensure_prepared(Mixture(tasks=(log_task(tmp_path / "nowhere"),)), tmp_path)


def test_check_prints_a_report_and_its_status_says_whether_it_is_usable(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = write_log(tmp_path / "data", item="movieId")
    assert cli.run(main, ["--check", str(folder)]) == 2
    assert "movieId" in capsys.readouterr().out
    assert cli.run(main, ["--check", str(folder), "--columns", "item_id=movieId"]) == 0
    assert "This directory can be used." in capsys.readouterr().out


def test_a_simulated_world_can_be_written_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--from", "simulate:500", "--to", str(tmp_path / "world")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "world")]
    assert DataDir(path=str(tmp_path / "world")).load().interactions.height == 500
    assert cli.run(main, ["--from", "simulate:500", "--to", str(tmp_path / "world")]) == 2
    assert "already something here" in capsys.readouterr().err


def test_a_small_world_can_be_written_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--from", "shared_queries:rho=0.25,items=160", "--to", str(tmp_path / "world")]) == 0
    assert json.loads((tmp_path / "world" / "simulated.json").read_text())["measured"]["rho"] == 0.25
    for source in ("shared_queries:rho=much", "shared_queries:rhos=1", "shared_stories"):
        with pytest.raises(ConfigError, match="cannot read"):
            main(["--from", source, "--to", str(tmp_path / "other")])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--check", "a", "--from", "simulate:5"],
        ["--from", "simulate:5"],
        ["--from", "simulate:many", "--to", "x"],
        ["--from", "kaggle:x", "--to", "x"],
        ["--check", "a", "--columns", "item_id"],
        ["--from", "simulate:5", "--to", "x", "--columns", "a=b"],
        ["sasrec", "--gin_file=x.gin"],
        ["--chek", "a"],
    ],
)
def test_command_lines_that_mean_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        main(words)


def test_what_gin_builds_can_be_handed_to_another_process(tmp_path: Path) -> None:
    gin = tmp_path / "r.gin"
    gin.write_text(
        "from __gin__ import dynamic_registration\n"
        "from recjax.tasks import mixtures\nfrom recjax.tasks import next_item\nfrom recjax.data import sources\n"
        "mixtures.Mixture.tasks = (@next_item.NextItem(),)\n"
        "next_item.NextItem.data = @sources.DataDir()\n"
        "sources.DataDir.simulate = @sources.World()\n"
        "sources.World.num_events = 3000\n"
    )
    config.parse(Flags(gin_files=(str(gin),)))
    built = config.build("mixtures.Mixture")
    received = pickle.loads(pickle.dumps(built))
    assert received == built == mixture()
    assert place_of(received.tasks[0], tmp_path) == place_of(mixture().tasks[0], tmp_path)


@pytest.mark.tensorflow
def test_search_and_recommendation_are_prepared_side_by_side(tmp_path: Path) -> None:
    log = NextItem(data=DataDir(simulate=SMALL))
    search = Search(log=log, prompt="search: ")
    paths = prepare(Mixture(tasks=(log, search), temperature=2.0), tmp_path)
    recommends, searches = (Examples.open(path, verify=True) for path in paths)
    assert searches.vocab == recommends.vocab and recommends.text_vocab is None
    assert searches.text_vocab == search.work().text
    assert searches.manifest["text_hash"] == searches.text_vocab.hash
    assert searches.manifest["text_size"] == searches.text_vocab.size
    source, expected = searches.source("test"), list(examples_of(search.work(), "test"))
    assert len(source) == searches.count("test") == len(expected) > 0
    for found, wanted in zip(source, expected, strict=True):
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)
    np.testing.assert_array_equal(
        searches.query_ids("quiet mystery"), searches.text_vocab.encode("search: quiet mystery")
    )
    assert searches.query_text(searches.query_ids("quiet mystery")) == "quiet mystery"
    for refused in (lambda: recommends.query_ids("quiet"), lambda: recommends.query_text(np.array([3]))):
        with pytest.raises(ExamplesError, match="no text vocabulary"):
            refused()
    counts = searches.source("train").read(np.arange(searches.count("train")), ["items"])["items"][0]
    np.testing.assert_array_equal(searches.item_count, np.bincount(counts, minlength=searches.vocab.num_rows))
