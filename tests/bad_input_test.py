"""Whatever a user can get wrong ends in one message and status 2, and leaves everything that was there as it was."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient
from orbax.checkpoint import AsyncCheckpointer

from recjax import cli, command, evaluate, export, infer, prepare, run, train
from recjax import list as listing
from recjax.core import saved
from recjax.core.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DataError,
    ExamplesError,
    MeshError,
    RecjaxError,
)
from recjax.core.flags import Flags
from recjax.core.writer import read_metrics
from recjax.data.examples import Examples
from recjax.serve import __main__ as server
from recjax.serve.app import create_app
from recjax.serve.bundle import Bundle
from recjax.tasks.cache import place_of

RECIPE = ("--gin_file=configs/recipe/sasrec/1_train.gin", "--gin_file=configs/run/tiny.gin")
NEW_ITEM = 900  # the last event of user 0 and no other: held out, never seen in training
T = 1_700_000_000


def log() -> pl.DataFrame:
    """40 users with 6 to 11 events among 60 items, oldest first."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 12, 40)
    users = np.repeat(np.arange(40), lengths)
    items = np.concatenate([np.arange(60), rng.integers(0, 60, len(users) - 60)])
    items[lengths[0] - 1] = NEW_ITEM
    return pl.DataFrame({"user_id": users, "item_id": items, "timestamp": T + 60 * np.arange(len(users))})


def items() -> pl.DataFrame:
    return pl.DataFrame({"item_id": range(60), "title": [f"Item {i}" for i in range(60)]})


def write(folder: Path, **tables: pl.DataFrame) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        frame.write_parquet(folder / f"{name}.parquet")
    return folder


def recipe_of(data: Path, *bindings: str) -> Any:
    files, given = (word.partition("=")[2] for word in RECIPE), (f"DATA_DIR={data}", *bindings)
    return command.load(Flags(gin_files=tuple(files), bindings=given))[0]


@dataclass(frozen=True)
class Place:
    """What a case may break: a folder of its own with data, a finished run, its bundle, and its examples."""

    root: Path
    until_the_end: contextlib.ExitStack

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"


