"""Batches of rows with labels: the feed of rankers, a sibling of `recjax.data.pipeline.Feed`.

A batch is `field/<name>` as the examples declare them, `label/<head>` float32 [b] (-1 where unknown, which no loss may
count), `weight` float32 [b], `user_index` and, where rows have domains, `domain` int32 [b]. Which row comes next is a
function of the seed and of how many rows came before, so the position is one number, the same for any batch size and
any number of processes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recjax.core.errors import ConfigError, ExamplesError
from recjax.data.batch import Batch
from recjax.data.examples import Examples
from recjax.data.hashing import permutation
from recjax.data.heldout import process_rows
from recjax.data.label_noise import HiddenPositives, MissingNegatives, MissingPeriod, Totals
from recjax.data.label_store import LabelStore
from recjax.data.position import Counted, OneSlot, Rounds
from recjax.data.ranker_features import RankerFeatures
from recjax.data.shards import ExampleSource
from recjax.data.stream import share, shared

ORDERS = ("shuffled", "time")
_ORDER = 0x726F7773  # what a draw is for


@dataclass(frozen=True, kw_only=True)
class RowsFeed(OneSlot):
    """`batch_size` rows a step, over all devices; every row once an epoch.

    `order` is "shuffled", another one each epoch, or "time": as the examples have them, oldest first, so that a single
    epoch is one pass over the stream. `draw` tells shuffled orders of one seed apart: a stage that starts from another
    that was trained on the same rows takes a number of its own, or else it meets the same batches again, one by one.

    With `balance` above 0 domains are drawn in proportion to (their rows) ** (1 - balance), 1 being equally often, each
    going through its own rows. `domain_weight` a multiplies the weight of a row by (N / (T n)) ** a for a domain of n
    of all N rows, T domains: with 1 all domains weigh the same. `domains` are the names of those that are trained on,
    all when there are none.

    `labels` adds what a teacher said of each row, as `teacher/<name>`. For experiments, `hidden` hides some positives,
    `totals` adds a label that is known as totals of domains alone, and `missing` leaves rows without weight. Examples
    larger than `memory_gib` are read from disk.
    """

    batch_size: int
    order: str = "shuffled"
    draw: int = 0
    balance: float = 0.0
    domain_weight: float = 0.0
    domains: Sequence[str] = ()
    labels: LabelStore | None = None
    hidden: HiddenPositives | None = None
    totals: Totals | None = None
    missing: MissingNegatives | MissingPeriod | None = None
    memory_gib: float = 2.0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"RowsFeed.batch_size = {self.batch_size}", expected="at least 1")
        if self.order not in ORDERS:
            raise ConfigError(f"RowsFeed.order = {self.order!r}", expected=" or ".join(map(repr, ORDERS)))
        if self.draw < 0 or (self.draw and self.order == "time"):
            raise ConfigError(f"RowsFeed.draw = {self.draw}", expected='0, or more with order = "shuffled"')
        for name in ("balance", "domain_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"RowsFeed.{name} = {getattr(self, name)}", expected="0 to 1")


class RowReader:
    """Rows of one split by number, as the fields of a batch."""

    def __init__(self, examples: Examples, split: str, *, source: ExampleSource | None = None) -> None:
        """Raises `ExamplesError` for examples of another kind of task."""
        if examples.manifest.get("kind") != "impressions":
            raise ExamplesError(
                f"examples of the kind {examples.manifest.get('kind')!r} are no rows with labels",
                where=str(examples.path),
                expected="a task of impressions",
            )
        self.source = examples.source(split) if source is None else source
        self.heads: tuple[str, ...] = tuple(examples.manifest["heads"])
        self._encoder = RankerFeatures.load(examples.path).encoder
        names = {field.name for field in examples.schema(split)}
        self.single = [name for name in ("weight", "user_index", "domain") if name in names]
        self._lists = {"labels": len(self.heads), **self._encoder.widths}

    def __len__(self) -> int:
        return len(self.source)

    def read(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers."""
        found = self.source.read(rows, [*self.single, *self._lists])
        lists = {name: _matrix(*found[name], width) for name, width in self._lists.items()}
        labels = lists.pop("labels")
        batch = self._encoder.batch(lists)
        batch |= {f"label/{head}": np.ascontiguousarray(labels[:, k]) for k, head in enumerate(self.heads)}
        return batch | {name: found[name][0][found[name][1]] for name in self.single}

    def column(self, name: str) -> np.ndarray:
        """A field of the records of all rows: [n], or [n, heads] for `labels`."""
        values, begins = self.source.read(np.arange(len(self)), [name])[name]
        return _matrix(values, begins, self._lists[name]) if name in self._lists else values[begins]


