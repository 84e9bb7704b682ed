"""What search does with data: queries and judgments to pairs and examples, the text vocabulary, and the counts.

What is done with odd data: a judgment of a query without text, of an item outside the catalogue, or below the label
that counts as relevant, is left out and counted. A held-out example has as `seen` the items of its query's training
pairs, whether or not the limit per item or leakage control kept them for training: what is trained on does not change
what is asked.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import numpy as np
import polars as pl

from recjax.core.errors import DataError
from recjax.data.record import Column, Columns, Field, spans
from recjax.data.tables import Tables
from recjax.data.vocab import FIRST_ITEM, ItemVocab, stable_hash
from recjax.tasks.next_item_work import Divided, divide, later_rows, work_of
from recjax.tasks.search import Search
from recjax.tasks.search_pairs import TRAIN, Judgments, first_of_pairs, is_leak, split_of, within_limit
from recjax.tasks.work import Encode, Work

_SPLITS = ("train", "valid", "test")  # numbered as in search_pairs
_RULES = {
    "pair": "by a hash of query and item: a held-out query has other pairs in training as a rule",
    "query": "by a hash of the query: held-out queries are new",
    "given": "by the column split of relevance",
}


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Every relevant pair once, in order of query; the split it belongs to, and whether it is trained on."""

    ids: Judgments
    split: np.ndarray
    trained: np.ndarray
    leaks: int  # judgments that make no training pair
    leaked: int  # pairs that are not trained on for it
    beyond_limit: int


def make_work(task: Search, tables: Tables) -> Work:
    """The work of `task` on these tables; raises `DataError` as `Search.work` says."""
    if tables.queries is None or tables.relevance is None:
        missing = "queries" if tables.queries is None else "relevance"
        mend = "bring both tables, or take search out of the mixture"
        raise DataError("search needs queries and relevance", where=missing, expected=f"{missing}.parquet", mend=mend)
    divided = divide(task.log, tables.interactions)
    log = work_of(task.log, tables, divided)
    queries = _queries(tables.queries)
    relevance, counts = _relevant(task, tables.relevance, queries, log.vocab)
    pairs = _pairs(task, relevance, _held_out(divided, log))
    texts = queries.unique("query", keep="first", maintain_order=True)
    asked = texts["text"].gather(np.unique(pairs.ids.query[pairs.trained]))
    text = task.text.make([task.prompt, *_titles(log.items), *asked])
    made = np.bincount(pairs.ids.row[pairs.trained], minlength=log.vocab.num_rows)
    lost = {"leaks": pairs.leaks, "pairs_leaked": pairs.leaked, "pairs_beyond_limit": pairs.beyond_limit}
    facts = {
        "kind": "search",
        "log": task.log.name,
        "split_rule": "judged pairs " + _RULES[task.split],
        "tie_rule": "none: judgments have no order",
        "catalogue_rule": log.facts["catalogue_rule"],
        "seen_rule": "items of the same query's training pairs",
        "leak_rule": _leak_rule(task, relevance),
        "prompt": task.prompt,
        "simulated": tables.simulated,
        "times": False,
        "counts": {**_counts(pairs), "relevance": {**counts, **lost}},
        "notes": [*tables.notes],
        "warnings": [*tables.warnings],
    }
    words = texts["text"].to_numpy().astype(object)
    return Work(
        name=task.name,
        raw={split: _columns(pairs, split, words) for split in _SPLITS},
        steps=(Encode("text", text, task.prompt),),
        schemas={split: _schema(split) for split in _SPLITS},
        vocab=log.vocab,
        items=log.items.with_columns(pl.Series("train_count", made[log.items["row"].to_numpy()])),
        users=pl.DataFrame(
            {"user_index": np.arange(len(pairs.ids)), "user_id": texts["query_id"].gather(pairs.ids.query)}
        ),
        facts=facts,
        text=text,
    )


def _queries(queries: pl.DataFrame) -> pl.DataFrame:
    """query_id, text, and `query`: one number for all queries that are spelt alike. Blank ones are left out."""
    queries = queries.select("query_id", pl.col("text").cast(pl.String).fill_null("")).sort("query_id")
    texts = queries["text"].to_list()
    queries = queries.with_columns(pl.Series("key", [" ".join(t.split()).casefold() for t in texts], pl.String))
    queries = queries.filter(pl.Series([not _is_blank(t) for t in texts], dtype=pl.Boolean))
    keys = queries.select("key").unique(maintain_order=True).with_row_index("query")
    return queries.join(keys, on="key", how="left", maintain_order="left").select("query_id", "text", "query")


