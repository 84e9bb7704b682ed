"""Documents: what they say, what they leave out, and that a small language model learns from them."""

from collections.abc import Callable

import jax
import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.core.optim import Optimizer
from recjax.data.pipeline import Feed
from recjax.data.sources import DataDir, World
from recjax.data.tables import Tables
from recjax.data.vocab import FIRST_ITEM
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig
from recjax.prepare import ensure_prepared
from recjax.prompts.fields import TITLE, Entity, Field
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.recipe import Assembly, Recipe
from recjax.tasks.documents import Documents
from recjax.tasks.mixtures import Mixture
from recjax.tasks.prompted import Periods, Told, Wording
from recjax.tasks.work import Work, examples_of

DAY = 86_400
SMALL = Wording(tokenizer=TokenizerConfig(size=600))


def log(events: list[tuple[int, str, float, int]]) -> Tables:
    """Tables of (user, item, rating, day) and items a, b, c, ..."""
    frame = pl.DataFrame(events, schema=["user_id", "item_id", "rating", "day"], orient="row")
    frame = frame.sort(["user_id", "day"], maintain_order=True)
    frame = frame.with_columns(order=pl.int_range(pl.len()).over("user_id"), timestamp=pl.col("day") * DAY)
    names = sorted({item for _, item, *_ in events})
    items = {"item_id": names, "title": [f"Film {n.upper()}" for n in names], "genres": [["Drama", n] for n in names]}
    return Tables(interactions=frame.drop("day"), items=pl.DataFrame(items))


def texts(work: Work, split: str) -> dict[int, str]:
    assert work.text is not None
    return {int(e["user_index"]): work.text.decode(e["items"] - FIRST_ITEM) for e in examples_of(work, split)}


def test_documents_tell_the_catalogue_and_the_log_of_the_training_period() -> None:
    tables = log([(7, "a", 4.0, 0), (7, "b", 2.5, 40), (7, "c", 5.0, 90), (9, "b", 1.0, 1), (9, "a", 3.0, 95)])
    task = Documents(
        held_out=1e-9, told=Told(wording=SMALL, periods=Periods(valid_fraction=0.2, test_fraction=0.2, gap_days=10))
    )
    work = task.work_on(tables)
    found = texts(work, "train")
    assert work.users["user_id"].to_list() == ["user 7", "user 9", "item a", "item b", "item c"]
    assert "Film A; genres: Drama, a" in found[0] and "rated 4" in found[0] and "rated 2.5" in found[0]
    assert "Film C" not in found[0] and "rated 3" not in found[1]  # of the later periods
    assert [found[k] for k in (2, 3, 4)] == [f"Film {n.upper()}; genres: Drama, {n}" for n in "abc"]
    tokens = [e["items"] - FIRST_ITEM for e in examples_of(work, "train")]
    assert work.text is not None
    begin, end = work.text.special("<s>"), work.text.special("</s>")
    assert all(one[0] == begin and one[-1] == end and begin not in one[1:] for one in tokens)
    counts = np.bincount(np.concatenate(tokens), minlength=work.text.size)
    np.testing.assert_array_equal(work.items["train_count"], counts)


def test_an_event_is_told_by_its_rating_or_its_kind_or_as_watched() -> None:
    rated = log([(7, "a", 4.0, 0), (7, "b", 2.0, 1), (7, "a", 1.0, 2), (7, "c", 1.0, 90), (7, "b", 1.0, 99)])
    rating = pl.when(pl.col("order") != 1).then("rating")
    kinds = pl.Series(["bought", "viewed", None, None, None])
    wording = Wording(tokenizer=TokenizerConfig(size=600), did="saw", rated="gave {rating}")
    told = Told(wording=wording, periods=Periods(valid_fraction=0.2, test_fraction=0.2, gap_days=1))
    task = Documents(told=told, held_out=1e-9, sources=("log",))
    bare = rated.interactions.drop("rating")
    for frame, expected in (
        (rated.interactions.with_columns(rating=rating), ["gave 4", "saw", "gave 1"]),
        (rated.interactions.with_columns(rating=rating, event=kinds), ["gave 4", "viewed", "gave 1"]),
        (bare.with_columns(event=kinds), ["bought", "viewed", "saw"]),
        (bare, ["saw", "saw", "saw"]),
    ):
        (found,) = texts(task.work_on(Tables(interactions=frame, items=rated.items)), "train").values()
        lines = found.strip().splitlines()[-3:]
        assert all(action in line for action, line in zip(expected, lines, strict=True))


