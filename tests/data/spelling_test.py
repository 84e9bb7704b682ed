"""Spelled windows and prompts against a transcription that goes event by event."""

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.data.record import Column
from recjax.data.shards import MemorySource
from recjax.data.spelling import Prompts, Shape, Speller
from recjax.data.stream import Block, Stream
from recjax.data.tokens import Tokens
from recjax.data.vocab import FIRST_ITEM, OOV

ITEMS, TEXT = 30, 17


def tokens_of(levels: int, seed: int = 0) -> Tokens:
    """Codes that tell 30 items apart, the spelling of unknown items included."""
    rng = np.random.default_rng(seed)
    if levels == 1:
        sizes, codes = (ITEMS,), np.arange(ITEMS)[:, None]
    else:
        sizes = tuple(rng.integers(4, 8, levels).tolist())
        codes = np.stack(np.unravel_index(rng.permutation(np.prod(sizes))[:ITEMS], sizes), axis=1)
    start = FIRST_ITEM + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    spelling = np.zeros((128, levels), np.int32)
    spelling[OOV], spelling[FIRST_ITEM : FIRST_ITEM + ITEMS] = OOV, codes + start
    return Tokens(spelling, sizes, TEXT)


def lists(rng: np.random.Generator, lengths: np.ndarray, low: int, high: int) -> Column:
    values = rng.integers(low, high, int(lengths.sum())).astype(np.int32)
    return Column(values, np.concatenate([[0], np.cumsum(lengths)]))


def sources_of(seed: int, count: int = 40) -> list[MemorySource]:
    """Histories, in which some items are unknown, and queries with one item each."""
    rng = np.random.default_rng(seed)
    events = rng.integers(0, 15, count)
    one = np.ones(count, np.int64)
    histories = {"items": lists(rng, events, OOV, FIRST_ITEM + ITEMS)}
    queries = {
        "items": lists(rng, one, FIRST_ITEM, FIRST_ITEM + ITEMS),
        "text": lists(rng, rng.integers(1, 9, count), 0, TEXT),
    }
    return [MemorySource(histories, events.astype(np.int32)), MemorySource(queries, one.astype(np.int32))]


def plan_of(speller: Speller, shape: Shape, cut: str, **more: object) -> Stream:
    settings = {"row_length": shape.row_length, "history_length": 6, "cut": cut, "packed": True, "block": 64, "seed": 3}
    last_only = shape.answer == "decoder"
    lengths = [speller.events(task) for task in (0, 1)]
    return Stream(lengths, [1.0, 1.0], **settings, last_only=last_only, slots=speller.slots, **more)


def written(source: MemorySource, tokens: Tokens, block: Block, k: int, text_length: int) -> list[tuple[int, bool]]:
    """(row, trained) of every token of window k, in the words of the contract."""
    example, start, length = int(block.example[k]), int(block.start[k]), int(block.length[k])
    items = [(int(row), True) for row in source.columns["items"][example]]
    parts: list[list[tuple[int, bool]]] = [
        [(int(t), t >= FIRST_ITEM) for t in tokens.spelling[row]] for row, _ in items
    ]
    if "text" in source.columns:
        text = source.columns["text"][example][:text_length]
        parts.insert(0, [(int(t) + tokens.text_start, False) for t in text])
    window = parts[start : start + length + 1]
    skip = int(block.skip[k])
    if skip:
        has_text = "text" in source.columns and start == 0
        for place in range(1 if has_text else 0, skip + 1):
            window[place] = [(row, False) for row, _ in window[place]]
    return [token for part in window for token in part]


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize(("cut", "more"), [("last", {}), ("tile", {"context": 2}), ("random", {})])
def test_inline_rows_hold_what_a_transcription_writes(levels: int, cut: str, more: dict) -> None:
    tokens, sources = tokens_of(levels), sources_of(levels)
    shape = Shape(text_length=5, row_length=40)
    speller = Speller(tokens, sources, [False, True], shape)
    stream = plan_of(speller, shape, cut, **more)
    for number in range(3):
        block = stream.plan(number)
        batch = speller.empty(block.num_rows)
        speller.fill(batch, block, range(block.num_rows))
        used = np.zeros((block.num_rows, 40), bool)
        for k in range(len(block.task)):
            tokens_in = written(sources[block.task[k]], tokens, block, k, 5)
            row, place = block.row[k], slice(block.offset[k], block.offset[k] + len(tokens_in) - 1)
            assert len(tokens_in) - 1 == block.slots[k]
            assert not used[row, place].any()
            used[row, place] = True
            np.testing.assert_array_equal(batch["history_ids"][row, place], [t for t, _ in tokens_in[:-1]])
            np.testing.assert_array_equal(
                batch["target_ids"][row, place], [t if trained else 0 for t, trained in tokens_in[1:]]
            )
            np.testing.assert_array_equal(batch["weight"][row, place], [trained for _, trained in tokens_in[1:]])
            np.testing.assert_array_equal(batch["positions"][row, place], np.arange(len(tokens_in) - 1))
            assert (batch["segment_ids"][row, place] == block.segment[k]).all()
        for array in batch.values():
            assert not array[~used].any()


