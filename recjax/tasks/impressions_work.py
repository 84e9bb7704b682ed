"""What an impression task does with a log: rows, what was known before them, fields fitted on training rows, records.

The columns of a row are completed and encoded by `RankerFeatures`, the object that a server uses; it is kept beside the
examples, with what counters and histories say once the log has ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.ahead import sums_ahead
from recjax.data.field_encoder import CODES, NUMBERS, FieldEncoder
from recjax.data.impression_log import SPLITS, ImpressionLog, raw_of
from recjax.data.ranker_features import TABLES, RankerFeatures, SideTable, completed
from recjax.data.raw import Raw
from recjax.data.record import Column, Field, spans
from recjax.data.titles import title_column
from recjax.data.vocab import ItemVocab
from recjax.tasks.impression_choice import chosen_parts
from recjax.tasks.impression_past import Columns, past
from recjax.tasks.impression_rows import TRAIN, Rows, kept_rows, labels_of, times_of, with_negatives
from recjax.tasks.impressions import Impressions
from recjax.tasks.work import Work


def make_work(task: Impressions, log: ImpressionLog) -> Work:
    """The work of `task` on this log; raises `DataError` as `Impressions.work` says."""
    frame = log.rows
    if "timestamp" in frame.columns:
        frame = frame.sort("timestamp", maintain_order=True)
    users, user_ids = _numbered(frame, task.user)
    items, item_ids = _numbered(frame, task.item)
    labels, sides = labels_of(task.rules, frame), _sides(task, log, frame)
    domain, domains = _domains(task, frame, sides)
    part, rule = chosen_parts(task, frame, labels, domain, users)
    labels = np.concatenate([labels, _ahead(task, frame, users, part)], axis=1)
    rows = Rows(np.arange(frame.height), part, labels, np.full(frame.height, -1))
    apart = _numbered(frame, task.apart)[0] if task.apart else users
    rows, unfound = with_negatives(task, rows, apart, items, len(item_ids), domain)
    columns = _columns(task, frame, sides, rows, item_ids)
    known_before, snapshots = past(task, frame, rows, completed(columns, sides, task.imputation))
    columns |= known_before

    kept = np.flatnonzero(kept_rows(task, rows))
    kept = kept[np.lexsort((kept, rows.log[kept]))]  # drawn rows stand with the row they were drawn for
    rows, columns = rows.take(kept), {name: column.take(kept) for name, column in columns.items()}
    _check_parts(rows)
    complete = completed(columns, sides, task.imputation)
    trained = np.flatnonzero(rows.part == TRAIN)
    vocab, catalogue = _catalogue(task, log, frame, rows, items, item_ids)
    known = {n: c.take(trained) for n, c in complete.items()}
    encoder = FieldEncoder.fit(task.fields, known, log.vectors, vocab.ids)
    features = RankerFeatures(_read(sides, task, encoder), tuple(task.imputation), encoder, snapshots)
    number, domains = _by_size(domain[rows.log], rows.part, domains, task.domains)
    made = {
        "user_index": Column(users[rows.log]),
        "items": _lists(vocab.encode(item_ids)[_items(rows, items)][:, None]),
        "labels": _lists(rows.labels),
        "weight": Column(_weights(task, frame, sides)[rows.log]),
        **{name: _lists(values) for name, values in encoder.store(complete).items()},
    }
    if task.domain:
        made["domain"] = Column(number)
    if task.request or task.negatives:
        made["request"] = Column(_requests(task, frame)[rows.log])
    if task.lengths:
        made["length"] = Column(_lengths(task.lengths, frame, sides)[rows.log])
    if "timestamp" in frame.columns:
        made["time"] = Column(times_of(frame, "")[rows.log])
    at = {split: np.flatnonzero(rows.part == k) for k, split in enumerate(SPLITS)}
    return Work(
        name=task.name,
        raw={split: {name: _taken(column, rows) for name, column in made.items()} for split, rows in at.items()},
        steps=(),
        schemas=dict.fromkeys(SPLITS, _schema(encoder, made)),
        vocab=vocab,
        items=catalogue,
        users=pl.DataFrame({"user_index": np.arange(len(user_ids)), "user_id": user_ids}),
        files=features.files(),
        facts={
            "kind": "impressions",
            "split_rule": rule,
            "tie_rule": "rows at the second of a row count as not earlier",
            "catalogue_rule": "items of the rows and of the items table",
            "simulated": log.simulated,
            "times": "time" in made,
            "has_requests": "request" in made,
            "counts": _counts(rows, at, frame.height, unfound),
            "trained_times": _span(made, at[SPLITS[0]]),
            "rows_hash": {
                split: _hash_of(rows.take(numbers), users, _items(rows, items)[numbers])
                for split, numbers in at.items()
            },
            "notes": list(log.notes),
            "warnings": list(log.warnings),
            "fields": [shape.told() for shape in encoder.shapes],
            "table_rows": encoder.table_rows,
            "encoder_hash": encoder.hash,
            "features_hash": features.hash,
            "heads": _heads(task, rows),
            "domains": domains,
            "grouped_by": task.user if task.user in frame.columns else "",
            "keep_negatives": task.keep_negatives * (task.negatives / task.later_negatives if task.negatives else 1),
            "negatives": task.negatives,
            "held_negatives": task.later_negatives,
            "events": task.events,
        },
    )


def _numbered(frame: pl.DataFrame, name: str) -> tuple[np.ndarray, pl.Series]:
    """int64 [n]: which of the ids that follow each row has; without the column every row is one of its own."""
    if name not in frame.columns:
        return np.arange(frame.height), pl.Series(np.arange(frame.height))
    column = frame[name]
    if column.is_null().any():
        raise DataError(f"a row has no {name}", where=f"interactions, row {int(column.is_null().arg_true()[0]) + 1}")
    ids = column.unique(maintain_order=True)
    numbers = pl.DataFrame({"id": ids}).with_row_index("number")
    joined = pl.DataFrame({"id": column}).join(numbers, on="id", how="left", maintain_order="left")
    return joined["number"].to_numpy().astype(np.int64), ids


def _domains(task: Impressions, frame: pl.DataFrame, sides: Sequence[SideTable]) -> tuple[np.ndarray, list[str]]:
    """int64 [n]: the domain of each row of the log, as a number of these names; 0 for all where there is none."""
    if not task.domain:
        return np.zeros(frame.height, np.int64), []
    column = _of_row(task.domain, frame, sides, "Impressions.domain")
    codes, texts = column.keys
    return np.where(column.missing, len(texts), codes), texts


def _of_row(name: str, frame: pl.DataFrame, sides: Sequence[SideTable], where: str) -> Raw:
    """A column of single values of the log, or what a side table has for its rows."""
    column = raw_of(frame[name]) if name in frame.columns else None
    for side in sides:
        if name in side.columns:
            column = side(raw_of(frame[side.key]))[name]
    if column is None or column.offsets is not None:
        known = sorted({*frame.columns, *(name for side in sides for name in side.columns)})
        raise DataError(f"there is no column {name} of single values", where=where, expected=", ".join(known))
    return column


def _ahead(task: Impressions, frame: pl.DataFrame, users: np.ndarray, part: np.ndarray) -> np.ndarray:
    """float32 [n, heads]: the labels of heads that lie ahead."""
    found = np.zeros((frame.height, len(task.ahead)), np.float32)
    for k, one in enumerate(task.ahead):
        amounts = _of_row(one.column, frame, (), "Ahead.column").numbers("Ahead.column")
        times = times_of(frame, "Impressions.ahead")
        found[:, k] = sums_ahead(users, times, np.maximum(amounts, 0), part, one.seconds)
    return found


def _by_size(
    domain: np.ndarray, part: np.ndarray, names: Sequence[str], first: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """The domains numbered by their training rows, most first, after those that come `first` whatever they have; one
    that has none gets the number after all others."""
    count = np.bincount(domain[part == TRAIN], minlength=len(names) + 1)[: len(names)]
    by_size = sorted(range(len(names)), key=lambda k: (-int(count[k]), names[k]))
    known = [*first, *(names[k] for k in by_size if count[k] and names[k] not in first)]
    number = np.full(len(names) + 1, len(known))
    for k, name in enumerate(names):
        number[k] = known.index(name) if name in known else len(known)
    return number[domain].astype(np.int32), known


def _sides(task: Impressions, log: ImpressionLog, frame: pl.DataFrame) -> list[SideTable]:
    """The tables that rows are joined with, all columns that rows do not have themselves."""
    found: list[SideTable] = []
    taken = set(frame.columns)
    for join in task.joins:
        table, id_column = log.sides.get(join.table), TABLES[join.table]
        if table is None or join.key not in frame.columns:
            continue
        keys = raw_of(table[id_column])
        codes, texts = keys.keys
        if len(texts) != table.height:
            raise DataError(f"an id occurs twice in the table {join.table}", where=id_column, expected="unique ids")
        by_code = np.argsort(codes)
        names = {c: join.prefix + c for c in table.columns if c != id_column and join.prefix + c not in taken}
        taken |= set(names.values())
        columns = {name: raw_of(table[c]).take(by_code) for c, name in names.items()}
        found.append(SideTable(join.key, tuple(texts), columns))
    return found


def _read(sides: Sequence[SideTable], task: Impressions, encoder: FieldEncoder) -> tuple[SideTable, ...]:
    """The side tables with only the columns that encoding needs, in the order of their ids."""
    needed = {*encoder.columns, *(name for rule in task.imputation for name in (rule.column, *rule.sources))}
    needed |= {column for counter in task.counters for column in counter.columns}
    found = []
    for side in sides:
        columns = {name: column for name, column in side.columns.items() if name in needed}
        if columns:
            found.append(SideTable(side.key, side.ids, columns))
    return tuple(found)


def _columns(
    task: Impressions, frame: pl.DataFrame, sides: Sequence[SideTable], rows: Rows, item_ids: pl.Series
) -> Columns:
    """The raw columns of the rows that anything reads; drawn rows have their drawn item."""
    side_columns = {name for side in sides for name in side.columns}
    read = [source for one in task.fields for _, sources in one.sources for source in sources]
    read += [column for counter in task.counters for column in counter.columns]
    read += [name for history in task.histories for name in (history.user, history.item, *history.beside.values())]
    read += [side.key for side in sides]
    read += [name for rule in task.imputation for name in (rule.column, *rule.sources)]
    wanted = [name for name in dict.fromkeys(read) if name in frame.columns and name not in side_columns]
    found = {name: raw_of(frame[name]).take(rows.log) for name in wanted}
    drawn = rows.item >= 0
    if drawn.any() and task.item in found:
        ids = raw_of(item_ids).take(np.where(drawn, rows.item, -1))
        found[task.item] = ids.otherwise(found[task.item])
    return found


def _check_parts(rows: Rows) -> None:
    for k, split in enumerate(SPLITS):
        if not (rows.part == k).any():
            raise DataError(
                f"the split {split} has no rows",
                where="Impressions.split",
                expected="rows in train, valid and test",
                mend="take other fractions or a smaller gap, or bring more data",
            )


def _catalogue(
    task: Impressions, log: ImpressionLog, frame: pl.DataFrame, rows: Rows, items: np.ndarray, item_ids: pl.Series
) -> tuple[ItemVocab, pl.DataFrame]:
    """The vocabulary of items and the table of its rows; a single nameless item where rows have none."""
    if task.item not in frame.columns:
        vocab = ItemVocab.from_counts(["row"], [int((rows.part == TRAIN).sum())])
        return vocab, pl.DataFrame({"row": [2], "item_id": ["row"], "train_count": [int((rows.part == TRAIN).sum())]})
    logged = (rows.part == TRAIN) & (rows.item < 0)
    counts = np.bincount(items[rows.log[logged]], minlength=len(item_ids))
    known = pl.DataFrame({"item_id": item_ids, "train_count": counts.astype(np.int64)})
    table = log.sides.get("items") if task.item == TABLES["items"] else None
    if table is not None:
        # A catalogue may write the ids of the log as numbers of another size, or as text.
        table = table.with_columns(pl.col("item_id").cast(item_ids.dtype, strict=False)).drop_nulls("item_id")
        table = table.unique("item_id", keep="first", maintain_order=True)
        others = table.select("item_id").filter(~pl.col("item_id").is_in(item_ids.implode()))
        known = pl.concat([known, others.with_columns(train_count=pl.lit(0, pl.Int64))])
    vocab = ItemVocab.from_counts(known["item_id"], known["train_count"].to_numpy())
    catalogue = known.select(pl.Series("row", vocab.encode(known["item_id"])), "item_id", "train_count").sort("row")
    title = title_column(table)
    named = task.titles or ([title] if title else [])
    if table is not None and named:
        titles = table.select("item_id", _text(table, named).alias("title"))
        catalogue = catalogue.join(titles, on="item_id", how="left", maintain_order="left")
    return vocab, catalogue


def _text(table: pl.DataFrame, names: Sequence[str]) -> pl.Expr:
    """The texts of these columns one after the other, those of a list with spaces between them; null where all are."""
    if unknown := [name for name in names if name not in table.columns]:
        raise DataError(
            f"there is no column {unknown[0]}", where="Impressions.titles, items", expected=", ".join(table.columns)
        )
    lists = [isinstance(table.schema[name], pl.List) for name in names]
    parts = [
        pl.col(name).cast(pl.List(pl.String)).list.join(" ") if several else pl.col(name).cast(pl.String)
        for name, several in zip(names, lists, strict=True)
    ]
    text = pl.concat_str(parts, separator=" ", ignore_nulls=True)
    return pl.when(pl.all_horizontal(pl.col(name).is_null() for name in names)).then(None).otherwise(text)


def _items(rows: Rows, items: np.ndarray) -> np.ndarray:
    """The number of the item of each row, drawn or logged."""
    return np.where(rows.item >= 0, rows.item, items[rows.log])


def _weights(task: Impressions, frame: pl.DataFrame, sides: Sequence[SideTable]) -> np.ndarray:
    if not task.weight:
        return np.ones(frame.height, np.float32)
    where = "Impressions.weight"
    return _of_row(task.weight, frame, sides, where).numbers(where).astype(np.float32)


def _lengths(name: str, frame: pl.DataFrame, sides: Sequence[SideTable]) -> np.ndarray:
    """int32 [n]: the characters of a text of each row of the log, 0 where there is none."""
    column = _of_row(name, frame, sides, "Impressions.lengths")
    codes, texts = column.keys
    return np.where(column.missing, 0, np.array([*map(len, texts), 0], np.int32)[codes])


def _requests(task: Impressions, frame: pl.DataFrame) -> np.ndarray:
    """int64 [n]: the number of the request of each row of the log."""
    if task.request and task.request not in frame.columns:
        known = ", ".join(frame.columns)
        raise DataError(f"there is no column {task.request}", where="Impressions.request", expected=known)
    return _numbered(frame, task.request)[0]


def _schema(encoder: FieldEncoder, made: Mapping[str, Column]) -> tuple[Field, ...]:
    fields = [Field(name="user_index", dtype="int64", rank=0), Field(name="items", dtype="int32", rank=1)]
    fields += [Field(name="labels", dtype="float32", rank=1), Field(name="weight", dtype="float32", rank=0)]
    more = {"domain": "int32", "request": "int64", "length": "int32", "time": "int64"}
    fields += [Field(name=name, dtype=dtype, rank=0) for name, dtype in more.items() if name in made]
    kinds = {CODES: "int32", NUMBERS: "float32"}
    return (*fields, *(Field(name=name, dtype=kinds[name], rank=1) for name in encoder.widths))


def _heads(task: Impressions, rows: Rows) -> dict[str, Any]:
    """What each head asks, how many training rows tell and what share of them is positive."""
    found = {}
    values = {one.name: one.rule for one in task.ahead}
    for k, (head, rule) in enumerate({**task.labels, **values}.items()):
        told = rows.labels[(rows.part == TRAIN) & (rows.labels[:, k] >= 0), k]
        found[head] = {"rule": rule, "rows": len(told), "rate": float(told.mean()) if len(told) else 0.0}
        found[head] |= {"kind": "value"} if head in values else {}
    return found


def _counts(rows: Rows, at: Mapping[str, np.ndarray], logged: int, unfound: int) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {
        split: {"examples": len(found), "drawn": int((rows.item[found] >= 0).sum())} for split, found in at.items()
    }
    return {**counts, "log": {"rows": logged, "negatives_not_found": unfound}}


def _span(made: Mapping[str, Column], rows: np.ndarray) -> list[int]:
    """The first and the last second of these rows; nothing where rows have no times."""
    if "time" not in made:
        return []
    times = made["time"].values[rows]
    return [int(times.min()), int(times.max())]


def _hash_of(rows: Rows, users: np.ndarray, items: np.ndarray) -> str:
    """16 hexadecimal digits of whose rows these are, of which item, with which labels, and in which order.

    Users and items by their numbers in the log, so that tasks of other training rows on a log can ask the same.
    """
    digest = hashlib.sha256()
    for values in (users[rows.log], items, rows.labels):
        digest.update(values.astype("<f8").tobytes())
    return digest.hexdigest()[:16]


def _lists(values: np.ndarray) -> Column:
    """Rows of a matrix as lists of one length."""
    return Column(np.ascontiguousarray(values).reshape(-1), np.arange(len(values) + 1) * values.shape[1])


def _taken(column: Column, rows: np.ndarray) -> Column:
    """Some rows of a column."""
    if column.offsets is None:
        return Column(column.values[rows])
    lengths = np.diff(column.offsets)[rows]
    values = column.values[spans(column.offsets[rows], lengths)]
    return Column(values, np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]))
