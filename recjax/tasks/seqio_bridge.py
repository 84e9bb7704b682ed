"""Tasks as `seqio.Task`, mixtures as `seqio.Mixture`: what a seqio user can take, and what `prepare` writes down.

Objects are built by functions and registered nowhere. TensorFlow and seqio are imported inside the functions, because
no training process may load them. Numbers pass through as they are, items are table rows by now; text is spelt by
seqio's SentencePiece vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from recjax.core.errors import ExamplesError
from recjax.data.record import Column
from recjax.data.text import TextVocab
from recjax.tasks.mixtures import Mixture
from recjax.tasks.work import Encode, Work, count

# What the libraries call seqio.Task, seqio.Mixture, seqio.Vocabulary, tf.data.Dataset and tf.Tensor.
SeqioTask = SeqioMixture = SeqioVocabulary = Dataset = Tensor = Any

_ITEMS = ("items", "label", "future", "seen")
_NEEDED = ("tensorflow", "seqio")
_AT_ONCE = 4096


def check_available() -> None:
    """Raise `ExamplesError` when TensorFlow or seqio is not installed; imports neither."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExamplesError(
            f"examples cannot be prepared here: {' and '.join(missing)} not installed",
            expected="prepared examples in the cache, or Python 3.11 with recjax[seqio]",
            mend="run `recjax prepare` on a machine that has them and copy its cache folder here (RECJAX_CACHE)",
        )


def import_quietly() -> None:
    """Import TensorFlow and seqio without what TensorFlow writes to stderr meanwhile, if they are there."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere, contextlib.suppress(ImportError):
            os.dup2(nowhere.fileno(), 2)
            import seqio  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def seqio_task(work: Work, *, metric_fns: Sequence[Callable[..., Any]] = ()) -> SeqioTask:
    """The task as an unregistered `seqio.Task` with the splits of the work; examples in order of user."""
    import seqio

    return seqio.Task(
        work.name,
        source=seqio.FunctionDataSource(
            _dataset_fn(work),
            splits=tuple(work.raw),
            num_input_examples={split: count(raw) for split, raw in work.raw.items()},
        ),
        output_features=_features(work),
        preprocessors=_preprocessors(work.steps),
        metric_fns=list(metric_fns),
    )


def seqio_mixture(mixture: Mixture, *, name: str = "mixture") -> SeqioMixture:
    """The mixture as an unregistered `seqio.Mixture`, with its rates; reads the data of every task."""
    import seqio

    works = [task.work() for task in mixture.tasks]
    rates = mixture.resolved([work.facts["counts"]["train"]["examples"] for work in works])
    return seqio.Mixture(name, list(zip(map(seqio_task, works), rates, strict=True)))


def text_vocabulary(vocab: TextVocab) -> SeqioVocabulary:
    """The text vocabulary as `seqio.SentencePieceVocabulary`; ids that spell nothing are not in it."""
    import seqio

    with tempfile.TemporaryDirectory(prefix="recjax-text-") as folder:  # a path of its own, because seqio keys by it
        path = os.path.join(folder, "text.model")
        with open(path, "wb") as file:
            file.write(vocab.model)
        found = seqio.SentencePieceVocabulary(path)
        found.load_model()
    return found


def materialise(task: SeqioTask, split: str) -> Iterator[dict[str, Column]]:
    """All examples of a split in order, a few thousand at a time."""
    import tensorflow as tf

    options = tf.data.Options()
    options.threading.private_threadpool_size = 2
    options.autotune.enabled = False
    dataset = task.get_dataset(split=split, shuffle=False, try_in_mem_cache=False).with_options(options)
    for batch in dataset.ragged_batch(_AT_ONCE).prefetch(2):
        yield {name: _to_column(value) for name, value in batch.items()}


def _features(work: Work) -> dict[str, Any]:
    import seqio
    import tensorflow as tf

    features = {}
    rows, numbers = seqio.PassThroughVocabulary(work.vocab.num_rows), seqio.PassThroughVocabulary(0)
    vocabularies: dict[str, Any] = dict.fromkeys(_ITEMS, rows)
    if isinstance(work.text, TextVocab):
        vocabularies["text"] = text_vocabulary(work.text)
    schemas = list(work.schemas.values())
    for field in {field.name: field for schema in schemas for field in schema}.values():
        features[field.name] = seqio.Feature(
            vocabularies.get(field.name, numbers),
            add_eos=False,
            required=all(field in schema for schema in schemas),
            dtype=tf.as_dtype(field.dtype),
            rank=field.rank,
        )
    return features


def _dataset_fn(work: Work) -> Callable[..., Dataset]:
    def dataset_fn(split: str, shuffle_files: bool = False, seed: int | None = None) -> Dataset:
        """The raw examples of a split, always in order of user: there are no files to shuffle."""
        import tensorflow as tf

        ragged: Any = tf.RaggedTensor
        whole = {name: column.joined() for name, column in work.raw[split].items()}
        slices: Any = {
            name: _tensor(c.values) if c.offsets is None else ragged.from_row_splits(_tensor(c.values), c.offsets)
            for name, c in whole.items()
        }
        return tf.data.Dataset.from_tensor_slices(slices)

    return dataset_fn


def _preprocessors(steps: Sequence[Encode]) -> list[Callable[[Dataset], Dataset]]:
    """One preprocessor for all steps, which is faster than one each; none where there are none."""

    def spell(dataset: Dataset) -> Dataset:
        import tensorflow as tf

        texts = {step.name: text_vocabulary(step.vocab) for step in steps}

        @tf.autograph.experimental.do_not_convert
        def through(example: dict[str, Tensor]) -> dict[str, Tensor]:
            for step in steps:
                ids = texts[step.name].encode_tf(tf.strings.join([step.prompt, example[step.name]]))
                example = {**example, step.name: ids}
            return example

        return dataset.map(through, num_parallel_calls=2, deterministic=True)

    return [spell] if steps else []


def _tensor(values: np.ndarray) -> Tensor:
    """Numbers, or text, whose type an empty array of objects does not say."""
    import tensorflow as tf

    return tf.constant(values, tf.string if values.dtype == object else None)


def _to_column(value: Any) -> Column:
    """A batch of numbers or of lists; lists of one length come as a plain matrix."""
    import tensorflow as tf

    if isinstance(value, tf.RaggedTensor):
        return Column(value.values.numpy(), value.row_splits.numpy())
    values = value.numpy()
    if values.ndim == 1:
        return Column(values)
    return Column(values.reshape(-1), np.arange(len(values) + 1) * values.shape[1])
