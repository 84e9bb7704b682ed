"""`recjax prepare`: data directories checked and brought in, and the examples of a recipe's tasks made once.

A folder of examples appears whole or not at all, and what is finished is used again. A lock keeps two processes from
doing the same work; where a file system has no locks, the first to finish wins. Examples are made in a process of
their own (`ensure_prepared`), because those with text need TensorFlow and seqio; others, and reading, need neither.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from recjax import cli
from recjax.core import errors
from recjax.core.errors import ConfigError, ExamplesError, RecjaxError
from recjax.core.flags import Flags, parse_argv, recipe_files
from recjax.core.lock import held
from recjax.core.progress import Progress
from recjax.core.remote import local_cache, shared_cache
from recjax.data.beam_runner import Runner
from recjax.data.examples import Examples, write_examples
from recjax.data.record import RawColumns
from recjax.data.small_world import SmallWorld
from recjax.data.sources import DataDir, World
from recjax.tasks.cache import Place, bring, described, place_of, share
from recjax.tasks.mixtures import Mixture
from recjax.tasks.work import AT_ONCE, Task, Work, columns_of, count, in_parts

_ERROR_FILE = "error.json"
_MIXTURE_FILE = "mixture.pickle"
# Preparing uses no accelerator, and must not take one from the process that waits for it.
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
_EXAMPLES = """examples:
  recjax prepare sasrec --gin.DATA_DIR=DIR         the examples of a recipe
  recjax prepare sasrec --gin.DATA_DIR=DIR --runner=flink --runner_option=--flink_master=HOST:8081
  recjax prepare --check DIR --columns item_id=movieId timestamp=time
  recjax prepare --from tfds:movielens/1m-ratings --to DIR
  recjax prepare --from simulate:1000000 --to DIR
  recjax prepare --from shared_queries:rho=0.5,items=1000 --to DIR    (a small world, see recjax/data/worlds.py)
