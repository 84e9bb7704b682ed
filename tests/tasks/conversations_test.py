"""Conversations and instructions: each event once, answers alone predicted, nothing cut, bad lines named."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.data.tables import Tables
from recjax.data.vocab import FIRST_ITEM
from recjax.prompts.chat import FORMATS
from recjax.prompts.fields import TITLE, Entity, Field
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.prompts.writer import Budget
from recjax.tasks.cache import described
from recjax.tasks.prompted import Periods, Told, Wording
from recjax.tasks.prompted_conversations import Conversations, Instructions, Jsonl
from recjax.tasks.work import Work, examples_of

DAY = 86_400
FIELDS = (TITLE, Field(name="genres", kind="list"), Field(name="year", kind="number", required=False))
WORDING = Wording(tokenizer=TokenizerConfig(size=700), items=Entity(fields=(TITLE,)))
PERIODS = Periods(valid_fraction=0.2, test_fraction=0.2, gap_days=5)
TOLD = Told(wording=WORDING, periods=PERIODS)


def tables(users: int = 12, events: int = 240) -> Tables:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(0, users, events),
            "item_id": np.arange(events),
            "timestamp": rng.permutation(events) * DAY // 4,
            "rating": rng.integers(1, 6, events),
        }
    ).sort(["user_id", "timestamp"])
    items = {
        "item_id": np.arange(events),
        "title": [f"Film {k}x" for k in range(events)],
        "genres": [["drama", "war"][: k % 3] for k in range(events)],
        "year": [None if k % 5 else 1990 + k % 7 for k in range(events)],
    }
    return Tables(
        interactions=frame.with_columns(order=pl.int_range(pl.len()).over("user_id")), items=pl.DataFrame(items)
    )


def said(work: Work, rows: np.ndarray) -> str:
    assert work.text is not None
    return work.text.decode(rows - FIRST_ITEM)


def bounds(work: Work) -> tuple[int, int]:
    """Training is before the first time, the test from the second on."""
    first, second = re.findall(r"(?:before|from) (\d+)", work.facts["split_rule"])
    return int(first), int(second)


def exchanges(work: Work, example: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(what the user said last, the answer, whether it is predicted) of each exchange, told by the turns' tokens."""
    assert work.text is not None
    user, assistant, end = (work.text.special(piece) for piece in ("<user>", "<assistant>", "<end>"))
    tokens = example["items"] - FIRST_ITEM
    found = []
    for start in np.flatnonzero(tokens == assistant):
        stop = start + int(np.flatnonzero(tokens[start:] == end)[0])
        begin = int(np.flatnonzero(tokens[:start] == user)[-1])
        loss = example["loss"][start + 1 : stop + 1]
        assert loss.all() or not loss.any()
        assert not example["loss"][begin : start + 1].any()
        asked, answer = (work.text.decode(tokens[a:b]) for a, b in ((begin + 1, start - 1), (start + 1, stop)))
        found.append((asked, answer, bool(loss.any())))
    return found


@pytest.mark.parametrize("length", [90, 140, 600])
def test_every_training_event_is_in_one_conversation_that_fits(length: int) -> None:
    log = tables()
    work = Conversations(told=TOLD, budget=Budget(length=length)).work_on(log)
    train_end, _ = bounds(work)
    told: dict[int, list[tuple[str, str]]] = {}
    for example in examples_of(work, "train"):
        assert len(example["items"]) <= length
        found = exchanges(work, example)
        assert all(asked for *_, asked in found)
        told.setdefault(int(example["user_index"]), []).extend((a, b) for a, b, _ in found)
    for number, user in enumerate(work.users["user_id"].to_list()):
        events = log.interactions.filter((pl.col("user_id") == user) & (pl.col("timestamp") < train_end))
        expected = [(f"[Film {i}x]", f"rated {r}") for i, r in events.select("item_id", "rating").iter_rows()]
        assert told.get(number, []) == expected


def test_held_out_conversations_end_with_events_of_the_period_that_alone_are_predicted() -> None:
    log = tables()
    when = {f"[Film {i}x]": t for i, t in log.interactions.select("item_id", "timestamp").iter_rows()}
    work = Conversations(told=TOLD, asked=3, budget=Budget(length=200)).work_on(log)
    train_end, test_from = bounds(work)
    for split, first, last in (("valid", train_end, test_from), ("test", test_from, 10**12)):
        records = list(examples_of(work, split))
        assert records
        for record in records:
            assert len(record["items"]) <= 200
            found = exchanges(work, record)
            asked = [is_asked for *_, is_asked in found]
            assert 1 <= sum(asked) <= 3 and asked == sorted(asked)
            times = [when[item] for item, *_ in found]
            assert times == sorted(times)
            assert all((first <= t < last) == is_asked for t, is_asked in zip(times, asked, strict=True))


