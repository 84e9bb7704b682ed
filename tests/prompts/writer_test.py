"""Prompts: budgets that cut whole events and fields alone, prefixes that candidates share, fields that are checked."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.errors import ConfigError, DataError
from recjax.data.text import Tokenizer
from recjax.prompts.chat import FORMATS, Chat, Memo
from recjax.prompts.template import Template
from recjax.prompts.writer import Budget, Event, PromptWriter

TEMPLATE = Template(
    instruction=("Decide.\n", "Say whether.\n"),
    question=("Is it [{item}]?", "[{item}], yes?", "What of [{item}]?"),
)
GROUPED = Template(instruction=("Decide.\n",), question=("Is it [{item}]?",), layout="grouped")
ITEMS = [f"The {a} {b}" for a in ("red", "blue", "quiet") for b in ("film", "story", "night", "river")]
FIELDS = ["age: 4", "country: red", "rated: blue"]


def writer(tokenizer: Tokenizer, template: Template = TEMPLATE, **budget: int) -> PromptWriter:
    chat = Chat(FORMATS["turns"], Memo(tokenizer))
    return PromptWriter(template, chat, Budget(**budget), name="test", question=("item",))


def text(tokenizer: Tokenizer, prompt, section: str) -> str:
    return tokenizer.decode(prompt.prefix.tokens[prompt.prefix.mask(section) > 0])


@given(
    history=st.lists(st.tuples(st.sampled_from(ITEMS), st.sampled_from(["liked", "not liked", "saw"])), max_size=12),
    limit=st.integers(0, 90),
    length=st.integers(75, 260),
    draw=st.integers(0, 50),
    grouped=st.booleans(),
)
def test_the_oldest_events_go_first_and_none_is_cut(
    history: list[tuple[str, str]], limit: int, length: int, draw: int, grouped: bool, tokenizer: Tokenizer
) -> None:
    template = GROUPED if grouped else TEMPLATE
    write = writer(tokenizer, template, length=length, history=limit)
    events = [Event(*event) for event in history]
    questions = [{"item": item} for item in ITEMS[:3]]
    found = write.write(questions, history=events, profile=FIELDS, draw=draw)
    kept = events[len(events) - found.events :]
    style = template.styled(draw)

    def said(some: list[Event]) -> str:
        if not some:
            return style.say("nothing")
        if not grouped:
            return style.say("history") + "".join(style.say("event", item=e.item, action=e.action) for e in some)
        groups = {e.action: [o.item for o in some if o.action == e.action] for e in some}
        lines = (
            style.say("group", action=action) + "".join(style.say("member", item=item) for item in items) + "\n"
            for action, items in groups.items()
        )
        return style.say("history") + "".join(lines)

    assert text(tokenizer, found, "history") == said(kept)
    fixed = len(found.prefix.tokens) - int(found.prefix.mask("history").sum())
    whole = fixed + max(len(question.tokens) for question in found.questions) + 2
    assert whole + int(found.prefix.mask("history").sum()) <= length
    if len(kept) < len(events):  # one more event would have been over the budget
        more = len(tokenizer.encode(said(events[len(events) - found.events - 1 :])))
        assert more > (limit or length) or whole + more > length - 3 or more > limit > 0
    assert text(tokenizer, found, "instruction") == style.say("instruction")
    assert text(tokenizer, found, "profile") == style.say("profile", profile="; ".join(FIELDS))


def test_all_candidates_share_the_prefix_and_a_whole_example_is_its_parts(tokenizer: Tokenizer) -> None:
    write = writer(tokenizer)
    history = [Event(item, "liked") for item in ITEMS[:4]]
    many = write.write([{"item": item} for item in ITEMS], history=history, profile=FIELDS)
    answer = write.chat.answer("Yes")
    for number, item in enumerate(ITEMS):
        one = write.write([{"item": item}], history=history, profile=FIELDS)
        np.testing.assert_array_equal(one.prefix.tokens, many.prefix.tokens)
        np.testing.assert_array_equal(one.questions[0].tokens, many.questions[number].tokens)
        whole, branch = one.answered(answer)
        parts = [many.prefix.tokens, many.questions[number].tokens, answer]
        np.testing.assert_array_equal(whole.tokens, np.concatenate(parts))
        np.testing.assert_array_equal(branch, np.arange(len(whole.tokens)) >= len(many.prefix.tokens))
        assert whole.tokens[whole.mask("answer") > 0].tolist() == answer.tolist()
        assert [span.section for span in whole.spans] == [
            *("markup", "instruction", "profile", "history", "question", "markup", "answer")
        ]


def test_questions_that_share_a_prompt_are_branches_of_it(tokenizer: Tokenizer) -> None:
    write = writer(tokenizer)
    prompt = write.write([{"item": item} for item in ITEMS[:3]], history=[Event(ITEMS[5], "liked")])
    answers = [write.chat.answer(word) for word in ("Yes", "No", "Yes")]
    found, branch = prompt.answered(*answers)
    assert branch.dtype == np.int32 and len(branch) == len(found.tokens)
    np.testing.assert_array_equal(found.tokens[branch == 0], prompt.prefix.tokens)
    for number, (question, answer) in enumerate(zip(prompt.questions, answers, strict=True), start=1):
        np.testing.assert_array_equal(found.tokens[branch == number], np.concatenate([question.tokens, answer]))
    np.testing.assert_array_equal(found.tokens[found.mask("answer") > 0], np.concatenate(answers))


def test_a_writer_can_be_written_down_and_read_again(tokenizer: Tokenizer) -> None:
    one = writer(tokenizer, GROUPED, length=200, history=80)
    two = PromptWriter.of(json.loads(json.dumps(one.told())), tokenizer)
    history = [Event(item, "liked") for item in ITEMS]
    found, again = (w.write([{"item": ITEMS[0]}], history=history, profile=FIELDS, draw=5) for w in (one, two))
    np.testing.assert_array_equal(found.prefix.tokens, again.prefix.tokens)
    np.testing.assert_array_equal(found.questions[0].tokens, again.questions[0].tokens)
    assert found.events == again.events < len(history)
    assert two.told() == one.told()


def test_whole_fields_of_a_profile_are_left_out_last_first(tokenizer: Tokenizer) -> None:
    sizes = [len(tokenizer.encode("Member: " + "; ".join(FIELDS[:n]) + "\n")) for n in (1, 2, 3)]
    for limit in range(1, sizes[-1] + 2):
        found = writer(tokenizer, profile=limit).write([{"item": "x"}], profile=FIELDS)
        count = sum(size <= limit for size in sizes)
        assert text(tokenizer, found, "profile") == (f"Member: {'; '.join(FIELDS[:count])}\n" if count else "")


def test_what_may_not_be_cut_and_does_not_fit_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens, without any history(.|\n)*at most 20"):
        writer(tokenizer, length=20).write([{"item": ITEMS[0]}], history=[Event(ITEMS[1], "liked")], profile=FIELDS)
    with pytest.raises(DataError, match="the question of a prompt takes .* tokens(.|\n)*Budget.question"):
        writer(tokenizer, question=3).write([{"item": ITEMS[0]}])
    with pytest.raises(DataError, match="the instruction of a prompt"):
        writer(tokenizer, instruction=1).write([{"item": ITEMS[0]}])
    with pytest.raises(ConfigError, match="Budget.length"):
        Budget(length=0)


def test_styles_are_a_function_of_the_draw_and_all_of_them_come_up() -> None:
    assert TEMPLATE.styled(0).phrases["question"] == "Is it [{item}]?"
    found = {tuple(TEMPLATE.styled(draw).phrases.values()) for draw in range(1, 300)}
    every = [getattr(TEMPLATE, section) for section in Template.sections()]
    assert len(found) == np.prod([len(phrases) for phrases in every])
    assert all(TEMPLATE.styled(d).phrases == TEMPLATE.styled(d).phrases for d in range(20))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (Template(instruction=("Of {titel}",), question=("[{item}]",)), "no field 'titel'(.|\n)*Template.instruction"),
        (Template(instruction=("Of",), question=("It?",)), "leaves out the field 'item'(.|\n)*Template.question"),
        (Template(instruction=("Of",), question=("[{item}]",), event=("{item}\n",)), "leaves out the field 'action'"),
        (Template(instruction=("Of {",), question=("[{item}]",)), "Template.instruction"),
        (Template(instruction=("Of {}",), question=("[{item}]",)), "no field ''"),
    ],
)
def test_fields_of_a_template_are_checked(template: Template, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=message):
        writer(tokenizer, template)


def test_templates_without_phrases_are_refused() -> None:
    with pytest.raises(ConfigError, match="Template.question has no phrase"):
        Template(instruction=("x",), question=())
    with pytest.raises(ConfigError, match="Template.layout"):
        Template(instruction=("x",), question=("y",), layout="random")