@pytest.mark.parametrize("levels", [1, 3])
def test_a_decoder_answers_each_window_with_its_last_event(levels: int) -> None:
    tokens, sources = tokens_of(levels), sources_of(levels)
    shape = Shape(answer="decoder", text_length=5, row_length=40, answer_length=9)
    speller = Speller(tokens, sources, [False, True], shape)
    stream = plan_of(speller, shape, "every")
    assert stream.epoch_targets == stream.epoch_windows == stream.unique_targets
    block = stream.plan(1)
    batch = speller.empty(block.num_rows)
    speller.fill(batch, block, range(block.num_rows))
    answers = np.zeros((block.num_rows, 9), bool)
    for k in range(len(block.task)):
        whole = [t for t, _ in written(sources[block.task[k]], tokens, block, k, 5)]
        row, prompt, answer = block.row[k], whole[:-levels], whole[-levels:]
        np.testing.assert_array_equal(batch["history_ids"][row, block.offset[k] :][: len(prompt)], prompt)
        mine = np.flatnonzero(batch["decoder_segment_ids"][row] == block.segment[k])
        assert len(mine) == levels and mine[-1] - mine[0] == levels - 1
        answers[row, mine] = True
        np.testing.assert_array_equal(batch["decoder_ids"][row, mine], [0, *answer[:-1]])
        np.testing.assert_array_equal(batch["decoder_positions"][row, mine], np.arange(levels))
        known = answer[0] != OOV
        np.testing.assert_array_equal(batch["target_ids"][row, mine], answer if known else [0] * levels)
        np.testing.assert_array_equal(batch["weight"][row, mine], [float(known)] * levels)
    assert not batch["decoder_segment_ids"][~answers].any()


def test_answers_that_fit_no_row_are_refused() -> None:
    with pytest.raises(ConfigError, match="answer of 3 tokens"):
        Speller(tokens_of(3), sources_of(0), [False, True], Shape(answer="decoder", row_length=40, answer_length=2))


@pytest.mark.parametrize("levels", [1, 3])
def test_a_prompt_is_the_text_then_the_newest_events(levels: int) -> None:
    tokens, sources = tokens_of(levels), sources_of(5)
    prompts = Prompts(tokens, 4)
    for source in sources:
        spelled = prompts.spell(source.columns, 3)
        for at in range(len(source)):
            record = source[at]
            text = [int(t) + tokens.text_start for t in record.get("text", [])[:4]]
            events = [int(t) for row in record["items"][-3:] for t in tokens.spelling[row]]
            assert spelled["items"][at].tolist() == text + events
            assert len(text + events) <= prompts.slots(3) + len(text)
            np.testing.assert_array_equal(spelled["seen"][at], record["items"])


def test_rows_of_a_table_say_what_they_stand_for() -> None:
    tokens = tokens_of(3)
    assert tokens.text_start % 128 == 0 and tokens.num_rows % 128 == 0
    assert tokens.valid.sum() == sum(tokens.sizes) and not tokens.valid[tokens.text_start :].any()
    assert tokens.items == slice(FIRST_ITEM, FIRST_ITEM + ITEMS)
    codes = tokens.spelling[tokens.items] - tokens.level_start
    assert (codes >= 0).all() and (codes < tokens.sizes).all()
    counts = np.zeros(128, np.float32)
    counts[FIRST_ITEM : FIRST_ITEM + ITEMS] = np.arange(1, ITEMS + 1)
    found = tokens.counts(counts)
    for row in range(tokens.num_rows):
        expected = sum(counts[item] for item in range(128) if row >= FIRST_ITEM and row in tokens.spelling[item])
        assert found[row] == expected
    assert tokens.hash != tokens_of(3, seed=1).hash


@pytest.mark.parametrize("levels", [1, 3])
def test_the_longest_window_is_one_of_those_planned(levels: int) -> None:
    shape = Shape(text_length=5, row_length=60)
    speller = Speller(tokens_of(levels), sources_of(7), [False, True], shape)
    stream = plan_of(speller, shape, "last")
    blocks = [stream.plan(number) for number in range(4)]
    assert speller.longest(6) == max(int(block.slots.max()) for block in blocks)
