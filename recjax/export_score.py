"""The score bundle of a run: programs that read a prompt once and score its candidates, with the tasks in words.

Prompts are padded to one of a few widths and candidates come so many at a time, so that a server compiles a handful of
programs. Each task is calibrated on its validation split. `recjax.freeze` makes the bundle;
`recjax.serve.score_bundle` describes the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recjax.core.errors import UnservableError
from recjax.core.module import Functional, Params
from recjax.core.state import from_paths
from recjax.data.examples import Examples
from recjax.data.ranked import width_of
from recjax.data.text import Tokenizer
from recjax.data.vocab import FIRST_ITEM
from recjax.freeze import Program, freeze, host_weights
from recjax.label_evaluation import LabelEvaluator
from recjax.metrics.calibration import Calibration, fit_calibration
from recjax.nn.cached import Kept
from recjax.prompts.writer import PromptWriter
from recjax.recipe import Assembly
from recjax.scoring import logits_of
from recjax.serve import score_bundle as layout
from recjax.serve.score_bundle import ScoreBundle, ScoreTask
from recjax.serve.stored import TEXT_FILE

CANDIDATES = 16  # of one call
TOLERANCE = 1e-4
_WIDTHS = 3
_SPARE = 1.5  # how much longer a question may be than those of the validation split


def export_scores(
    model: Functional,
    params: Params,
    tasks: Sequence[ScoreTask],
    *,
    out: str | os.PathLike[str],
    tokenizer: Tokenizer,
    label_rows: Sequence[int],
    suffix_width: int,
    widths: Sequence[int],
    candidates: int = CANDIDATES,
    temperature: float = 1.0,
    **told: Any,
) -> Path:
    """Write a score bundle at `out` and return its path.

    A prompt is padded to the first of the rising `widths` that holds it, a candidate to `suffix_width` tokens;
    `candidates` of them go through the model at a time. `label_rows` are the rows of all label words, of which each
    task names its own by place. Logits are divided by `temperature`, as in training. `told` (`name`, `recipe`, `step`,
    `checkpoint`, `platforms`) is as `freeze` takes it. Raises `BundleError` as that does, and when the weights cannot
    be stored.
    """
    weights = host_weights(params)
    params = from_paths(params, weights)
    prefill, branch = programs(model, params, label_rows, temperature)
    suffixes, frozen = [_int32(1, candidates, suffix_width), _int32(1, candidates)], {}
    for width in widths:
        kept = jax.eval_shape(prefill, weights, *_prompt(width))
        frozen[layout.function_file("prefill", width)] = Program(prefill, _prompt(width), ("ids", "lengths"))
        inputs, names = (*kept, _int32(1), *suffixes), ("keys", "values", "lengths", "ids", "at")
        frozen[layout.function_file("branch", width)] = Program(branch, inputs, names)

    def write(folder: Path) -> dict[str, Any]:
        (folder / TEXT_FILE).write_bytes(tokenizer.model)
        return {
            "tasks": [task.told() for task in tasks],
            "label_rows": [int(row) for row in label_rows],
            "widths": [int(width) for width in widths],
            "candidates": candidates,
            "suffix_width": suffix_width,
            "temperature": temperature,
            "text": {"size": tokenizer.size, "hash": tokenizer.hash},
        }

    return freeze(
        ScoreBundle,
        out,
        weights,
        frozen,
        write=write,
        pairs=lambda loaded: _pairs(loaded, model, params, label_rows, temperature),
        tolerance=TOLERANCE,
        **told,
    )


def programs(model: Functional, params: Params, label_rows: Sequence[int], temperature: float) -> tuple[Any, Any]:
    """Two functions of weights by path: prompts [b, p] and lengths [b] to keys and values, these to logits."""

    def prefill(weights: dict[str, jax.Array], ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
        slots = jax.numpy.arange(ids.shape[1], dtype=np.int32)[None]
        real = slots < lengths[:, None]
        batch = {"history_ids": ids, "positions": jax.numpy.where(real, slots, 0), "segment_ids": real.astype(np.int32)}
        module: Any = model.bind(from_paths(params, weights))
        _, memory = module.prefill({**batch, "query_at": lengths[:, None] - 1})
        return tuple(memory.prompt.kept)

    def branch(weights: dict[str, jax.Array], keys: Any, values: Any, lengths: Any, ids: Any, at: Any) -> jax.Array:
        module: Any = model.bind(from_paths(params, weights))
        memory = module.remember(Kept(keys, values), lengths)
        queries = module.branch(memory, ids, at)
        return logits_of(queries.reshape(-1, queries.shape[-1]), memory.table, label_rows, temperature)

    return prefill, branch


def export_score_run(
    assembly: Assembly, params: Params, out: str | os.PathLike[str], *, widths: Sequence[int] = (), **told: Any
) -> Path:
    """`export_scores` of the ranking tasks of a recipe, each calibrated on its validation split.

    Raises `UnservableError` where the recipe has none.
    """
    ranked = [at for at, examples in enumerate(assembly.evaluated) if examples.manifest.get("kind") == "ranking"]
    if not ranked:
        raise UnservableError("no task of the recipe asks about candidates", expected="a ranking task in words")
    rows = sorted({row for at in ranked for row in assembly.evaluated[at].manifest["label_rows"]})
    tasks, longest = [], 1
    for at in ranked:
        evaluator = assembly.evaluator("valid", at)
        assert isinstance(evaluator, LabelEvaluator)
        records = evaluator.records("valid")
        longest = max(longest, int(records.suffix_lengths.max(initial=1)))
        fitted = fit_calibration(evaluator.scores(params).logits, records.label)
        tasks.append(task_of(assembly.evaluated[at], rows, fitted))
    tokenizer = assembly.evaluated[ranked[0]].text_vocab
    assert tokenizer is not None
    most = max(task.prompts["budget"]["length"] for task in tasks)
    return export_scores(
        assembly.model,
        params,
        tasks,
        out=out,
        tokenizer=tokenizer,
        label_rows=rows,
        suffix_width=int(width_of(np.array([int(longest * _SPARE)]))[0]),
        widths=widths or sorted({max(most >> n, 1) for n in range(_WIDTHS)}),
        temperature=assembly.temperature,
        **told,
    )


def task_of(examples: Examples, rows: Sequence[int], fitted: Calibration) -> ScoreTask:
    """The ranking task of a prepared folder as a server needs it; `rows` are those of all label words."""
    told, tokenizer = examples.manifest, examples.text_vocab
    assert tokenizer is not None
    chat = PromptWriter.of(told["template"], tokenizer).chat
    return ScoreTask(
        name=told["task"],
        prompts=told["template"],
        tells_history=told["asks"] != "Relevance",
        label_words=told["label_words"],
        label_columns=[rows.index(row) for row in told["label_rows"]],
        answer_length=max(len(chat.answer(word)) for word in told["label_words"]),
        temperature=fitted.temperature,
        bias=fitted.bias,
    )


def _prompt(width: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return _int32(1, width), _int32(1)


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.int32)


def _pairs(
    loaded: ScoreBundle, model: Functional, params: Params, label_rows: Sequence[int], temperature: float
) -> Iterator[tuple[Any, Any]]:
    """Logits of the bundle, and those of rows that are each read alone."""
    rng = np.random.default_rng(0)
    top = FIRST_ITEM + loaded.tokenizer.size
    apply = jax.jit(lambda params, batch: model.apply(params, batch, train=False, key=None))
    for width in loaded.widths:
        prefix = rng.integers(FIRST_ITEM, top, max(width - 1, 1)).astype(np.int32)
        suffixes = [rng.integers(FIRST_ITEM, top, n).astype(np.int32) for n in (1, loaded.suffix_width)]
        length = len(prefix) + loaded.suffix_width
        ids, at = np.zeros((2, length), np.int32), np.zeros((2, 1), np.int32)
        for row, suffix in enumerate(suffixes):
            whole = np.concatenate([prefix, suffix])
            ids[row, : len(whole)], at[row] = whole, len(whole) - 1
        slots = np.arange(length, dtype=np.int32)[None]
        real = slots <= at
        batch = {"history_ids": ids, "positions": np.where(real, slots, 0), "segment_ids": real.astype(np.int32)}
        out = apply(params, batch)
        hidden = np.take_along_axis(np.asarray(out["hidden"]), at[..., None], axis=1)[:, 0]
        yield loaded.logits(prefix, suffixes), logits_of(hidden, out["table"], label_rows, temperature)
