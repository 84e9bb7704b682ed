"""What is said of an item: typed values, none of them guessed."""

import datetime

import polars as pl
import pytest

from recjax.core.errors import ConfigError, DataError
from recjax.prompts.fields import Entity, Field, shortened

FRAME = pl.DataFrame(
    {
        "item_id": [1, 2, 3],
        "name": ["  A  film ", None, ""],
        "genres": [["Drama", None, " "], [], None],
        "tags": ["old|new|", None, "|"],
        "price": [4.0, 2.5, None],
        "added": [86_400, None, 0],
        "seen": [datetime.date(2001, 2, 3), None, None],
    }
)


def test_fields_say_what_there_is_and_leave_out_what_there_is_not() -> None:
    entity = Entity(
        fields=(
            Field(name="title", columns=("title", "name"), label=""),
            Field(name="genres", kind="list"),
            Field(name="tags", kind="list", label="tagged", most=1),
            Field(name="price", kind="number"),
            Field(name="added", kind="date"),
            Field(name="seen", kind="date"),
            Field(name="plot", required=False),
        )
    )
    assert entity.texts(FRAME, "items", "item_id") == [
        "A film; genres: Drama; tagged: old; price: 4; added: 1970-01-02; seen: 2001-02-03",
        "price: 2.5",
        "added: 1970-01-01",
    ]
    assert Entity(fields=(Field(name="name"),)).texts(FRAME, "items", "item_id")[1:] == ["item 2", "item 3"]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (Field(name="plot", columns=("plot", "story")), "no column(.|\n)*plot or story; there are item_id, name"),
        (Field(name="price"), r"4.0 is no text(.|\n)*column price, row 1"),
        (Field(name="name", kind="number"), "no number"),
        (Field(name="price", kind="list"), "no list"),
        (Field(name="name", kind="date"), "no number"),
    ],
)
def test_what_a_table_has_not_or_of_another_kind_is_refused(field: Field, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Entity(fields=(field,)).texts(FRAME, "items", "item_id")


def test_values_of_lists_are_those_of_the_table() -> None:
    assert Field(name="tags", kind="list").lists(FRAME, "items") == [["old", "new"], [], []]
    assert Field(name="genres", kind="list").lists(FRAME, "items") == [["Drama"], [], []]
    assert Field(name="plot", required=False).lists(FRAME, "items") == [[], [], []]
    with pytest.raises(DataError, match="column price"):
        Field(name="price").lists(FRAME, "items")


def test_long_texts_are_cut_between_words() -> None:
    assert shortened("one  two three", 100) == "one two three"
    assert shortened("one two, three", 9) == "one two..."
    assert shortened("one two three", 7) == "one two..."
    assert shortened("incomprehensible", 5) == "incom..."


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="Field.kind"):
        Field(name="x", kind="picture")
    with pytest.raises(ConfigError, match="Field.most"):
        Field(name="x", most=0)
    with pytest.raises(ConfigError, match="named x, x"):
        Entity(fields=(Field(name="x"), Field(name="x")))