def test_documents_of_items_can_tell_more_than_prompts_do() -> None:
    tables = log([(7, "a", 4.0, 0), (7, "?", 1.0, 1), (7, "b", 2.5, 2), (7, "c", 5.0, 90)])
    assert tables.items is not None
    items = tables.items.filter(pl.col("item_id") != "?").with_columns(plot=pl.format("A {} happens.", "title"))
    details = Entity(fields=(TITLE, Field(name="plot", label="")))
    told = Told(
        wording=Wording(tokenizer=TokenizerConfig(size=600), details=details),
        periods=Periods(valid_fraction=0.2, test_fraction=0.2, gap_days=1),
    )
    work = Documents(told=told, held_out=1e-9).work_on(Tables(interactions=tables.interactions, items=items))
    found = texts(work, "train")
    assert "happens" not in found[0] and "item ?" in found[0] and "Film A; genres: Drama, a" in found[0]
    named = dict(work.users.iter_rows())
    assert {named[k]: text for k, text in found.items() if k} == {
        **{f"item {n}": f"Film {n.upper()}; A Film {n.upper()} happens." for n in "abc"},
        "item ?": "item ?",
    }


def test_every_document_is_in_one_split_and_the_splits_do_not_depend_on_the_sources() -> None:
    tables = World(num_events=2000).tables()
    task = Documents(told=Told(wording=SMALL), held_out=0.2)
    work = task.work_on(tables)
    found = [set(texts(work, split)) for split in ("train", "valid", "test")]
    assert all(found) and sum(map(len, found)) == len(set.union(*found)) <= work.users.height
    assert work.facts["counts"]["train"]["examples"] == len(found[0])
    users = Documents(told=Told(wording=SMALL), held_out=0.2, sources=("log",)).work_on(tables)
    assert set(texts(users, "valid")) == {n for n in found[1] if n < len(users.users)}


def test_what_cannot_be_told_is_refused() -> None:
    tables = log([(7, "a", 4.0, 0), (7, "b", 2.5, 40)])
    with pytest.raises(DataError, match=r"no column(.|\n)*item_id, title"):
        fields = (Field(name="plot", columns=("plot", "summary")),)
        Documents(told=Told(wording=Wording(items=Entity(fields=fields)))).work_on(tables)
    with pytest.raises(DataError, match="needs an items table"):
        Documents().work_on(Tables(interactions=tables.interactions))
    with pytest.raises(DataError, match="leaves nothing to train on"):
        Documents(told=Told(wording=SMALL, periods=Periods(gap_days=100))).work_on(tables)
    with pytest.raises(DataError, match="needs times"):
        Documents(told=Told(wording=SMALL)).work_on(
            Tables(interactions=tables.interactions.drop("timestamp"), items=tables.items)
        )
    with pytest.raises(ConfigError, match="special token '<begin>'"):
        Documents(told=Told(wording=SMALL, periods=Periods(gap_days=1)), begin="<begin>").work_on(tables)
    with pytest.raises(ConfigError, match="sources"):
        Documents(sources=("plots",))


def test_a_small_language_model_learns_from_documents(prepare_here: Callable[..., None]) -> None:
    task = Documents(told=Told(data=DataDir(simulate=World(num_events=1000)), wording=SMALL))
    prepare_here(task)
    recipe = Recipe(
        name="documents",
        mixture=Mixture(tasks=[task]),
        feed=Feed(batch_size=8, row_length=64, history_length=64, history="chunk"),
        model=lambda **given: Sequence(
            encoder=TransformerConfig(width=16, num_layers=1, num_heads=2, position="rotary"), **given
        ),
        objectives=[CatalogueSoftmax()],
        optimizer=Optimizer(learning_rate=1e-2),
        train_steps=25,
    )
    assembly = Assembly(recipe, ensure_prepared(recipe.mixture), jax.devices()[:1])
    state, step, const = assembly.init_state(), assembly.train_step(), assembly.const()
    losses = []
    with assembly.mesh.activate():
        for batch in assembly.batches():
            state, metrics = step(state, assembly.mesh.put_batch(batch), const)
            losses.append(float(metrics["loss"]))
            if len(losses) == recipe.train_steps:
                break
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
