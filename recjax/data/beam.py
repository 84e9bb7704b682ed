"""A log that outgrows one machine, cut by Apache Beam into parts of whole users that do not.

`cut_by_user` reads a Parquet log in pieces, sends each event to the part that its user's id falls in, and writes every
part, put in order as `sources` puts a whole log. The parts divide the ids in order: first all users below some id, and
so on. What is then asked of the parts is asked of one at a time (`over`, `counted`), so that nothing is ever in memory
but a piece, a part, and what there is one of for each item. Which runner does it is the caller's: `direct` in this
process, or any other that Beam knows, whose workers must see the same files.

It takes Parquet, whose columns have types; text files are typed by looking at all of them, which no piece can.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recjax.core.errors import DataError
from recjax.data.beam_runner import Runner
from recjax.data.formats import find_table
from recjax.data.problems import Findings
from recjax.data.reader import Reader
from recjax.data.sources import ROW, in_order

PIECE_ROWS, PART_ROWS = 2**20, 2**21
_SAMPLE = 256  # ids of each piece, to choose parts of about equal size by
_COLUMNS = ("user_id", "item_id", "timestamp", "position", "split")


@dataclass(frozen=True, kw_only=True)
class Log:
    """A Parquet log of interactions of so many rows.

    `extremes` are two rows, the least and the greatest value of each column. Every piece is read together with them, so
    that what depends on all of a column, such as the unit of times, is the same in each piece as in the whole.
    """

    path: str
    columns: Mapping[str, str]
    rows: int
    extremes: pl.DataFrame

    @classmethod
    def open(cls, folder: Path, columns: Mapping[str, str]) -> Log:
        """The interactions of a data directory; raises `DataError` when they cannot be used."""
        found = Findings()
        path = find_table(folder, "interactions", found, required=True)
        found.raise_first()
        assert path is not None
        if path.suffix != ".parquet":
            mend = "write it as Parquet, or prepare without --runner"
            raise DataError("a log for Beam is a Parquet file", where=str(path), mend=mend)
        try:
            log = pl.scan_parquet(path)
            known = log.collect_schema().names()
            wanted = {columns.get(f"interactions.{name}", columns.get(name, name)) for name in _COLUMNS}
            log = log.select([name for name in known if name in wanted])
            told = [pl.len(), *(pl.col(n).null_count().alias(f"{n} null") for n in log.collect_schema().names())]
            counts = log.select(told).collect(engine="streaming").row(0, named=True)
            low, high = (
                f.collect(engine="streaming") for f in (log.select(pl.all().min()), log.select(pl.all().max()))
            )
        except (pl.exceptions.PolarsError, OSError) as problem:
            raise DataError(f"cannot be read: {problem}", where=str(path), expected="a Parquet file") from problem
        for name in low.columns:
            if counts[f"{name} null"]:
                what = f"{name} is missing in {counts[f'{name} null']:,} rows"
                raise DataError(what, where=str(path), mend="drop these rows, or fill them in")
        made = cls(path=str(path), columns=dict(columns), rows=counts["len"], extremes=pl.concat([low, high]))
        made.read((0, 1))
        return made

    def pieces(self) -> list[tuple[int, int]]:
        """The first row and the number of rows of each piece."""
        return [(at, min(PIECE_ROWS, self.rows - at)) for at in range(0, self.rows, PIECE_ROWS)]

    def read(self, piece: tuple[int, int]) -> tuple[pl.DataFrame, int]:
        """The rows of a piece with their numbers, and how many ticks a second of their times has."""
        found, size = Findings(), self.extremes.height
        rows = pl.scan_parquet(self.path).select(self.extremes.columns).slice(*piece).collect()
        reader = Reader(Path(self.path).parent, dict(self.columns), found)
        frame = reader.understand("interactions", pl.concat([self.extremes, rows]), from_text=False)
        found.raise_first()
        assert frame is not None
        return frame.slice(size).with_row_index(ROW, offset=piece[0]), reader.ticks

    @property
    def item_type(self) -> Any:
        """The polars type of ids of items."""
        return self.read((0, 1))[0].schema["item_id"]


def cut_by_user(log: Log, into: Path, runner: Runner) -> list[Path]:
    """Write the log to files of `into`, each with all events of the users of a range of ids; the files in order of id.

    They are as `DataDir.load` would give these users' interactions.
    """
    import apache_beam as beam
    from apache_beam.pvalue import AsSingleton

    parts = -(-log.rows // PART_ROWS)
    with runner.pipeline() as pipeline:
        pieces = pipeline | beam.Create(log.pieces()) | beam.Reshuffle()
        bounds = (
            pieces
            | "Sample" >> beam.Map(_some_users, log)
            | beam.combiners.ToList()
            | "Bounds" >> beam.Map(_bounds, parts)
        )
        _ = (
            pieces
            | "Cut" >> beam.FlatMap(_cut, log, AsSingleton(bounds))
            | beam.GroupByKey()
            | "Write" >> beam.Map(_write, into)
        )
    return sorted(into.glob("part-*.parquet"))


def counted(parts: Sequence[Path], count: Callable[[Path], pl.DataFrame], into: Path, runner: Runner) -> pl.DataFrame:
    """The counts of all parts: `count` gives a column of keys and one of numbers, which are added up by key.

    In order of key.
    """
    import apache_beam as beam

    with runner.pipeline() as pipeline:
        _ = (
            pipeline
            | beam.Create([str(part) for part in parts])
            | beam.Reshuffle()
            | "Count" >> beam.Map(_of_path, count)
            | beam.CombineGlobally(_added).without_defaults()
            | "Keep" >> beam.Map(_save, str(into / "counts.parquet"))
        )
    return pl.read_parquet(into / "counts.parquet")


def over(parts: Sequence[Path], work: Callable[[Path], None], runner: Runner) -> None:
    """Call `work` for every part; what it writes beside the part, it may write more than once."""
    import apache_beam as beam

    with runner.pipeline() as pipeline:
        paths = pipeline | beam.Create([str(part) for part in parts]) | beam.Reshuffle()
        _ = paths | beam.Map(_of_path, work)


def _of_path(path: str, function: Callable[[Path], Any]) -> Any:
    return function(Path(path))


def _some_users(piece: tuple[int, int], log: Log) -> list[int | str]:
    users = log.read(piece)[0].get_column("user_id").sort()
    return users.gather_every(max(1, len(users) // _SAMPLE)).to_list()


def _bounds(samples: Iterable[list[int | str]], parts: int) -> list[int | str]:
    """The first id of every part but the first."""
    ids = sorted(user for sample in samples for user in sample)
    return sorted({ids[len(ids) * part // parts] for part in range(1, parts)})


def _cut(piece: tuple[int, int], log: Log, bounds: list[int | str]) -> Iterator[tuple[int, tuple[pl.DataFrame, int]]]:
    """The events of a piece by the number of their part."""
    frame, ticks = log.read(piece)
    users = frame.get_column("user_id")
    part = pl.Series(bounds, dtype=users.dtype).search_sorted(users, side="right")
    for (number,), rows in frame.with_columns(__part=part).partition_by("__part", as_dict=True).items():
        yield int(number), (rows.drop("__part"), ticks)


def _write(part: tuple[int, Iterable[tuple[pl.DataFrame, int]]], into: Path) -> None:
    number, frames = part[0], list(part[1])
    frame = pl.concat([rows for rows, _ in frames]).sort(ROW).drop(ROW)
    _save(in_order(frame, frames[0][1]), str(into / f"part-{number:06d}.parquet"))


def _added(frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
    frame = pl.concat(frames)
    key, number = frame.columns
    return frame.group_by(key).agg(pl.col(number).sum()).sort(key)


def _save(frame: pl.DataFrame, path: str) -> None:
    """Write a file whole or not at all, also where two workers write the same."""
    beside = f"{path}.{os.uname().nodename}.{os.getpid()}.{id(frame)}.tmp"
    frame.write_parquet(beside)
    os.replace(beside, path)
