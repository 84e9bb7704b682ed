"""Whatever a user can get wrong ends in one message and status 2, and leaves everything that was there as it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from recjax import cli, command, evaluate, export, infer, prepare, run, train
from recjax import list as listing
from recjax.core.errors import (
    ArtifactError,
    BundleError,
    CheckpointError,
    ConfigError,
    DataError,
    ExamplesError,
    MeshError,
    RecjaxError,
)
from recjax.core.flags import Flags
from recjax.serve import __main__ as server
from recjax.serve.app import create_app
from recjax.serve.bundle import Bundle

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


class Place(NamedTuple):
    """What a case may break: a folder of its own with data, a finished run, its examples, and its bundle."""

    root: Path
    data: Path
    run: Path
    cache: Path
    bundle: Path
    until_the_end: contextlib.ExitStack

    @classmethod
    def at(cls, root: Path, stack: contextlib.ExitStack) -> Place:
        return cls(root, *(root / name for name in ("data", "run", "cache", "bundle")), stack)

    @property
    def shard(self) -> Path:
        [path] = self.cache.glob("next_item-*/train-*.arrayrecord")
        return path


@pytest.fixture(scope="module")
def finished(prepare_here: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, the examples made of it, a run of two steps and a bundle."""
    place = Place.at(tmp_path_factory.mktemp("finished"), contextlib.ExitStack())
    write(place.data, interactions=log(), items=items())
    files, data = (word.partition("=")[2] for word in RECIPE), f"DATA_DIR={place.data}"
    recipe, _ = command.load(Flags(gin_files=tuple(files), bindings=(data,)))
    for task in recipe.mixture.tasks:
        prepare_here(task, place.cache)
    at = (f"--workdir={place.run}", f"--cache={place.cache}")
    assert cli.run(train.main, [*RECIPE, f"--gin.{data}", "--gin.checkpoint.Checkpoints.every=1", *at]) == 0
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
    root = tmp_path / "place"
    shutil.copytree(finished, root)
    config = root / "run" / command.CONFIG  # says where the data was
    config.write_text(config.read_text().replace(str(finished), str(root)))
    monkeypatch.chdir(root)
    with contextlib.ExitStack() as stack:
        yield Place.at(root, stack)


Change = Callable[[Place], Any]
NOTHING: Change = bool


@dataclass(frozen=True)
class Case:
    """`words` breaks something and returns the command line; what is said holds all of `says`."""

    name: str
    verb: cli.Main
    words: Callable[[Place], list[str]]
    says: tuple[str, ...]
    error: type[RecjaxError]


def of_data(name: str, change: Callable[[Path], Any], *says: str) -> Case:
    """A data directory that `change` breaks, prepared."""

    def words(place: Place) -> list[str]:
        shutil.rmtree(place.cache)
        place.cache.mkdir()
        change(place.data)
        return [*RECIPE, f"--gin.DATA_DIR={place.data}", f"--cache={place.cache}"]

    return Case(name, prepare.main, words, (*says, "mend:"), DataError)


def of_setting(name: str, word: str, *says: str, error: type[RecjaxError] = ConfigError) -> Case:
    """Training with one more word, in a workdir of its own, which must not even be made."""

    def words(place: Place) -> list[str]:
        at = f"--workdir={place.root / 'new'}", f"--cache={place.cache}"
        return [*RECIPE, f"--gin.DATA_DIR={place.data}", *at, *word.split()]

    return Case(name, train.main, words, says, error)


def of_gin(name: str, text: str, *says: str) -> Case:
    """Training with a gin file of one's own."""

    def words(place: Place) -> list[str]:
        (place.root / "own.gin").write_text(text)
        return [f"--gin_file={place.root / 'own.gin'}", f"--workdir={place.root / 'new'}"]

    return Case(name, train.main, words, says, ConfigError)


def of_run(name: str, verb: cli.Main, change: Change, more: str, error: type[RecjaxError], *says: str) -> Case:
    """A command on the finished run, once `change` has broken something."""

    def words(place: Place) -> list[str]:
        change(place)
        return words_of_run(place, more.replace("ROOT", str(place.root)))

    return Case(name, verb, words, says, error)


def words_of_run(place: Place, more: str = "") -> list[str]:
    return [f"--workdir={place.run}", f"--cache={place.cache}", *more.split()]