def _is_blank(text: str) -> bool:
    """Whether all of it is spaces, control and format characters, which no vocabulary has pieces for."""
    return all(unicodedata.category(c)[0] in "CZ" for c in text)


def _relevant(
    task: Search, relevance: pl.DataFrame, queries: pl.DataFrame, vocab: ItemVocab
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The judgments that count, with `query`, `row` and the id of the query's first spelling, and what was left out."""
    first = queries.unique("query", keep="first", maintain_order=True).select("query", first_id="query_id")
    judged = relevance.join(queries.drop("text"), on="query_id", how="left", maintain_order="left")
    judged = judged.join(first, on="query", how="left", maintain_order="left")
    judged = judged.with_columns(row=pl.Series(vocab.encode(judged["item_id"])))
    counts = {"judgments": judged.height, "queries": first.height, "queries_spelt_alike": queries.height - first.height}
    kept = judged.filter(_grades(task, judged["label"]) >= task.min_label)
    counts["below_min_label"] = judged.height - kept.height
    known = kept.filter(pl.col("query").is_not_null())
    counts["query_unknown"] = kept.height - known.height
    inside = known.filter(pl.col("row") >= FIRST_ITEM)
    counts["item_unknown"] = known.height - inside.height
    return inside, counts


def _grades(task: Search, labels: pl.Series) -> pl.Series:
    """The labels as numbers."""
    if labels.dtype.is_numeric() or labels.dtype == pl.Boolean:
        return labels.cast(pl.Float64)
    words = labels.cast(pl.String)
    odd = words.filter(~words.is_in(list(task.labels)))
    if len(odd):
        raise DataError(
            f"the label {odd[0]!r} is not a number",
            where="relevance, column label",
            expected="numbers" + (f", or one of {', '.join(task.labels)}" if task.labels else ""),
            mend=f'say what it counts as: Search.labels = {{"{odd[0]}": 1}}',
        )
    return words.replace_strict(dict(task.labels), return_dtype=pl.Float64)


def _pairs(task: Search, relevance: pl.DataFrame, held: pl.DataFrame) -> _Pairs:
    """The pairs of the judgments that count; `held` are the users and rows of held-out events."""
    users = np.full(relevance.height, -1)
    if "user_id" in relevance.columns:
        known = held.select("user_id", "user").unique()
        found = relevance.select("user_id").join(known, on="user_id", how="left", maintain_order="left")
        users = found["user"].fill_null(-1).to_numpy()
    judged = Judgments(
        query=relevance["query"].to_numpy().astype(np.int64),
        row=relevance["row"].to_numpy().astype(np.int64),
        user=users,
        query_hash=_id_hashes(relevance["first_id"]),
        item_hash=_id_hashes(relevance["item_id"]),
    )
    if task.split == "given":
        split = _given(relevance)
    else:
        split = split_of(judged, task.split, valid=task.valid_fraction, test=task.test_fraction, seed=task.seed)
    first = first_of_pairs(judged)
    ids, part = judged.take(first), split[first]
    of_pair = _numbers(judged, ids)
    if (odd := split != part[of_pair]).any():
        query, item = (relevance[c][int(np.flatnonzero(odd)[0])] for c in ("query_id", "item_id"))
        raise DataError(
            f"query {query!r} and item {item!r} are in two splits",
            where="relevance, column split",
            expected="all judgments of a pair in one split; queries spelt alike are one query",
        )
    leak = np.zeros(len(judged), bool)
    if task.drop_leaks:
        leak = is_leak(judged, held["user"].to_numpy(), held["row"].to_numpy()) & (split == TRAIN)
    clean = np.bincount(of_pair[~leak], minlength=len(ids)) > 0
    trained = (part == TRAIN) & clean
    leaked = int((part == TRAIN).sum() - trained.sum())
    before = np.flatnonzero(trained)
    if task.per_item is not None:
        trained[before] = within_limit(ids.take(before), task.per_item, seed=task.seed)
    if not trained.any():
        raise DataError(
            "no pair of query and item is left to train on",
            where="relevance",
            expected=f"labels from {task.min_label:g} on, for items of the catalogue",
            mend="lower Search.min_label or the held-out fractions, or bring more judgments",
        )
    beyond = len(before) - int(trained.sum())
    return _Pairs(ids=ids, split=part, trained=trained, leaks=int(leak.sum()), leaked=leaked, beyond_limit=beyond)


def _held_out(divided: Divided, log: Work) -> pl.DataFrame:
    """user_id, user and row of every held-out event, and of every user with none one row of no item (-1)."""
    users, rows = later_rows(divided, log.vocab)
    everyone = np.arange(len(divided.log.lengths))
    users, rows = np.concatenate([users, everyone]), np.concatenate([rows, np.full(len(everyone), -1)])
    frame = pl.DataFrame({"user": users.astype(np.int64), "row": rows.astype(np.int64)})
    return frame.with_columns(user_id=log.users["user_id"].gather(users))


def _given(relevance: pl.DataFrame) -> np.ndarray:
    """int8: the split that the table says."""
    mend = 'write train, valid or test, or set Search.split = "pair"'
    if "split" not in relevance.columns:
        raise DataError('Search.split = "given" needs a column split', where="relevance", mend=mend)
    numbers = (
        relevance["split"]
        .cast(pl.String)
        .replace_strict(list(_SPLITS), range(len(_SPLITS)), default=None, return_dtype=pl.Int8)
    )
    if numbers.null_count():
        odd = relevance["split"].filter(numbers.is_null())[0]
        raise DataError(
            f"{odd!r} is no split", where="relevance, column split", expected="train, valid, test", mend=mend
        )
    return numbers.to_numpy()


def _numbers(judged: Judgments, pairs: Judgments) -> np.ndarray:
    """int64: for each judgment the number of its pair; the pairs are in order of query and row."""
    key, keys = (j.query << 32 | j.row for j in (judged, pairs))
    return np.searchsorted(keys, key)


def _id_hashes(ids: pl.Series) -> np.ndarray:
    """uint64: a hash of each id, the different ones once."""
    different = ids.unique(maintain_order=True)
    hashes = pl.Series(stable_hash(different), dtype=pl.UInt64)
    return ids.replace_strict(different, hashes, return_dtype=pl.UInt64).to_numpy().astype(np.uint64)


def _titles(items: pl.DataFrame) -> list[str]:
    return items["title"].drop_nulls().to_list() if "title" in items.columns else []


def _columns(pairs: _Pairs, split: str, words: np.ndarray) -> Columns:
    """The raw examples of a split: all but the spelling of the text."""
    chosen = pairs.trained if split == "train" else pairs.split == _SPLITS.index(split)
    at = np.flatnonzero(chosen)
    query, row = pairs.ids.query[at], pairs.ids.row[at].astype(np.int32)
    one, none = np.arange(len(at) + 1), np.zeros(len(at) + 1, np.int64)
    found = {"user_index": Column(at), "text": Column(words[query])}
    if split == "train":
        return {**found, "items": Column(row, one)}
    known = pairs.split == TRAIN
    begins, ends = (np.searchsorted(pairs.ids.query[known], query, side) for side in ("left", "right"))
    seen = pairs.ids.row[known].astype(np.int32)[spans(begins, ends - begins)]
    return {
        **found,
        "items": Column(np.empty(0, np.int32), none),
        "label": Column(row),
        "train_events": Column(np.zeros(len(at), np.int32)),
        "future": Column(row, one),
        "future_events": Column(np.ones(len(at), np.int32)),
        "seen": Column(seen, np.concatenate([none[:1], np.cumsum(ends - begins)])),
    }


def _schema(split: str) -> tuple[Field, ...]:
    fields = [Field(name="user_index", dtype="int64", rank=0)]
    fields += [Field(name=name, dtype="int32", rank=1) for name in ("text", "items")]
    if split != "train":
        ranks = {"label": 0, "train_events": 0, "future": 1, "future_events": 0, "seen": 1}
        fields += [Field(name=name, dtype="int32", rank=rank) for name, rank in ranks.items()]
    return tuple(fields)


def _counts(pairs: _Pairs) -> dict[str, dict[str, int]]:
    """Examples of each split, and queries and items among them; of held-out ones, how many are new to training."""
    counts = {}
    known = {name: np.unique(getattr(pairs.ids, name)[pairs.trained]) for name in ("query", "row")}
    for number, split in enumerate(_SPLITS):
        chosen = pairs.trained if split == "train" else pairs.split == number
        query, row = pairs.ids.query[chosen], pairs.ids.row[chosen]
        counts[split] = {"examples": len(query), "queries": len(np.unique(query)), "items": len(np.unique(row))}
        if split != "train":
            counts[split]["query_not_trained"] = int((~np.isin(query, known["query"])).sum())
            counts[split]["item_not_trained"] = int((~np.isin(row, known["row"])).sum())
    return counts


def _leak_rule(task: Search, relevance: pl.DataFrame) -> str:
    if not task.drop_leaks:
        return "none: judgments by users on their own held-out events are trained on"
    if "user_id" not in relevance.columns:
        return "none possible: relevance does not say whose judgments they are"
    return "judgments by users on items of their own held-out events make no training pair"
