"""Several questions that share a prompt in training: each sees the prompt alone, as if it were asked by itself."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from recjax.core.module import Functional
from recjax.data.examples import Examples, write_examples
from recjax.data.pipeline import Feed, train_batches
from recjax.data.sources import DataDir, World
from recjax.data.vocab import FIRST_ITEM
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.prompts.writer import Budget
from recjax.tasks.prompted import Told, Wording
from recjax.tasks.prompted_ranking import GenreAffinity, Ranked, Rated, Relevance, WatchNext
from recjax.tasks.prompted_work import MASKED
from recjax.tasks.work import Work, columns_of, examples_of

TOLD = Told(
    data=DataDir(simulate=World(num_events=600, ratings=True)), wording=Wording(tokenizer=TokenizerConfig(size=700))
)
COMMON: dict[str, Any] = {"told": TOLD, "history": 3, "per_user": 2, "budget": Budget(length=260)}
FEED = Feed(batch_size=4, row_length=420, history_length=420, block=16)


def prepared(path: Path, work: Work, examples: list[dict[str, Any]], schema: Any) -> Examples:
    facts = {"content_hash": path.name, "task": path.name, "branches": work.facts["branches"]}
    with write_examples(path, vocab=work.vocab, items=work.items, users=work.users, facts=facts) as writer:
        writer.add("train", schema, columns_of(examples, schema))
    return Examples.open(path)


def apart(example: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions of an example, each with a prompt of its own."""
    branch = example["branch"]
    masks = [(branch == 0) | (branch == k) for k in range(1, int(branch.max()) + 1)]
    return [{"user_index": example["user_index"], **{n: example[n][m] for n in ("items", "loss")}} for m in masks]


@pytest.mark.parametrize("kind", [Rated, WatchNext, GenreAffinity, Relevance])
def test_questions_are_those_of_separate_examples(kind: type[Ranked]) -> None:
    more = {"negatives": 2} if kind is WatchNext else {}
    work = kind(**COMMON, **more, together=3).work()
    examples = list(examples_of(work, "train"))
    assert work.facts["branches"] == 3 == max(int(e["branch"].max()) for e in examples)
    rows = work.facts["label_rows"]
    for example in examples:
        branch = example["branch"]
        assert (np.diff(branch) >= 0).all() and branch[0] == 0 and not example["loss"][branch == 0].any()
        for one in apart(example):
            assert len(one["items"]) <= 260
            assert one["loss"].tolist() == [0] * (len(one["items"]) - 2) + [1, 1] and one["items"][-2] in rows
    if kind is WatchNext:
        single = [e for e in examples_of(WatchNext(**COMMON, **more).work(), "train")]
        answers = [[int(one["items"][-2]) for one in apart(e)] for e in examples]
        assert [row for some in answers for row in some] == [int(e["items"][-2]) for e in single]
    whole = kind(**COMMON, **more, together=3, mask=False).work()
    for masked, plain in zip(examples, examples_of(whole, "train"), strict=True):
        begins = np.flatnonzero(np.diff(masked["branch"], prepend=0))
        assert (np.flatnonzero(plain["loss"] == 0) == begins[1:]).all()


def test_a_batch_says_who_sees_whom_and_where_positions_go_on(tmp_path: Path) -> None:
    work = Rated(**COMMON, together=3).work()
    examples = list(examples_of(work, "train"))
    found = train_batches([prepared(tmp_path / "x", work, examples, work.schemas["train"])], [1.0], FEED, seed=0)
    wanted = {tuple(e["items"][:-1].tolist()): e["branch"][:-1] for e in examples}
    seen = 0
    for _ in range(4):
        batch = next(found)
        for row in range(FEED.batch_size):
            segments = batch["segment_ids"][row]
            for first in np.unique(segments[segments > 0][(segments[segments > 0] - 1) % 4 == 0]):
                mine = (segments >= first) & (segments < first + 4)
                branch = wanted[tuple(batch["history_ids"][row, mine].tolist())]
                np.testing.assert_array_equal(segments[mine], first + branch)
                np.testing.assert_array_equal(batch["parents"][row, mine], np.where(branch > 0, first, 0))
                length = int((branch == 0).sum())
                expected = np.concatenate(
                    [np.arange((branch == k).sum()) + (k > 0) * length for k in np.unique(branch)]
                )
                np.testing.assert_array_equal(batch["positions"][row, mine], expected)
                seen += 1
    assert seen > 10


def test_a_model_says_the_same_as_when_each_question_has_a_prompt_of_its_own(tmp_path: Path) -> None:
    work = Rated(**COMMON, together=3).work()
    examples = list(examples_of(work, "train"))[:24]
    alone = [one for example in examples for one in apart(example)]
    encoder = TransformerConfig(width=16, num_layers=2, num_heads=2, position="rotary", norm="rms")
    model = Functional(lambda rngs: Sequence(num_rows=work.vocab.num_rows, encoder=encoder, rngs=rngs))
    params = model.init(jax.random.key(0))
    found = []
    for name, some, schema in (("together", examples, work.schemas["train"]), ("alone", alone, MASKED)):
        prepared_here = prepared(tmp_path / name, work, some, schema)
        feed = dataclasses.replace(FEED, pack=False, batch_size=len(some), block=len(some), prefetch=0)
        batch = next(train_batches([prepared_here], [1.0], feed, seed=0))
        out = jax.jit(lambda p, b: model.apply(p, b, train=False, key=None))(params, jax.device_put(batch))
        asked = batch["weight"] > 0
        assert asked.sum() == 2 * len(alone)
        found.append(np.column_stack([batch["target_ids"][asked], np.asarray(out["hidden"])[asked]]))
    # The same answers with the same vectors, in whatever order rows come.
    distance = np.abs(found[0][:, None] - found[1]).max(-1)
    assert distance.min(0).max() < 1e-4 and distance.min(1).max() < 1e-4
    assert np.median(distance) > 0.1


def test_tasks_with_and_without_branches_share_a_batch(tmp_path: Path) -> None:
    together, single = (Rated(**COMMON, together=n).work() for n in (3, 1))
    parts = [
        prepared(tmp_path / name, work, list(examples_of(work, "train")), work.schemas["train"])
        for name, work in (("together", together), ("single", single))
    ]
    batch = next(train_batches(parts, [1.0, 1.0], FEED, seed=0))
    segments, parents = batch["segment_ids"], batch["parents"]
    assert ((segments > 0) == (batch["history_ids"] >= FIRST_ITEM)).all()
    assert ((parents > 0) <= (segments > parents)).all() and ((parents > 0) == ((segments - 1) % 4 > 0))[
        segments > 0
    ].all()
