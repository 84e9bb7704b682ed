"""`recjax export`: freeze a checkpoint into a bundle that a serving team loads without the training code.

The whole answer, from the rows of a prompt to the best rows of the catalogue, is one function, exported with jax.export
for any batch size and any number of seen items, once more for questions that allow some items only. `recjax.freeze`
makes the bundle; `recjax.serve.bundle` describes the folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from recjax import cli, trained
from recjax.core.errors import BundleError, ConfigError
from recjax.core.folder import hash_of
from recjax.core.module import Functional, Params
from recjax.core.state import from_paths
from recjax.data.examples import Examples
from recjax.data.spelling import Prompts
from recjax.data.text import Tokenizer
from recjax.data.vocab import FIRST_ITEM, ItemVocab
from recjax.export_rank import export_ranker_run
from recjax.export_score import export_score_run
from recjax.freeze import Program, freeze, host_weights
from recjax.label_evaluation import LabelEvaluation
from recjax.models.folded import fold
from recjax.ranker_evaluation import RankerEvaluation
from recjax.recommend import TIMES, Recommend, make_recommend
from recjax.retrieve import Catalogue, Rows
from recjax.serve import bundle as layout
from recjax.serve.facets import Values
from recjax.serve.features import pad
from recjax.serve.stored import TEXT_FILE

TOLERANCE = 1e-5
# Columns of the items table by which answers can be filtered.
_NOT_FACETS = ("row", "item_id", "title", "train_count")
_SHOWN_EVENTS = 200  # of a sample user


def export_bundle(
    model: Functional,
    params: Params,
    *,
    vocab: ItemVocab,
    titles: Sequence[str | None],
    out: str | os.PathLike[str],
    history_length: int,
    times: str = "none",
    prompts: Prompts | None = None,
    catalogue: Catalogue | None = None,
    text: Tokenizer | None = None,
    text_prompt: str = "",
    recommends: bool = True,
    facets: Mapping[str, Values] | None = None,
    users: Sequence[Mapping[str, Any]] = (),
    max_k: int = 100,
    **told: Any,
) -> Path:
    """Write a bundle at `out` and return its path.

    `titles` and each of the `facets` have one entry for each row; `times` is what the feed tells the model ("none",
    "history", "target"). `prompts` is how a model of tokens is asked and `catalogue` how its items are found, where
    that is not by their rows; with `text`, the vocabulary of its text tokens, it answers queries too, behind
    `text_prompt`. `recommends` says whether it was trained on histories, `users` are some to show. `max_k` is cut to
    the number of items, or to what the catalogue always finds. `told` (`name`, `recipe`, `step`, `checkpoint`,
    `platforms`, `onnx`) is as `freeze` takes it. Raises `BundleError` as that does, and when the weights cannot be
    stored.
    """
    if max_k < 1:
        raise BundleError(f"max_k is {max_k}", expected="at least 1")
    for what, column in {"titles": titles, **(facets or {})}.items():
        if len(column) != vocab.num_rows:
            raise ValueError(f"{len(column)} {what} for {vocab.num_rows} rows")
    if text is not None and (prompts is None or prompts.tokens.text_size != text.size):
        raise ValueError("a text vocabulary, and a model whose tokens are not of it")
    max_k = min(max_k, (catalogue or Rows(vocab.num_items)).most)
    model, params = fold(model, params)
    weights = host_weights(params)
    params = from_paths(params, weights)
    recommend = make_recommend(model, num_items=vocab.num_items, k=max_k, catalogue=catalogue)
    prompt_length = history_length if prompts is None else prompts.slots(history_length)
    schema = layout.schema_of(prompt_length, max_k, times, tokens=prompts is not None, filtered=True)

    def write(folder: Path) -> dict[str, Any]:
        vocab.save(folder / layout.VOCABULARY_FILE)
        _write_json(folder / layout.TITLES_FILE, list(titles))
        if facets:
            _write_json(folder / layout.FACETS_FILE, {facet: list(column) for facet, column in facets.items()})
        if users:
            _write_json(folder / layout.USERS_FILE, list(users))
        return {
            "max_k": max_k,
            "history_length": history_length,
            "times": times,
            "recommends": recommends,
            "num_items": vocab.num_items,
            "vocabulary_hash": vocab.hash,
            **(_write_prompts(folder, prompts, prompt_length, text, text_prompt) if prompts else {}),
            "schema": schema,
            "schema_hash": hash_of(schema),
            "functions": {layout.FUNCTION: layout.FUNCTION_FILE, layout.FILTERED: layout.FILTERED_FILE},
        }

    return freeze(
        layout.Bundle,
        out,
        weights,
        _programs(recommend, params, prompt_length, vocab.num_rows, times),
        write=write,
        pairs=lambda loaded: _pairs(loaded, recommend, params),
        tolerance=TOLERANCE,
        **told,
    )


def _write_prompts(
    folder: Path, prompts: Prompts, prompt_length: int, text: Tokenizer | None, text_prompt: str
) -> dict[str, Any]:
    """Write how items and queries are spelled; what the manifest says of it."""
    told: dict[str, Any] = {"prompt_length": prompt_length}
    tokens = prompts.tokens
    if tokens.levels > 1:
        np.save(folder / layout.SPELLING_FILE, tokens.spelling)
        told["spelling"] = {"levels": tokens.levels, "hash": layout.spelling_hash(tokens.spelling)}
    if text is not None:
        (folder / TEXT_FILE).write_bytes(text.model)
        told["text"] = {
            "start": tokens.text_start,
            "length": prompts.text_length,
            "size": text.size,
            "hash": text.hash,
            "prompt": text_prompt,
        }
    return told


def export_run(
    run: trained.Trained,
    out: str | os.PathLike[str],
    *,
    name: str = "",
    max_k: int = 100,
    sample_users: int = 0,
    domain: str = "",
    onnx: bool = False,
) -> Path:
    """`export_bundle` of a finished run as its recipe says, with `sample_users` histories of its test split to show.

    A model that is judged by label words has a score bundle instead (`recjax.export_score`), and a ranker of rows a
    rank bundle (`recjax.export_rank`), of one `domain` where that is named.
    """
    assembly, recipe = run.assembly, run.assembly.recipe
    told: dict[str, Any] = {"name": name or recipe.name, "recipe": recipe.name, "step": run.step}
    told |= {"checkpoint": str(run.checkpoint), "onnx": onnx}
    if isinstance(recipe.evaluation, LabelEvaluation):
        return export_score_run(assembly, run.params, out, **told)
    if isinstance(recipe.evaluation, RankerEvaluation):
        return export_ranker_run(assembly, run.params, out, domain=domain, **told)
    if domain:
        raise ConfigError("only a ranker of rows has domains", where=f"--domain {domain}")
    prompts, titled = assembly.prompts, assembly.examples[0]
    logs = [e for e in assembly.examples if e.text_vocab is None]
    searched = [e for e in assembly.examples if e.text_vocab is not None] if prompts else []
    return export_bundle(
        assembly.model,
        run.params,
        vocab=assembly.vocab,
        titles=titled.titles(),
        out=out,
        history_length=recipe.feed.history_length,
        times=recipe.feed.times,
        prompts=prompts,
        catalogue=assembly.catalogue,
        text=searched[0].text_vocab if searched else None,
        text_prompt=searched[0].manifest.get("prompt", "") if searched else "",
        recommends=bool(logs),
        facets=facets_of(titled),
        users=sample(logs[0], sample_users, recipe.feed.times) if logs and sample_users else (),
        max_k=max_k,
        **told,
    )


def facets_of(examples: Examples) -> dict[str, list[str | list[str] | None]]:
    """The columns of the items table that answers can be filtered by: a value, several or None for each row."""
    import polars as pl

    items = pl.read_parquet(examples.path / "items.parquet")
    found = {}
    for name in items.columns:
        if name not in _NOT_FACETS and items[name].null_count() < items.height:
            kind = pl.List(pl.String) if isinstance(items.schema[name], pl.List) else pl.String
            column: list[Any] = [None] * examples.vocab.num_rows
            for row, value in zip(items["row"].to_list(), items[name].cast(kind).to_list(), strict=True):
                column[row] = value
            found[name] = column
    return found


def sample(examples: Examples, count: int, times: str = "none", *, seed: int = 0) -> list[dict[str, Any]]:
    """The newest events of `count` users of the test split with a known item, drawn by `seed`, without their ids."""
    source, vocab = examples.source("test"), examples.vocab
    users: list[dict[str, Any]] = []
    for at in np.random.default_rng(seed).permutation(len(source)).tolist():
        if len(users) == count:
            break
        example = source[at]
        known = np.flatnonzero(example["items"] >= FIRST_ITEM)[-_SHOWN_EVENTS:]
        if not len(known):
            continue
        user: dict[str, Any] = {"history": vocab.decode(example["items"][known])}
        if times != "none":
            user["history_time"] = example["times"][known].tolist()
        if times == "target":
            user["time"] = int(example["label_time"])
        users.append(user)
    return users


def main(argv: list[str]) -> int:
    """`recjax export`."""
    flags = trained.parser("export")
    flags.add_argument("--max_k", type=int, default=100, help="most items that can be asked for (default 100)")
    flags.add_argument("--name", default="", help="what the server calls the model (default: name of the recipe)")
    flags.add_argument(
        "--sample_users", type=int, default=0, metavar="N", help="histories of the test split to show (default none)"
    )
    flags.add_argument("--domain", default="", help="merge the adapters of this domain into the backbone of a ranker")
    flags.add_argument("--onnx", action="store_true", help="the programs as ONNX, too (see recjax/export_onnx.py)")
    run, args = trained.from_command_line(flags, argv)
    more = {"max_k": args.max_k, "sample_users": args.sample_users, "domain": args.domain, "onnx": args.onnx}
    path = export_run(run, args.out, name=args.name, **more)
    print(f"{path}: step {run.step} of {run.assembly.recipe.name}; recjax serve --bundle {path}")
    return 0


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _programs(recommend: Recommend, params: Params, length: int, rows: int, times: str) -> dict[str, Program]:
    """The function without and with allowed items, for any batch size and any number of seen items."""
    batch, seen = jax.export.symbolic_shape("b, n")
    inputs = [
        jax.ShapeDtypeStruct((batch, length), np.int32),
        jax.ShapeDtypeStruct((batch, seen), np.int32),
        *(
            jax.ShapeDtypeStruct((batch, length) if name == "history_time" else (batch,), np.int32)
            for name in TIMES[times]
        ),
    ]

    def plain(weights: dict[str, jax.Array], *inputs: jax.Array) -> Any:
        return tuple(recommend(from_paths(params, weights), *inputs))

    def filtered(weights: dict[str, jax.Array], *inputs: jax.Array) -> Any:
        return tuple(recommend(from_paths(params, weights), *inputs[:-1], allowed=inputs[-1]))

    allowed = jax.ShapeDtypeStruct((batch, rows), np.bool_)
    names = ("history_ids", "seen_ids", *TIMES[times])
    return {
        layout.FUNCTION_FILE: Program(plain, (*inputs,), names),
        layout.FILTERED_FILE: Program(filtered, (*inputs, allowed), (*names, "allowed")),
    }


def _pairs(loaded: layout.Bundle, recommend: Recommend, params: Params) -> Iterator[tuple[Any, Any]]:
    """Scores of the bundle and of the model for a few histories; in order, because rows may change places among equal
    scores, but the scores may not."""
    rng = np.random.default_rng(0)
    last = FIRST_ITEM + loaded.vocab.num_items
    history = rng.integers(FIRST_ITEM, last, (3, loaded.history_length), dtype=np.int32)
    seen = np.unique(history[1:])[None, :8].repeat(3, axis=0)
    ids: list[Any] = [loaded.vocab.decode(items) for items in (history[0, :1], *history[1:])]
    times = [[0] * len(items) for items in ids] if loaded.times != "none" else [None] * len(ids)
    users = [loaded.encode(items, when, 0) for items, when in zip(ids, times, strict=True)]
    prompt = pad([user.history_ids for user in users], count=3, width=loaded.prompt_length)
    when = (np.sort(rng.integers(0, 10**6, prompt.shape), axis=1).astype(np.int32), np.full(3, 10**6, np.int32))
    inputs = (prompt, seen, *when[: len(TIMES[loaded.times])])
    for more in ({}, {"allowed": rng.random((3, loaded.vocab.num_rows)) < 0.7}):
        yield loaded.recommend(*inputs, **more)[0], jax.jit(recommend)(params, *inputs, **more)[0]


if __name__ == "__main__":
    sys.exit(cli.run(main))