@pytest.fixture(scope="module")
def finished(prepare_here: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, the examples made of it, a run of two steps and a bundle."""
    place = Place(tmp_path_factory.mktemp("finished"), contextlib.ExitStack())
    write(place.data, interactions=log(), items=items())
    for task in recipe_of(place.data).mixture.tasks:
        prepare_here(task, place.cache)
    at = (f"--workdir={place.run}", f"--cache={place.cache}")
    assert (
        cli.run(train.main, [*RECIPE, f"--gin.DATA_DIR={place.data}", "--gin.checkpoint.Checkpoints.every=1", *at]) == 0
    )
    assert cli.run(export.main, [*at, f"--out={place.bundle}"]) == 0
    return place.root


@pytest.fixture
def place(
    finished: Path, prepare_here: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """A copy to break. Examples that are missing are made in this process; no case is to get as far as TensorFlow."""

    def here(mixture: Any, cache: Path) -> None:
        for task in mixture.tasks:
            prepare_here(task, cache)

    monkeypatch.setattr(prepare, "_prepare_elsewhere", here)
    shutil.copytree(finished, tmp_path / "place")
    # The run remembers where its data was.
    config = tmp_path / "place" / "run" / command.CONFIG
    config.write_text(config.read_text().replace(str(finished), str(tmp_path / "place")))
    with contextlib.ExitStack() as stack:
        yield Place(tmp_path / "place", stack)


def contents(root: Path) -> dict[str, str]:
    """Every file and folder with a hash; empty lock files apart."""
    found = {}
    for path in sorted(root.rglob("*")):
        if not path.name.endswith((".wait", ".lock")):
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


@dataclass(frozen=True)
class Case:
    """`words` breaks something and returns the command line; what is said holds all of `says`."""

    name: str
    verb: cli.Main
    words: Callable[[Place], list[str]]
    says: tuple[str, ...]
    error: type[RecjaxError]


def data_case(name: str, change: Callable[[Path], Any], *says: str) -> Case:
    """A data directory that `change` breaks, prepared."""

    def words(place: Place) -> list[str]:
        shutil.rmtree(place.cache)
        place.cache.mkdir()
        change(place.data)
        return [*RECIPE, f"--gin.DATA_DIR={place.data}", f"--cache={place.cache}"]

    return Case(name, prepare.main, words, (*says, "mend:"), DataError)


def with_log(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], Any]:
    return lambda folder: write(folder, interactions=change(log()))


def with_column(name: str, change: Callable[[list], list], dtype: Any = None) -> Callable[[Path], Any]:
    return with_log(lambda frame: frame.with_columns(pl.Series(name, change(frame[name].to_list()), dtype)))


def replaced(name: str, content: bytes, remove: str = "interactions.parquet") -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / remove).unlink()
        (folder / name).write_bytes(content)

    return change


DATA = [
    data_case(
        "a column is missing", with_log(lambda f: f.drop("user_id")), "no column user_id", "interactions.parquet"
    ),
    data_case(
        "a column has another name",
        with_log(lambda f: f.rename({"item_id": "movieId"})),
        "no column item_id",
        'columns={"item_id": "movieId"}',
    ),
    data_case(
        "the order of events is unknown", with_log(lambda f: f.drop("timestamp")), "neither a timestamp nor a position"
    ),
    data_case(
        "a time is a word",
        with_column("timestamp", lambda v: ["soon", *map(str, v[1:])]),
        "'soon'",
        "row 1",
        "expected:",
    ),
    data_case(
        "ids are lists", with_column("item_id", lambda v: [[i] for i in v]), "type List", "column item_id", "expected:"
    ),
    data_case("an id is null", with_column("item_id", lambda v: [*v[:4], None, *v[5:]]), "missing in 1 row", "row 5"),
    data_case(
        "an id is NaN",
        with_column("user_id", lambda v: [float("nan"), *v[1:]], pl.Float64),
        "missing in 1 row",
        "row 1",
    ),
    data_case("a time is null", with_column("timestamp", lambda v: [*v[:-1], None]), "time is missing in 1 row"),
    data_case(
        "times are NaN",
        with_column("timestamp", lambda v: [float("nan")] * 2 + v[2:], pl.Float64),
        "time is missing in 2 rows",
        "row 1, column timestamp",
    ),
    data_case(
        "ids are negative", with_column("item_id", lambda v: [-1, *v[1:]]), "negative in 1 row", "from 0 upwards"
    ),
    data_case(
        "an item is described twice",
        lambda folder: write(folder, items=pl.concat([items(), items()[:2]])),
        "item_id 0 occurs again (2 rows",
        "items.parquet, row 61",
    ),
    data_case(
        "ids are numbers here and words there",
        lambda folder: write(folder, items=pl.DataFrame({"item_id": ["a", "b"]})),
        "mixed types",
        "items.parquet, row 1",
    ),
    data_case(
        "nobody is in the users table",
        lambda folder: write(folder, users=pl.DataFrame({"user_id": []}, schema={"user_id": pl.Int64})),
        "no rows",
        "users.parquet",
    ),
    data_case("the log is an empty file", replaced("interactions.csv", b""), "empty (0 bytes)", "interactions.csv"),
    data_case("the log is an empty Parquet file", replaced("interactions.parquet", b""), "empty (0 bytes)"),
    data_case(
        "the log has a header alone",
        replaced("interactions.csv", b"user_id,item_id,timestamp\n"),
        "no rows",
        "expected:",
    ),
    data_case(
        "the log is of another type",
        replaced("interactions.parquet", b"user_id,item_id\n1,2\n"),
        "named .parquet but is text",
    ),
    data_case("the log is cut short", lambda folder: cut(folder / "interactions.parquet"), "damaged Parquet"),
    data_case(
        "a line is too long",
        replaced("interactions.csv", b"user_id,item_id,timestamp\n1,2,3\n1,2,3,4\n"),
        "4 cells",
        "row 2",
    ),
    data_case("there is no folder", shutil.rmtree, "no such data directory", "place/data"),
    data_case("there is no log", lambda folder: (folder / "interactions.parquet").unlink(), "no interactions file"),
    data_case(
        "the log is there twice",
        lambda folder: log().write_csv(folder / "interactions.csv"),
        "interactions.parquet, interactions.csv",
        "one file a table",
    ),
    data_case(
        "nobody has two events", with_log(lambda f: f.unique("user_id")), "no user has two events", "longer histories"
    ),
]


def cut(path: Path, count: int = 9) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def training(*more: str) -> Callable[[Place], list[str]]:
    """Training in a workdir of its own, which must not even be made."""
    return lambda place: [
        *RECIPE,
        f"--gin.DATA_DIR={place.data}",
        f"--workdir={place.root / 'new'}",
        f"--cache={place.cache}",
        *more,
    ]


def of_run(*more: str, change: Callable[[Place], Any] = lambda place: None) -> Callable[[Place], list[str]]:
    """A command on the finished run, once `change` has broken something."""

    def words(place: Place) -> list[str]:
        change(place)
        at = [f"--workdir={place.run}", f"--cache={place.cache}"]
        return [*at, *(word.replace("ROOT", str(place.root)) for word in more)]

    return words


def own_gin(text: str) -> Callable[[Place], list[str]]:
    def words(place: Place) -> list[str]:
        (place.root / "own.gin").write_text(text)
        return [f"--gin_file={place.root / 'own.gin'}", f"--workdir={place.root / 'new'}"]

    return words


CONFIG = [
    Case(
        "a verb is misspelt", cli._main, lambda place: ["tarin"], ("no verb tarin", "did you mean train?"), ConfigError
    ),
    Case(
        "a flag is misspelt",
        train.main,
        training("--wrokdir=x"),
        ("no flag --wrokdir", "did you mean --workdir?"),
        ConfigError,
    ),
    Case("a flag has no value", train.main, training("--profile"), ("--profile", "mend:"), ConfigError),
    Case(
        "a recipe is misspelt",
        run.main,
        lambda place: ["sasrecc"],
        ("no recipe sasrecc", "did you mean sasrec?"),
        ConfigError,
    ),
    Case("a recipe is not listed", listing.main, lambda place: ["bert"], ("no recipe bert", "mend:"), ConfigError),
    Case(
        "a gin file is misspelt",
        train.main,
        training("--gin_file=configs/run/tini.gin"),
        ("no gin file configs/run/tini.gin", "did you mean configs/run/tiny.gin?"),
        ConfigError,
    ),
    Case(
        "a macro is misspelt",
        train.main,
        training("--gin.TRAIN_STEP=3"),
        ("TRAIN_STEP", "--gin.TRAIN_STEP=3", "did you mean TRAIN_STEPS?"),
        ConfigError,
    ),
    Case(
        "a parameter is misspelt",
        train.main,
        training("--gin.pipeline.Feed.row_lenght=8"),
        ("no parameter row_lenght", "did you mean row_length?"),
        ConfigError,
    ),
    Case(
        "a binding has no effect",
        train.main,
        training("--gin.optim.Optimiser.learning_rate=1"),
        ("Optimiser", "did you mean"),
        ConfigError,
    ),
    Case(
        "a value is of another type",
        train.main,
        training("--gin.LEARNING_RATE=fast"),
        ("Optimizer.learning_rate = 'fast'", "--gin.LEARNING_RATE=fast", "a number"),
        ConfigError,
    ),
    Case(
        "a macro is left unset",
        train.main,
        own_gin("include 'configs/run/train.gin'\nTRAIN_STEPS = 5\nBATCH_SIZE = 8\n"),
        ("not set: LEARNING_RATE", "train.gin:", "--gin.LEARNING_RATE=..."),
        ConfigError,
    ),
    Case("a gin file is not gin", train.main, own_gin("TRAIN_STEPS = \n"), ("own.gin:1", "expected:"), ConfigError),
    Case(
        "steps are negative",
        train.main,
        training("--gin.TRAIN_STEPS=-3"),
        ("train_steps = -3", "at least 1"),
        ConfigError,
    ),
    Case(
        "a rate is negative", train.main, training("--gin.LEARNING_RATE=-1.0"), ("learning_rate", "-1.0"), ConfigError
    ),
    Case("a batch is empty", train.main, training("--gin.BATCH_SIZE=0"), ("batch_size = 0", "at least 1"), ConfigError),
    Case(
        "a seed is too large",
        train.main,
        training("--gin.SEED=9999999999"),
        ("seed = 9999999999", "from 0"),
        ConfigError,
    ),
    Case(
        "a size is zero",
        train.main,
        training("--gin.transformer.TransformerConfig.width=0"),
        ("TransformerConfig.width = 0", "at least 1"),
        ConfigError,
    ),
    Case(
        "dropout is certain",
        train.main,
        training("--gin.sequence.Sequence.embedding_dropout=1.0"),
        ("embedding_dropout = 1.0", "[0, 1)"),
        ConfigError,
    ),
    Case(
        "positions do not reach",
        train.main,
        training("--gin.sequence.Sequence.max_length=8"),
        ("positions for 8 events and is fed 16", "mend:"),
        ConfigError,
    ),
    Case(
        "a metric is misspelt",
        train.main,
        training("--gin.checkpoint.Checkpoints.metric='ndgc@10'"),
        ("no metric 'ndgc@10'", "did you mean ndcg@10?"),
        ConfigError,
    ),
    Case(
        "an object is not made",
        train.main,
        training("--gin.recipe.Recipe.feed=@pipeline.Feed"),
        ("@pipeline.Feed is a class", "write @pipeline.Feed()"),
        ConfigError,
    ),
    Case(
        "a batch cannot be divided",
        train.main,
        training("--gin.BATCH_SIZE=12"),
        ("BATCH_SIZE 12 cannot be split into 8", "MESH = 'data=-1'", "mend:"),
        MeshError,
    ),
    Case(
        "the mesh does not fit the devices",
        train.main,
        training("--gin.MESH=data=3"),
        ("does not match the devices", "MESH = 'data=3'", "a product of 8"),
        MeshError,
    ),
    Case(
        "the mesh cannot be read",
        train.main,
        training("--gin.MESH=dada=8"),
        ("cannot read the mesh", "'dada=8'"),
        MeshError,
    ),
    Case(
        "the sharding is unknown",
        train.main,
        training("--gin.SHARDING=fdsp"),
        ("no sharding preset 'fdsp'", "data, fsdp, fsdp_model"),
        MeshError,
    ),
    Case(
        "the sharding leaves an axis unused",
        train.main,
        training("--gin.MESH=data=4,model=2", "--gin.SHARDING=fsdp"),
        ("'model' of size 2 unused", "MESH = 'data=4,model=2'", "SHARDING"),
        MeshError,
    ),
]


def other_data(place: Place) -> None:
    """Other items in the folder that the run was trained on, prepared already."""
    write(place.data, interactions=log().with_columns(pl.col("item_id") + 1))
    assert cli.run(prepare.main, [*RECIPE, f"--gin.DATA_DIR={place.data}", f"--cache={place.cache}"]) == 0


def shard(place: Place) -> Path:
    [path] = place.cache.glob("next_item-*/train-*.arrayrecord")
    return path


def flip(path: Path) -> None:
    """Change a byte and keep the size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def serving(change: Callable[[Place], Any]) -> Callable[[Place], list[str]]:
    def words(place: Place) -> list[str]:
        change(place)
        return ["--port=0", f"--bundle={place.bundle}"]

    return words


def at_a_taken_port(place: Place) -> list[str]:
    taken = place.until_the_end.enter_context(socket.socket())
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return [f"--port={taken.getsockname()[1]}", f"--bundle={place.bundle}"]


RUNS = [
    Case(
        "a checkpoint is of another model",
        train.main,
        of_run("--gin.transformer.TransformerConfig.width=32"),
        ("another model", "float32[16,16] in the checkpoint and float32[16,32] here", "new workdir"),
        CheckpointError,
    ),
    Case(
        "a checkpoint is of another vocabulary",
        train.main,
        of_run(change=other_data),
        ("another vocabulary", "item vocabulary", "new workdir"),
        CheckpointError,
    ),
    Case(
        "another vocabulary is evaluated",
        evaluate.main,
        of_run(change=other_data),
        ("another vocabulary",),
        CheckpointError,
    ),
    Case(
        "every checkpoint is damaged",
        train.main,
        of_run(change=lambda place: [cut(largest(p)) for p in (place.run / "checkpoints").iterdir()]),
        ("every checkpoint is damaged", "bytes", "mend:"),
        CheckpointError,
    ),
    Case(
        "there is no checkpoint",
        evaluate.main,
        of_run(change=lambda place: shutil.rmtree(place.run / "checkpoints")),
        ("no checkpoint", "run/checkpoints", "one of: none"),
        CheckpointError,
    ),
    Case(
        "there is no checkpoint of this step",
        export.main,
        of_run("--step=7", "--out=ROOT/new"),
        ("7", "1, 2"),
        CheckpointError,
    ),
    Case(
        "the run has lost its config",
        evaluate.main,
        of_run(change=lambda place: (place.run / command.CONFIG).unlink()),
        ("no recipe is given", "no config.gin in", "--gin_file=FILE"),
        ConfigError,
    ),
    Case("there is no run", evaluate.main, of_run("--workdir=ROOT/nowhere"), ("no config.gin in",), ConfigError),
    Case(
        "a shard is cut short",
        train.main,
        of_run(change=lambda place: cut(shard(place))),
        ("bytes", "train-00000-of-00001.arrayrecord", "mend:"),
        ExamplesError,
    ),
    Case(
        "a shard is altered",
        train.main,
        of_run(change=lambda place: flip(shard(place))),
        ("cannot be read", "train-*.arrayrecord", "prepare again"),
        ExamplesError,
    ),
    Case(
        "counts are altered",
        train.main,
        of_run(change=lambda place: flip(shard(place).parent / "item_count.npy")),
        ("item_count.npy was altered", "mend:"),
        ExamplesError,
    ),
    Case(
        "a shard is missing",
        train.main,
        of_run(change=lambda place: shard(place).unlink()),
        ("train-00000-of-00001.arrayrecord is missing", "mend:"),
        ExamplesError,
    ),
    Case(
        "a bundle is there already",
        export.main,
        of_run("--out=ROOT/bundle"),
        ("will not overwrite", "place/bundle"),
        BundleError,
    ),
    Case(
        "an artifact is to go over a run",
        infer.main,
        of_run("--out=ROOT/run"),
        ("will not overwrite", "place/run"),
        RecjaxError,
    ),
    Case(
        "a bundle is missing",
        server.main,
        serving(lambda place: shutil.rmtree(place.bundle)),
        ("no bundle here", "place/bundle"),
        BundleError,
    ),
    Case(
        "the weights of a bundle are altered",
        server.main,
        serving(lambda place: flip(place.bundle / "weights.safetensors")),
        ("weights.safetensors was altered", "mend:"),
        BundleError,
    ),
    Case(
        "the vocabulary of a bundle is missing",
        server.main,
        serving(lambda place: (place.bundle / "vocabulary.json").unlink()),
        ("vocabulary.json is missing", "mend:"),
        BundleError,
    ),
    Case(
        "a port is in use", server.main, at_a_taken_port, ("cannot listen", "127.0.0.1:", "another --port"), RecjaxError
    ),
]
CASES = [*DATA, *CONFIG, *RUNS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_mistake_is_one_message_and_harms_nothing(
    case: Case, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    words = case.words(place)
    before, raised = contents(place.root), []

    def verb(argv: list[str]) -> int:
        try:
            return case.verb(argv)
        except RecjaxError as error:
            raised.append(error)
            raise

    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "checkpoint .* is damaged", RuntimeWarning)
        assert cli.run(verb, words) == 2
    [error] = raised
    said = capsys.readouterr().err
    assert isinstance(error, case.error), repr(error)
    assert said == f"recjax: {error.message}\n"  # and so no traceback and no progress
    assert "\n  expected: " in said or "\n  mend:     " in said
    for word in case.says:
        assert word in said
    assert contents(place.root) == before


def test_a_full_disk_leaves_older_checkpoints_and_training_goes_on_later(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = of_run("--gin.TRAIN_STEPS=4")(place)
    checkpoints, before = place.run / "checkpoints", contents(place.run / "checkpoints")
    real, writes = AsyncCheckpointer.save, []

    def full(self: Any, directory: Path, *args: Any, **kwargs: Any) -> None:
        writes.append(directory)
        (Path(directory)).mkdir()
        (Path(directory) / "half").write_bytes(b"x" * 100)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(AsyncCheckpointer, "save", full)
    capsys.readouterr()
    assert cli.run(train.main, words) == 2
    said = capsys.readouterr().err
    assert "recjax: could not save the checkpoint of step 3: [Errno 28] No space left on device\n" in said
    assert "the run goes on from step 2" in said and "Traceback" not in said
    assert len(writes) == 1 and contents(checkpoints) == before
    monkeypatch.setattr(AsyncCheckpointer, "save", real)
    assert cli.run(train.main, words) == 0
    assert saved.steps(checkpoints)[-1] == 4
    assert [r["step"] for r in read_metrics(place.run / "metrics.jsonl") if "train/loss" in r] == [1, 2, 3, 4]


def prepared(place: Place, frame: pl.DataFrame, name: str, *bindings: str) -> Examples:
    folder = write(place.root / name, interactions=frame, items=items())
    words = [*RECIPE, f"--gin.DATA_DIR={folder}", f"--cache={place.cache}", *(f"--gin.{b}" for b in bindings)]
    assert cli.run(prepare.main, words) == 0
    [task] = recipe_of(folder, *bindings).mixture.tasks
    return Examples.open(place_of(task, place.cache).path)


def same_examples(a: Examples, b: Examples) -> None:
    assert a.vocab == b.vocab and a.user_ids() == b.user_ids()
    for split in a.splits:
        one, two = a.source(split), b.source(split)
        assert len(one) == len(two) > 0
        for i in range(len(one)):
            assert one[i].keys() == two[i].keys()
            for name in one[i]:
                np.testing.assert_array_equal(one[i][name], two[i][name])


def test_unsorted_events_are_sorted(place: Place) -> None:
    shuffled = log().sample(fraction=1, shuffle=True, seed=1)
    assert not shuffled["timestamp"].is_sorted()
    same_examples(prepared(place, shuffled, "shuffled"), prepared(place, log(), "sorted"))


def test_equal_times_keep_the_order_of_the_file_and_are_counted(place: Place) -> None:
    """Four events a second; in one file the last second comes first, but each second keeps its order."""
    tied = log().with_columns(timestamp=T + pl.int_range(pl.len()) // 4)
    found = prepared(place, tied.sort("timestamp", descending=True, maintain_order=True), "tied")
    same_examples(found, prepared(place, tied, "in order"))
    same = tied.group_by("user_id", "timestamp").len()
    count = same.filter(pl.col("len") > 1)["len"].sum()
    assert any(
        f"{count:,} of {len(tied):,} events" in note and "file order" in note for note in found.manifest["notes"]
    )
    assert "file order" in found.manifest["tie_rule"]


def test_users_of_one_event_are_left_out_and_counted(place: Place) -> None:
    extra = pl.DataFrame({"user_id": [100, 101, 102], "item_id": [1, 2, 3], "timestamp": [T, T, T]})
    plain, found = prepared(place, log(), "plain"), prepared(place, pl.concat([log(), extra]), "extra")
    counts = found.manifest["counts"]
    assert counts["log"]["users"] == 43 and counts["train"]["too_short"] == 3
    assert counts["test"]["without_target"] == counts["valid"]["without_target"] == 3
    for split in found.splits:
        assert len(found.source(split)) == len(plain.source(split)) == 40
    # Their events still count for popularity, which orders the rows.
    assert found.item_count.sum() == plain.item_count.sum() + 3


def test_targets_outside_the_catalogue_are_left_out_and_counted(place: Place) -> None:
    found = prepared(place, log(), "outside", "next_item.NextItem.catalogue='items'")
    counts = found.manifest["counts"]
    assert counts["test"]["target_unknown"] == 1 and counts["log"]["events_outside_catalogue"] == 1
    assert len(found.source("test")) == counts["test"]["examples"] == 39


def test_items_unseen_in_training_are_ranked_and_counted(place: Place) -> None:
    assert cli.run(evaluate.main, of_run()(place)) == 0
    metrics = json.loads((place.run / "test" / "metrics.json").read_text())
    assert metrics["protocol"]["users"] == 40
    assert metrics["buckets"]["item/unseen"]["users"] == 1


def test_a_history_without_known_items_is_refused_by_the_server(place: Place) -> None:
    with TestClient(create_app([Bundle(place.bundle)], max_batch=1)) as client:
        answer = client.post("/v1/recommend", json={"user_history": [7777, 8888]})
        assert answer.status_code == 422
        assert "no item of user_history is known" in answer.json()["error"]["what"]
        assert "2 unknown" in answer.json()["error"]["where"]
        answer = client.post("/v1/recommend", json={"user_history": [7777, NEW_ITEM, 3]})
        assert answer.status_code == 200 and answer.json()["unknown_items"] == 1