gin flags: --gin_file=FILE, --gin.NAME=VALUE, --gin_search_paths=DIR"""


def main(argv: Sequence[str] | None = None) -> int:
    """The verb; returns the exit status, 2 when a checked directory cannot be used."""
    flags = parse_argv(sys.argv[1:] if argv is None else argv)
    parser = cli.ArgumentParser("prepare")
    parser.epilog = _EXAMPLES
    parser.add_argument("recipe", nargs="?", default="", help="its name; a --gin_file beside it varies every stage")
    parser.add_argument("--cache", type=Path, help="where prepared examples are kept (default: RECJAX_CACHE)")
    parser.add_argument("--check", metavar="DIR", help="say what is understood of a data directory and what is wrong")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="column names, for --check")
    parser.add_argument(
        "--from", dest="source", metavar="SOURCE", help="tfds:NAME, simulate:EVENTS or a small world, to --to"
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="the data directory that --from writes")
    parser.add_argument("--runner", default="", help="prepare by Apache Beam: direct, flink, spark, dataflow, ...")
    parser.add_argument("--runner_option", action="append", default=[], help="an option of Beam; may be repeated")
    parser.add_argument("--specification", type=Path, help=cli.argparse.SUPPRESS)
    args = parser.parse_args(list(flags.rest))
    if args.specification is not None:
        return _run_specification(args.specification, args.cache)
    wanted = [
        name
        for name, value in (
            ("a recipe", args.recipe or flags.gin_files),
            ("--check", args.check),
            ("--from", args.source),
        )
        if value
    ]
    if len(wanted) != 1:
        raise ConfigError(
            f"{' and '.join(wanted) or 'nothing'} to prepare",
            expected="a recipe, --check DIR, or --from SOURCE --to DIR",
            mend="`recjax prepare --help` shows examples",
        )
    if args.check:
        from recjax.data.check import check

        report = check(DataDir(path=args.check, columns=_columns(args.columns)))
        print(report.render(), end="")
        return 0 if report.ok else 2
    if args.columns:
        raise ConfigError("--columns goes with --check", mend="give a recipe its columns as DataDir.columns")
    if args.source:
        _bring_in(args.source, args.to)
        return 0
    runner = Runner(name=args.runner, options=tuple(args.runner_option)) if args.runner else None
    for mixture in _mixtures(args.recipe, flags):
        if runner is not None:
            prepare(mixture, args.cache, runner=runner)
        for examples in ensure_prepared(mixture, args.cache):
            splits = examples.manifest["splits"].items()
            print(examples.path, *(f"{name}={told['examples']}" for name, told in splits))
    return 0


def prepare(
    mixture: Mixture, cache: str | os.PathLike[str] | None = None, *, runner: Runner | None = None
) -> list[Path]:
    """Make the examples of every task that are not there yet, by Apache Beam with a `runner`; the folders of all tasks.

    Raises `ExamplesError` when a folder is damaged, or when text is to be spelt where TensorFlow or seqio is missing,
    and `DataError` when the data cannot be used.
    """
    paths = []
    for task in mixture.evaluated:
        place = place_of(task, cache)
        if not bring(place):
            _make(task, place, runner)
        paths.append(Examples.open(place.path).path)
    return paths


def ensure_prepared(mixture: Mixture, cache: str | os.PathLike[str] | None = None) -> list[Examples]:
    """The examples of every task; what is missing is made by another process.

    This process stays without TensorFlow. Raises what `prepare` raises.
    """
    places = [place_of(task, cache) for task in mixture.evaluated]
    missing = [place for place in places if not place.path.exists()]
    if missing:
        # Of several processes on a machine one starts the other process, which has a lock of its own.
        first = missing[0].path
        with held(first.with_name(f".{first.name}.wait"), wait=True):
            if not all(bring(place) for place in missing):
                _prepare_elsewhere(mixture, shared_cache(cache) or local_cache(cache))
    return [Examples.open(place.path) for place in places]


def _run_specification(folder: Path, cache: Path) -> int:
    """The other end of `ensure_prepared`: prepare the mixture in `folder`, leaving a mistake there as a file."""
    try:
        prepare(pickle.loads((folder / _MIXTURE_FILE).read_bytes()), cache)
    except RecjaxError as error:
        fields = {k: getattr(error, k) for k in ("what", "where", "expected", "mend")}
        (folder / _ERROR_FILE).write_text(json.dumps({"class": type(error).__name__, **fields}))
        return 2
    return 0


def _prepare_elsewhere(mixture: Mixture, cache: str | Path) -> None:
    package_root = str(Path(errors.__file__).parents[2])
    path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="recjax-prepare-") as name:
        folder = Path(name)
        (folder / _MIXTURE_FILE).write_bytes(pickle.dumps(mixture))
        command = [sys.executable, "-m", "recjax.prepare", f"--specification={folder}", f"--cache={cache}"]
        status = subprocess.run(command, env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path}, check=False).returncode
        if (folder / _ERROR_FILE).exists():
            told = json.loads((folder / _ERROR_FILE).read_text())
            raise getattr(errors, told.pop("class"))(told.pop("what"), **told)
    if status:
        raise ExamplesError(
            f"preparing the examples ended with status {status}",
            where=" ".join(command[1:3]),
            mend="see the messages above; `recjax prepare` with the same recipe shows them again",
        )


def _make(task: Task, place: Place, runner: Runner | None) -> None:
    path = place.path
    with held(path.with_name(f".{path.name}.lock"), wait=True):
        if path.exists():
            return
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed: nobody else is here
            shutil.rmtree(leftover, ignore_errors=True)
        if runner is not None:
            from recjax.tasks import next_item_beam  # not above: a training process may be without polars

            next_item_beam.make(task, place, runner)
            share(place)
            return
        work = task.work()
        parts = _spelt(work) if work.steps else lambda split: in_parts(work.raw[split], AT_ONCE)
        facts = {
            "task": task.name,
            "config": described(task),
            "source_hash": place.source_hash,
            "content_hash": place.content_hash,
            **work.facts,
        }
        try:
            kept = {name: getattr(work, name) for name in ("vocab", "items", "users", "text", "files")}
            with write_examples(path, facts=facts, **kept) as writer:
                for split, schema in work.schemas.items():
                    writer.add(split, schema, columns_of([], schema))
                    total = count(work.raw[split])
                    with Progress(f"{task.name}: {split}", total=total, unit="users") as progress:
                        for columns in parts(split):
                            writer.add(split, schema, columns)
                            if writer.examples(split) < total:
                                progress.update(writer.examples(split))
                        progress.update(total, examples=f"{writer.examples(split):,}")
        except ExamplesError:
            if not path.exists():  # else another process, unseen by the lock, was first; its folder serves as well
                raise
        share(place)


def _spelt(work: Work) -> Callable[[str], Iterator[RawColumns]]:
    """The examples of a split, by TensorFlow and seqio; raises `ExamplesError` where they are missing."""
    from recjax.tasks.seqio_bridge import check_available, import_quietly, materialise, seqio_task

    check_available()
    import_quietly()
    converted = seqio_task(work)
    return lambda split: materialise(converted, split)


def _columns(words: Sequence[str]) -> dict[str, str]:
    """`NAME=COLUMN` words as a mapping."""
    pairs = [word.partition("=") for word in words]
    for name, equals, column in pairs:
        if not (name and equals and column):
            raise ConfigError(f"cannot read {name}{equals}{column}", where="--columns", expected="item_id=movieId")
    return {name: column for name, _, column in pairs}


def _bring_in(source: str, to: Path | None) -> None:
    """Write the data directory `to` from a public data set or the simulated world."""
    kind, _, name = source.partition(":")
    if to is None:
        raise ConfigError(f"--from {source} needs a place", expected="--to DIR")
    if kind == "simulate" and name.isdecimal():
        from recjax.data.simulate import write as write_world

        write_world(World(num_events=int(name)), to)
    elif kind == "tfds" and name:
        from recjax.data.tfds_import import import_tfds

        import_tfds(name, to)
    else:
        _small_world(kind, name).write(to)
    print(to)


def _small_world(kind: str, settings: str) -> SmallWorld:
    """The world of `KIND` or `KIND:NAME=NUMBER,...`."""
    from recjax.data.worlds import WORLDS

    if kind not in WORLDS:
        raise ConfigError(
            f"cannot read --from {kind}", expected=f"tfds:NAME, simulate:EVENTS, or one of {', '.join(WORLDS)}"
        )
    types = {field.name: type(field.default) for field in dataclasses.fields(WORLDS[kind])}
    found = {}
    for name, _, value in (word.partition("=") for word in filter(None, settings.split(","))):
        try:
            found[name] = types[name](value)
        except (KeyError, ValueError):
            raise ConfigError(
                f"cannot read {name}={value}", where=f"--from {kind}", expected=f"numbers for {', '.join(types)}"
            ) from None
    return WORLDS[kind](**found)


def _mixtures(recipe: str, flags: Flags) -> list[Mixture]:
    """The mixtures of a recipe's stages, or of one gin file."""
    from recjax.command import load

    if not recipe:
        return [load(flags)[0].mixture]
    stages = (dataclasses.replace(flags, gin_files=(str(f), *flags.gin_files)) for f in recipe_files(recipe))
    return [load(stage)[0].mixture for stage in stages]


if __name__ == "__main__":
    sys.exit(cli.run(main))