def test_drawn_items_are_none_that_the_user_picked_and_the_newest_conversations_are_kept() -> None:
    log = tables()
    work = Conversations(told=TOLD, negatives=2, most=1, budget=Budget(length=150)).work_on(log)
    train_end, _ = bounds(work)
    later = 0
    for split in ("train", "test"):
        for example in examples_of(work, split):
            user = work.users["user_id"][int(example["user_index"])]
            events = log.interactions.filter(pl.col("user_id") == user)
            known = events.filter(pl.col("timestamp") < train_end) if split == "train" else events
            mine, every = ({f"[Film {i}x]" for i in one["item_id"]} for one in (known, events))
            found = exchanges(work, example)
            assert all((item in mine) == (answer != "no") for item, answer, _ in found)
            assert any(answer == "no" for _, answer, _ in found)
            later += sum(item in every - mine for item, *_ in found)
    assert later  # what is picked later is drawn like anything else
    users = [int(e["user_index"]) for e in examples_of(work, "train")]
    assert len(users) == len(set(users))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "turns"])
def test_other_formats_fit_their_budget_too(name: str) -> None:
    wording = Wording(tokenizer=TokenizerConfig(size=700), items=Entity(fields=(TITLE,)), chat=name)
    work = Conversations(told=Told(wording=wording, periods=PERIODS), budget=Budget(length=160)).work_on(tables())
    examples = list(examples_of(work, "train"))
    assert max(len(e["items"]) for e in examples) <= 160
    assert work.text is not None
    end = work.text.special(FORMATS[name].end)
    for example in examples:
        answers = said(work, example["items"][example["loss"] > 0])
        ends = (example["items"][example["loss"] > 0] - FIRST_ITEM == end).sum()
        assert answers.count("rated") == ends > 0


def test_an_event_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(DataError, match="about a single event(.|\n)*at most 40"):
        Conversations(told=TOLD, budget=Budget(length=40)).work_on(tables())


def test_the_catalogue_is_asked_about_field_by_field() -> None:
    log = tables(events=40)
    assert log.items is not None
    wording = Wording(tokenizer=TokenizerConfig(size=700), items=Entity(fields=FIELDS))
    work = Instructions(told=Told(wording=wording), held_out=0.2).work_on(log)
    found: dict[str, set[str]] = {}
    for split in ("train", "valid", "test"):
        for example in examples_of(work, split):
            ((asked, answer, is_asked),) = exchanges(work, example)
            assert is_asked
            found.setdefault(work.users["user_id"][int(example["user_index"])], set()).add(f"{split}: {answer}")
            title = log.items["title"][int(work.users["user_id"][int(example["user_index"])].split(",")[0][5:])]
            assert title in asked
    expected = {f"item {k}, genres" for k in range(40) if k % 3} | {f"item {k}, year" for k in range(0, 40, 5)}
    assert set(found) == expected and all(len(one) == 1 for one in found.values())
    assert found["item 1, genres"].pop().endswith(": drama") and found["item 5, year"].pop().endswith(": 1995")


def write(path: Path, *records: Any) -> Jsonl:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n\n")
    return Jsonl(path=str(path))


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_conversations_of_a_file_are_read_in_both_spellings(tmp_path: Path) -> None:
    one = {"messages": [turn("system", "Be kind."), turn("user", "Hello <end>"), turn("assistant", "Hi é字")]}
    two = {"conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}] * 20}
    long = {"messages": [turn("user", "x" * 4000), turn("assistant", "y")]}
    source = write(tmp_path / "a.jsonl", one, two, long)
    task = Instructions(told=TOLD, source=source, held_out=1e-9, budget=Budget(length=60))
    work = task.work_on(tables())
    first, second = (exchanges(work, e) for e in examples_of(work, "train"))
    assert first == [("Hello <end>", "Hi é字", True)]
    assert second == [("A", "B", True)] * len(second) and 2 < len(second) < 20
    assert work.facts["too_long"] == {"left_out": 1, "shortened": 1}
    other = write(tmp_path / "b.jsonl", one, two, long)
    assert described(Instructions(source=other)) == described(Instructions(source=source))
    assert described(Instructions(source=write(tmp_path / "c.jsonl", one))) != described(Instructions(source=source))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2"),
        ("[]", "line 2"),
        ({"messages": []}, "turns of nobody"),
        ({"messages": [turn("user", "x")]}, "turns of user"),
        ({"messages": [turn("assistant", "x"), turn("user", "y")]}, "turns of assistant, user"),
        ({"messages": [turn("tool", "x")]}, "a turn of 'tool'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "that says"),
        ({"text": "x"}, "conversations"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(line: Any, message: str, tmp_path: Path) -> None:
    good = {"messages": [turn("user", "Hello"), turn("assistant", "Hi")]}
    source = write(tmp_path / "a.jsonl", good, line)
    with pytest.raises(DataError, match=r"a.jsonl, line 2") as found:
        Instructions(told=TOLD, source=source).work_on(tables())
    assert message in str(found.value)


def test_what_cannot_be_read_or_set_is_refused() -> None:
    with pytest.raises(DataError, match="cannot read the conversations"):
        Instructions(told=TOLD, source=Jsonl(path="/nowhere.jsonl")).work_on(tables())
    with pytest.raises(DataError, match="nothing to ask about"):
        Instructions(told=TOLD).work_on(tables())
    with pytest.raises(ConfigError, match="held_out"):
        Instructions(held_out=0.7)
    with pytest.raises(ConfigError, match="Conversations.asked"):
        Conversations(asked=0)
