"""Artifacts of what a model says of users and of the items of a catalogue (`recjax.infer`).

A score is the inner product of a user vector and an item vector, or the log-probability of an item that takes several
tokens to name, which has no vector. A user is whoever the task asks about: a history, or a query. Every user of the
split stands in it once, in the order of `eval_batches` (longest prompt first); rows that only filled a batch are
dropped. Results go to disk batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from recjax.core.artifact import open_artifact
from recjax.core.errors import ConfigError, UnservableError
from recjax.core.module import Params
from recjax.core.sharding import Mesh
from recjax.data.batch import PAD
from recjax.data.codes import read_codes, write_codes
from recjax.data.pipeline import eval_batches
from recjax.data.sampled import HeldExamples
from recjax.data.vocab import FIRST_ITEM
from recjax.inference import Inference
from recjax.quantise import codes_by
from recjax.rankings import write_rankings
from recjax.recommend import TIMES, batch_of, make_recommend
from recjax.retrieve import encode

_MOST_LISTED = 20
_ITEM_BLOCK = 65_536


def recommendations(asked: Inference) -> None:
    """The best items for every user."""
    num_items = asked.examples.vocab.num_items
    run = make_recommend(asked.model, num_items=num_items, k=asked.most, catalogue=asked.catalogue)
    _write_users(
        asked, "recommendations", ("scores", "rows"), run, about={"k": asked.most, "exclude_seen": asked.exclude_seen}
    )


def user_vectors(asked: Inference) -> None:
    """A vector for every user."""

    def run(params: Params, prompt: jax.Array, seen: jax.Array, *times: jax.Array) -> Any:
        return encode(asked.model, params, batch_of(prompt, *times))[:1]

    _write_users(asked, "user_vectors", ("vectors",), run)


def item_vectors(asked: Inference) -> None:
    """A vector for every item; raises `UnservableError` for a model of other item vectors for every user."""
    asked.need_rows("item_vectors")
    table, last = item_table(asked), FIRST_ITEM + asked.examples.vocab.num_items
    with _artifact(asked, "item_vectors", asked.about) as writer:
        for start in range(FIRST_ITEM, last, _ITEM_BLOCK):
            end = min(start + _ITEM_BLOCK, last)
            writer.append("rows", np.arange(start, end, dtype=np.int32))
            writer.append("vectors", np.asarray(table[start:end], np.float32))


def item_table(asked: Inference) -> jax.Array:
    """The table [v, d] that queries are scored against; raises `UnservableError` where it is another for every user."""
    # The same for any history.
    nothing = np.full((asked.parts, 1), PAD, np.int32)
    with asked.on_mesh():
        table = jax.jit(lambda params, *inputs: encode(asked.model, params, batch_of(*inputs))[1])(
            asked.params, nothing, *(nothing, nothing[:, 0])[: len(TIMES[asked.times])]
        )
    if table.ndim != 2:
        raise UnservableError("item vectors of this model depend on who asks and when", mend="infer recommendations")
    return table


def teacher_rankings(asked: Inference) -> None:
    """A list for every event of the training split, for students; raises `ConfigError` for a model that reads times."""
    asked.need_rows("teacher_rankings")
    if asked.times != "none":
        raise ConfigError("lists for students are made by models that read no times", where=f"times = {asked.times!r}")
    with asked.on_mesh():
        write_rankings(
            asked.model,
            asked.params,
            asked.examples,
            out=asked.out,
            history_length=asked.history_length,
            k=min(asked.most, _MOST_LISTED),
            exclude_seen=asked.exclude_seen,
            batch_size=min(asked.batch_size, 64),
            mesh=asked.mesh,
            **asked.origin,
        )


def codes(asked: Inference) -> None:
    """A few codes for every item, from a model that quantises content; those of `extend` are kept."""
    old = read_codes(asked.extend) if asked.extend else None
    made = codes_by(asked.model, asked.params, asked.examples.vocab, old=old, mesh=asked.mesh)
    write_codes(asked.out, made, **asked.origin, about=asked.about)


def _artifact(asked: Inference, kind: str, about: dict[str, Any]) -> Any:
    return open_artifact(asked.out, kind=kind, **asked.origin, vocabulary_hash=asked.examples.vocab.hash, about=about)


def _write_users(
    asked: Inference, kind: str, names: Sequence[str], run: Callable[..., Any], *, about: dict[str, Any] | None = None
) -> None:
    """What `run` gives for every user of the split, under these names."""
    about = {**asked.about, "split": asked.split, "history_length": asked.history_length, **(about or {})}
    with _artifact(asked, kind, about) as writer:
        for users, arrays in results_of_users(asked, run, split=asked.split):
            writer.append("user_index", users)
            for name, array in zip(names, arrays, strict=True):
                writer.append(name, array)


def results_of_users(
    asked: Inference, run: Callable[..., Any], *, split: str
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """User numbers [b], and what `run(params, prompt, seen, *times)` gives for them, batch by batch.

    `batch_size` is rounded up to what the mesh can divide.
    """
    examples, slots = asked.examples, asked.history_length
    if (prompts := asked.prompts) is not None:
        held = HeldExamples(examples.path, examples.manifest, None, 0)
        examples = held.through(split, lambda records: prompts.spell(records, asked.history_length))
        slots = prompts.slots(asked.history_length)
    size = -(-asked.batch_size // asked.parts) * asked.parts
    with asked.on_mesh():
        batches = eval_batches(examples, split, batch_size=size, history_length=slots, times=asked.times)
        yield from _results(jax.jit(run), asked.params, batches, asked.mesh, asked.exclude_seen, TIMES[asked.times])


def _results(
    run: Callable[..., Any],
    params: Params,
    batches: Iterator[Any],
    mesh: Mesh | None,
    exclude_seen: bool,
    times: Sequence[str],
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """User numbers and results of every batch, filling rows dropped; the next batch is made while the last is read."""
    waiting: tuple[np.ndarray, np.ndarray, Any] | None = None

    def read(batch: tuple[np.ndarray, np.ndarray, Any]) -> tuple[np.ndarray, list[np.ndarray]]:
        users, real, arrays = batch
        return users[real], [np.asarray(array)[real] for array in arrays]

    for batch in batches:
        seen = batch["seen_ids"] if exclude_seen else np.full_like(batch["seen_ids"][:, :1], PAD)
        inputs = {"history_ids": batch["history_ids"], "seen_ids": seen}
        if "history_time" in times:
            inputs["history_time"] = batch["history_time"].astype(np.int32)
        if "query_time" in times:
            last = np.maximum((batch["segment_ids"] > 0).sum(axis=1) - 1, 0)
            inputs["query_time"] = batch["query_time"][np.arange(len(last)), last].astype(np.int32)
        placed = mesh.put_batch(inputs) if mesh else inputs
        started = run(params, *(placed[name] for name in inputs))
        if waiting is not None:
            yield read(waiting)
        waiting = batch["user_index"], batch["row_weight"] > 0, started
    if waiting is not None:
        yield read(waiting)
