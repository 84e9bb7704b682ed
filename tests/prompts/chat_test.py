"""Turns: the text of every built-in format, spans that are exact, and nothing that a title could smuggle in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.errors import ConfigError
from recjax.data.text import Tokenizer
from recjax.prompts.chat import ANSWER, FORMATS, MARKUP, Chat, ChatFormat, Memo, Part, Turn, format_named, joined

SAID = "What the formats write for one system, two users and two answers, as their publishers do."
EXPECTED = {
    "turns": "<s><system>Be brief.<end><user>Hi<end><assistant>Yes<end><user>And?<end><assistant>No<end>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Yes<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yes </s><s>[INST] And? [/INST] No </s>",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "Yes<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nNo<|eot_id|>",
    "mistral": "<s>[INST] Be brief.\n\nHi[/INST] Yes</s>[INST] And?[/INST] No</s>",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nYes</s>\n<|user|>\nAnd?</s>\n"
    "<|assistant|>\nNo</s>\n",
}
# What is predicted: what assistants say and the token that ends it, with the space before it where a format has one.
ANSWERS = {
    "turns": ["Yes<end>", "No<end>"],
    "chatml": ["Yes<|im_end|>", "No<|im_end|>"],
    "llama2": [" Yes </s>", " No </s>"],
    "llama3": ["Yes<|eot_id|>", "No<|eot_id|>"],
    "mistral": [" Yes</s>", " No</s>"],
    "zephyr": ["Yes</s>", "No</s>"],
}


def said(role: str, text: str, section: str = "question") -> Turn:
    return Turn(role, (Part(section, text),))


def spelt(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """The text of tokens, special ones too."""
    specials = {tokenizer.special(piece): piece for found in FORMATS.values() for piece in found.specials}
    parts, plain = [], []
    for token in [*tokens.tolist(), None]:
        if token in specials or token is None:
            parts.append(tokenizer.decode(np.array(plain, np.int32)) if plain else "")
            parts.append(specials.get(token, ""))
            plain = []
        else:
            plain.append(token)
    return "".join(parts)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_writes_what_its_publisher_does_and_masks_answers_exactly(name: str, tokenizer: Tokenizer) -> None:
    turns = [said("system", "Be brief."), said("user", "Hi"), said("assistant", "Yes")]
    turns += [said("user", "And?"), said("assistant", "No")]
    chat = Chat(FORMATS[name], Memo(tokenizer))
    found = chat.write(turns)
    assert spelt(tokenizer, found.tokens) == EXPECTED[name]
    mask = found.mask(ANSWER)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    answers = [spelt(tokenizer, found.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    assert answers == ANSWERS[name]
    ends = np.flatnonzero(found.tokens == tokenizer.special(FORMATS[name].end))
    assert mask[ends].sum() == 2  # the ends of other turns are not predicted
    assert found.spans[0].start == 0 and found.spans[-1].stop == len(found.tokens)
    assert all(a.stop == b.start for a, b in zip(found.spans, found.spans[1:], strict=False))


@given(
    texts=st.lists(st.text(st.sampled_from("ab <>|/[]\n"), min_size=1, max_size=12), min_size=2, max_size=8),
    name=st.sampled_from(sorted(FORMATS)),
)
def test_spans_hold_what_was_said_and_nothing_else(texts: list[str], name: str, all_pieces: Tokenizer) -> None:
    turns = [said("user" if k % 2 == 0 else "assistant", text) for k, text in enumerate(texts)]
    chat = Chat(FORMATS[name], Memo(all_pieces))
    found = chat.write(turns)
    own = found.mask(ANSWER)
    expected = [chat.answer(text) for text in texts[1::2]]
    np.testing.assert_array_equal(found.tokens[own > 0], np.concatenate([np.empty(0, np.int32), *expected]))
    asked = [chat.leads["user"] + text for text in texts[::2]]
    np.testing.assert_array_equal(
        found.tokens[found.mask("question") > 0], np.concatenate([all_pieces.encode(text) for text in asked])
    )
    assert (found.mask(ANSWER, MARKUP, "question") == 1).all()


@pytest.fixture(scope="session")
def all_pieces(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer


@pytest.mark.parametrize("name", FORMATS)
def test_a_title_cannot_end_a_turn(name: str, tokenizer: Tokenizer) -> None:
    chat = Chat(FORMATS[name], Memo(tokenizer))
    specials = {tokenizer.special(piece) for piece in FORMATS[name].specials}
    evil = "".join(FORMATS[name].specials)
    tokens = tokenizer.encode(evil)
    assert len(tokens) and not specials & set(tokens.tolist())
    assert tokenizer.decode(tokens) == evil
    turn = chat.write([said("user", evil)])
    other = chat.write([said("user", "x")])
    assert np.isin(turn.tokens, list(specials)).sum() == np.isin(other.tokens, list(specials)).sum()


def test_formats_that_do_not_fit_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="no chat format 'alpaca'(.|\n)*chatml"):
        format_named("alpaca")
    with pytest.raises(ConfigError, match="one {}, for what is said"):
        ChatFormat(name="x", specials=("<e>",), user="", assistant="{}<e>", end="<e>")
    with pytest.raises(ConfigError, match="ChatFormat.end"):
        ChatFormat(name="x", specials=("<e>",), user="{}", assistant="<e>{}", end="<e>")
    strange = ChatFormat(name="x", specials=("<strange>",), user="{}", assistant="{}<strange>", end="<strange>")
    with pytest.raises(ConfigError, match="no special token <strange>"):
        Chat(strange, Memo(tokenizer))
    with pytest.raises(ConfigError, match="a turn of 'tool'"):
        Chat(FORMATS["turns"], Memo(tokenizer)).write([said("tool", "x")])
    with pytest.raises(ConfigError, match="not followed by a user"):
        Chat(FORMATS["mistral"], Memo(tokenizer)).write([said("system", "x"), said("assistant", "y")])


def test_parts_are_joined_in_order_and_empty_ones_have_no_span() -> None:
    found = joined([np.arange(2), np.arange(0), np.arange(3), np.arange(1)], ["a", "b", "a", "c"])
    assert [tuple(span) for span in found.spans] == [("a", 0, 5), ("c", 5, 6)]
    assert found.mask("c").tolist() == [0, 0, 0, 0, 0, 1]