class RowsBatches(Counted):
    """This process's rows of the training batches."""

    unit, other = "rows", "other examples, another order or seed, or what another teacher said"

    def __init__(
        self, examples: Sequence[Examples], feed: RowsFeed, *, seed: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        """Raises `ConfigError` for several tasks or a batch that cannot be divided, `ExamplesError` for other tasks,
        `ArtifactError` for the labels of other rows."""
        if len(examples) != 1:
            expected = "one task, with a column for its domains"
            raise ConfigError(f"{len(examples)} tasks of impressions", where="Mixture.tasks", expected=expected)
        one = examples[0]
        self._reader = RowReader(one, "train", source=one.source("train", memory_bytes=int(feed.memory_gib * 2**30)))
        self._labels = feed.labels.read(one) if feed.labels else None
        self._feed, self._seed = feed, seed
        self._totals = self._rates_of(feed.totals) if feed.totals else {}
        self._rows = process_rows(feed.batch_size, process_index, process_count)
        has_domains = bool(one.manifest["domains"])
        if not has_domains and (feed.balance or feed.domain_weight or feed.domains):
            raise ConfigError(
                "balance, domain_weight and domains need domains",
                where="RowsFeed",
                expected="Impressions.domain, the column that holds them",
            )
        domain = self._reader.column("domain") if has_domains else np.zeros(len(self._reader), np.int32)
        chosen = _chosen(feed.domains, one.manifest["domains"], domain)
        sizes = np.bincount(domain[chosen])
        weights = (len(chosen) / (np.count_nonzero(sizes) * np.maximum(sizes, 1))) ** feed.domain_weight
        self._weights = weights.astype(np.float32)
        self._parts = [chosen[domain[chosen] == d] for d in np.flatnonzero(sizes)] if feed.balance else [chosen]
        self._rates = [float(len(part)) ** (1 - feed.balance) for part in self._parts]
        told = [one.hash, feed.order, feed.balance, seed, *feed.domains]
        told += [self._labels.hash] if self._labels else []
        told += [{"draw": feed.draw}] if feed.draw else []
        super().__init__(json.dumps(told))
        self._rounds = [
            Rounds(len(part), functools.partial(self._order_of, number, len(part)))
            for number, part in enumerate(self._parts)
        ]

    def __next__(self) -> Batch:
        rows = self.numbers(self._position + np.arange(self._rows.start, self._rows.stop))
        self._position += self._feed.batch_size
        batch = self._reader.read(rows)
        domain = batch.get("domain", np.zeros(len(rows), np.int32))
        batch |= {f"label/{name}": rates[domain] for name, rates in self._totals.items()}
        if self._feed.hidden:
            batch = self._feed.hidden.apply(batch, rows)
        if self._feed.missing:
            batch = self._feed.missing.apply(batch, rows, len(self._reader))
        if self._feed.domain_weight:
            batch["weight"] = batch["weight"] * self._weights[batch["domain"]]
        return batch | self._labels.of_rows(rows) if self._labels else batch

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        """int64: the number of the row at each position of the endless stream; positions in ascending order."""
        part, local = share(positions, self._rates)
        found = np.empty(len(positions), np.int64)
        for number, (rows, rounds) in enumerate(zip(self._parts, self._rounds, strict=True)):
            mine = part == number
            found[mine] = rows[rounds.at(local[mine])]
        return found

    @property
    def epochs(self) -> list[float]:
        """How often the rows have been gone through; where domains are balanced, those of the one that is furthest."""
        counts = shared(self._position, self._rates)
        return [max(count / len(part) for count, part in zip(counts, self._parts, strict=True))]

    @property
    def epoch_targets(self) -> list[int]:
        """Rows of an epoch."""
        return [sum(map(len, self._parts))]

    unique_targets = epoch_targets

    def _rates_of(self, totals: Totals) -> dict[str, np.ndarray]:
        """The labels that are known as totals: name -> [domains]. Raises `ConfigError` without such a head."""
        heads = self._reader.heads
        if totals.head not in heads:
            raise ConfigError(f"no head {totals.head!r}", where="Totals.head", expected=", ".join(heads))
        label = self._reader.column("labels")[:, heads.index(totals.head)]
        domain = self._reader.column("domain") if "domain" in self._reader.single else np.zeros(len(label), np.int32)
        return {totals.name: totals.rates(label, domain)}

    def _order_of(self, part: int, count: int, epoch: int) -> np.ndarray:
        if self._feed.order == "time":
            return np.arange(count)
        key = (part, epoch, self._feed.draw) if self._feed.draw else (part, epoch)
        return permutation(count, self._seed, _ORDER, *key)


def held_rows(
    reader: RowReader, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[tuple[np.ndarray, Batch]]:
    """All rows of a split in order: the number of each row of this process (-1 in rows that fill the last batch) and
    the batch, with `row_weight` 0 where a row fills. Every process gets as many batches."""
    mine = process_rows(batch_size, process_index, process_count)
    for start in range(0, len(reader), batch_size):
        numbers = start + np.arange(mine.start, mine.stop)
        real = numbers < len(reader)
        batch = reader.read(np.where(real, numbers, 0))
        batch["row_weight"] = real.astype(np.float32)
        yield np.where(real, numbers, -1), batch


def _chosen(wanted: Sequence[str], names: Sequence[str], domain: np.ndarray) -> np.ndarray:
    """int64: the numbers of the rows of the domains that are wanted; all of them when none is named."""
    if unknown := [name for name in wanted if name not in names]:
        raise ConfigError(f"no domain {', '.join(unknown)}", where="RowsFeed.domains", expected=", ".join(names))
    if not wanted:
        return np.arange(len(domain))
    return np.flatnonzero(np.isin(domain, [names.index(name) for name in wanted]))


def _matrix(values: np.ndarray, begins: np.ndarray, width: int) -> np.ndarray:
    """[rows, width]: lists of one length, out of the flat values of all."""
    return values.reshape(-1, width)[begins // width]