def of_server(name: str, change: Change, *says: str, error: type[RecjaxError] = BundleError) -> Case:
    """Serving the bundle, once `change` has broken something."""

    def words(place: Place) -> list[str]:
        taken = change(place)
        return [f"--port={taken or 0}", f"--bundle={place.bundle}"]

    return Case(name, server.main, words, says, error)


def log_with(change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], Any]:
    return lambda folder: write(folder, interactions=change(log()))


def column(name: str, change: Callable[[list], list], dtype: Any = None) -> Callable[[Path], Any]:
    return log_with(lambda frame: frame.with_columns(pl.Series(name, change(frame[name].to_list()), dtype)))


def instead(name: str, content: bytes) -> Callable[[Path], Any]:
    """Another file in place of the log."""

    def change(folder: Path) -> None:
        (folder / "interactions.parquet").unlink()
        (folder / name).write_bytes(content)

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    """Change a byte and keep the size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def damage_checkpoints(place: Place) -> None:
    for checkpoint in (place.run / "checkpoints").iterdir():
        cut(max(checkpoint.rglob("*"), key=lambda path: path.stat().st_size * path.is_file()))


def other_data(place: Place) -> None:
    """Other items in the folder that the run was trained on, prepared already."""
    write(place.data, interactions=log().with_columns(pl.col("item_id") + 1))
    assert cli.run(prepare.main, [*RECIPE, f"--gin.DATA_DIR={place.data}", f"--cache={place.cache}"]) == 0


def take_a_port(place: Place) -> int:
    taken = place.until_the_end.enter_context(socket.socket())
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return taken.getsockname()[1]


HEADER = b"user_id,item_id,timestamp\n"
NO_USERS = pl.DataFrame({"user_id": []}, schema={"user_id": pl.Int64})
WORDS = pl.DataFrame({"item_id": ["a", "b"]})
NAN = float("nan")
# fmt: off
CASES = [
    of_data("a column is missing", log_with(lambda f: f.drop("user_id")), "no column user_id", "interactions.parquet"),
    of_data("a column has another name", log_with(lambda f: f.rename({"item_id": "movieId"})),
            "no column item_id", 'columns={"item_id": "movieId"}'),
    of_data("the order is unknown", log_with(lambda f: f.drop("timestamp")), "neither a timestamp nor a position"),
    of_data("a time is a word", column("timestamp", lambda v: ["soon", *map(str, v[1:])]), "'soon'", "row 1"),
    of_data("ids are lists", column("item_id", lambda v: [[i] for i in v]), "type List", "column item_id", "expected:"),
    of_data("an id is null", column("item_id", lambda v: [*v[:4], None, *v[5:]]), "missing in 1 row", "row 5"),
    of_data("an id is NaN", column("user_id", lambda v: [NAN, *v[1:]], pl.Float64), "missing in 1 row", "row 1"),
    of_data("a time is null", column("timestamp", lambda v: [*v[:-1], None]), "time is missing in 1 row"),
    of_data("times are NaN", column("timestamp", lambda v: [NAN] * 2 + v[2:], pl.Float64),
            "time is missing in 2 rows", "row 1, column timestamp"),
    of_data("an id is negative", column("item_id", lambda v: [-1, *v[1:]]), "negative in 1 row", "from 0 upwards"),
    of_data("an item is described twice", lambda folder: write(folder, items=pl.concat([items(), items()[:2]])),
            "item_id 0 occurs again (2 rows", "items.parquet, row 61"),
    of_data("ids are numbers here and words there", lambda folder: write(folder, items=WORDS),
            "mixed types", "items.parquet, row 1"),
    of_data("nobody is in the users table", lambda folder: write(folder, users=NO_USERS), "no rows", "users.parquet"),
    of_data("the log is an empty file", instead("interactions.csv", b""), "empty (0 bytes)", "interactions.csv"),
    of_data("the log is an empty Parquet file", instead("interactions.parquet", b""), "empty (0 bytes)"),
    of_data("the log has a header alone", instead("interactions.csv", HEADER), "no rows", "expected:"),
    of_data("the log is of another type", instead("interactions.parquet", HEADER + b"1,2,3\n"), "parquet but is text"),
    of_data("the log is cut short", lambda folder: cut(folder / "interactions.parquet"), "damaged Parquet"),
    of_data("a line is too long", instead("interactions.csv", HEADER + b"1,2,3\n1,2,3,4\n"), "4 cells", "row 2"),
    of_data("there is no folder", shutil.rmtree, "no such data directory", "place/data"),
    of_data("there is no log", lambda folder: (folder / "interactions.parquet").unlink(), "no interactions file"),
    of_data("the log is there twice", lambda folder: log().write_csv(folder / "interactions.csv"),
            "interactions.parquet, interactions.csv", "one file a table"),
    of_data("nobody has two events", log_with(lambda f: f.unique("user_id")), "no user has two events", "longer"),

    Case("a verb is misspelt", cli._main, lambda _: ["tarin"], ("no verb tarin", "did you mean train?"), ConfigError),
    Case("a recipe is misspelt", run.main, lambda _: ["sasrecc"], ("sasrecc", "did you mean sasrec?"), ConfigError),
    Case("a recipe is not listed", listing.main, lambda _: ["x"], ("no recipe x", "`recjax list` shows"), ConfigError),
    of_setting("a flag is misspelt", "--wrokdir=x", "no flag --wrokdir", "did you mean --workdir?"),
    of_setting("a flag has no value", "--profile", "--profile", "mend:"),
    of_setting("a gin file is misspelt", "--gin_file=configs/run/tini.gin", "no gin file configs/run/tini.gin",
               "did you mean configs/run/tiny.gin?"),
    of_setting("a macro is misspelt", "--gin.TRAIN_STEP=3", "--gin.TRAIN_STEP=3", "did you mean TRAIN_STEPS?"),
    of_setting("a parameter is misspelt", "--gin.pipeline.Feed.row_lenght=8", "no parameter row_lenght",
               "did you mean row_length?"),
    of_setting("a class is misspelt", "--gin.optim.Optimiser.eps=1.0", "Optimiser", "did you mean optim.Optimizer?"),
    of_setting("a metric is misspelt", "--gin.checkpoint.Checkpoints.metric='ndgc@10'", "no metric 'ndgc@10'",
               "did you mean ndcg@10?"),
    of_setting("a value is of another type", "--gin.LEARNING_RATE=fast", "learning_rate = 'fast'", "a number"),
    of_setting("an object is not made", "--gin.recipe.Recipe.feed=@pipeline.Feed", "@pipeline.Feed is a class",
               "write @pipeline.Feed()"),
    of_gin("a macro is left unset", "include 'configs/run/train.gin'\nTRAIN_STEPS = 5\nBATCH_SIZE = 8\n",
           "not set: LEARNING_RATE", "base.gin:", "--gin.LEARNING_RATE=..."),
    of_gin("a gin file is not gin", "TRAIN_STEPS = \n", "own.gin:1", "expected:"),
    of_setting("steps are negative", "--gin.TRAIN_STEPS=-3", "train_steps = -3", "at least 0"),
    of_setting("a rate is negative", "--gin.LEARNING_RATE=-1.0", "learning_rate = -1.0", "0 or more"),
    of_setting("a seed is too large", "--gin.SEED=9999999999", "seed = 9999999999", "from 0"),
    of_setting("a batch is empty", "--gin.BATCH_SIZE=0", "batch_size = 0", "at least 1"),
    of_setting("a size is zero", "--gin.transformer.TransformerConfig.width=0", "width = 0", "at least 1"),
    of_setting("dropout is certain", "--gin.sequence.Sequence.embedding_dropout=1.0", "dropout = 1.0", "[0, 1)"),
    of_setting("positions do not reach", "--gin.sequence.Sequence.max_length=8", "for 8 events and is fed 16"),
    of_setting("a batch cannot be divided", "--gin.BATCH_SIZE=12", "BATCH_SIZE 12 cannot be split into 8",
               "MESH = 'data=-1'", error=MeshError),
    of_setting("the mesh does not fit the devices", "--gin.MESH=data=3", "does not match the devices",
               "MESH = 'data=3'", "a product of 8", error=MeshError),
    of_setting("the mesh cannot be read", "--gin.MESH=dada=8", "cannot read the mesh", "'dada=8'", error=MeshError),
    of_setting("the sharding is unknown", "--gin.SHARDING=fdsp", "no sharding preset 'fdsp'",
               "data, fsdp, fsdp_model", error=MeshError),
    of_setting("the sharding leaves an axis unused", "--gin.MESH=data=4,model=2 --gin.SHARDING=fsdp",
               "'model' of size 2 unused", "MESH = 'data=4,model=2'", "SHARDING", error=MeshError),

    of_run("a checkpoint is of another model", train.main, NOTHING, "--gin.transformer.TransformerConfig.width=32",
           CheckpointError, "another model", "float32[96,16] in the checkpoint and float32[96,32] here", "new workdir"),
    of_run("a checkpoint is of another vocabulary", train.main, other_data, "", CheckpointError,
           "another vocabulary", "item vocabulary", "new workdir"),
    of_run("another vocabulary is evaluated", evaluate.main, other_data, "", CheckpointError, "another vocabulary"),
    of_run("every checkpoint is damaged", train.main, damage_checkpoints, "", CheckpointError,
           "every checkpoint is damaged", "bytes", "mend:"),
    of_run("there is no checkpoint", evaluate.main, lambda place: shutil.rmtree(place.run / "checkpoints"), "",
           CheckpointError, "no checkpoint", "run/checkpoints", "one of: none"),
    of_run("there is no such step", export.main, NOTHING, "--step=7 --out=ROOT/new", CheckpointError, "7", "1, 2"),
    of_run("there is no such metric", export.main, NOTHING, "--checkpoint=max:recall --out=ROOT/new", CheckpointError,
           "'max:recall'", "ndcg@10", "recall@10"),
    of_run("the run has lost its config", evaluate.main, lambda place: (place.run / command.CONFIG).unlink(), "",
           ConfigError, "no recipe is given", "no config.gin in", "--gin_file=FILE"),
    of_run("there is no run", evaluate.main, NOTHING, "--workdir=ROOT/nowhere", ConfigError, "no config.gin in"),
    of_run("a shard is cut short", train.main, lambda place: cut(place.shard), "", ExamplesError,
           "bytes", "train-00000-of-00001.arrayrecord", "mend:"),
    of_run("a shard is altered", train.main, lambda place: flip(place.shard), "", ExamplesError,
           "cannot be read", "train-*.arrayrecord", "prepare again"),
    of_run("a shard is missing", train.main, lambda place: place.shard.unlink(), "", ExamplesError,
           "train-00000-of-00001.arrayrecord is missing", "mend:"),
    of_run("counts are altered", train.main, lambda place: flip(place.shard.parent / "item_count.npy"), "",
           ExamplesError, "item_count.npy was altered", "mend:"),
    of_run("a bundle is there already", export.main, NOTHING, "--out=ROOT/bundle", BundleError,
           "will not overwrite", "place/bundle"),
    of_run("an artifact is to go over a run", infer.main, NOTHING, "--out=ROOT/run", ArtifactError,
           "will not overwrite", "place/run"),
    of_server("a bundle is missing", lambda place: shutil.rmtree(place.bundle), "no bundle here", "place/bundle"),
    of_server("weights of a bundle are altered", lambda place: flip(place.bundle / "weights.safetensors"),
              "weights.safetensors was altered", "mend:"),
    of_server("a bundle has lost its vocabulary", lambda place: (place.bundle / "vocabulary.json").unlink(),
              "vocabulary.json is missing", "mend:"),
    of_server("a port is in use", take_a_port, "cannot listen", "127.0.0.1:", "another --port", error=RecjaxError),
]
# fmt: on


def contents(root: Path) -> dict[str, str]:
    """Every file and folder with a hash; empty lock files apart."""
    found = {}
    for path in sorted(root.rglob("*")):
        if not path.name.endswith((".wait", ".lock")):
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_mistake_is_one_message_and_harms_nothing(
    case: Case, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    words = case.words(place)
    before, found = contents(place.root), []

    def verb(argv: list[str]) -> int:
        with pytest.raises(case.error) as raised:
            case.verb(argv)
        found.append(raised.value)
        raise raised.value

    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "checkpoint .* is damaged", RuntimeWarning)
        assert cli.run(verb, words) == 2
    said = capsys.readouterr().err
    assert said == f"recjax: {found[0].message}\n"  # and so no traceback and no progress
    assert "\n  expected: " in said or "\n  mend:     " in said
    for word in case.says:
        assert word in said
    assert contents(place.root) == before


def test_items_unseen_in_training_are_ranked_and_counted(place: Place) -> None:
    assert cli.run(evaluate.main, words_of_run(place)) == 0
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
