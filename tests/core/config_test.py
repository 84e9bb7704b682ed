"""Recipes say what they mean: values arrive as written, the last binding wins, and every mistake is named."""

from __future__ import annotations

import ast
import dataclasses
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from recjax.core import config
from recjax.core.errors import ConfigError

CAFE = """
from __future__ import annotations
import dataclasses
from collections.abc import Callable, Sequence
from recjax.core.errors import ConfigError

@dataclasses.dataclass(frozen=True, kw_only=True)
class Drink:
    name: str = "tea"
    sugar: int = 0
    strength: float = 1.0
    milk: bool = False

@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    drinks: Sequence[Drink] = ()
    maker: Callable[..., Drink] | None = None
    first: Drink | None = None
    number: int
    note: object = None

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ConfigError(f"table {self.number} does not exist")
        if self.number > 99:
            raise ValueError("too many tables")

HOUSE = 7
"""
HEAD = "from __gin__ import dynamic_registration\nimport cafe\n"


@pytest.fixture(scope="module", autouse=True)
def cafe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "cafe.py").write_text(CAFE)
    (folder / "cafe_broken.py").write_text("import not_installed_anywhere\n")
    sys.path.append(str(folder))
    import cafe  # pyright: ignore[reportMissingImports]

    yield cafe
    sys.path.remove(str(folder))


Parse = Callable[..., config.Parsed]


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Parse a gin text, with bindings as on a command line."""
    monkeypatch.chdir(tmp_path)

    def parse(text: str, *bindings: str) -> config.Parsed:
        return parse_text(tmp_path, text, *bindings)

    return parse


def parse_text(folder: Path, text: str, *bindings: str) -> config.Parsed:
    path = folder / "recipe.gin"
    path.write_text(textwrap.dedent(text))
    return config.parse(config.parse_argv([f"--gin_file={path}", *(f"--gin.{b}" for b in bindings)]))


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(value=literals, on_command_line=st.booleans())
def test_values_and_snapshots_come_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, value: Any, on_command_line: bool
) -> None:
    folder = tmp_path_factory.mktemp("round")
    text = HEAD + "cafe.Table.number = 1\ncafe.Table.note = %NOTE\n"
    if on_command_line:
        parse_text(folder, text, f"NOTE={value!r}")
    else:
        parse_text(folder, text + f"NOTE = {value!r}\n")
    assert config.build("cafe.Table").note == value
    first = config.snapshot()
    parse_text(folder, first.config)
    assert config.build("cafe.Table").note == value
    assert config.snapshot() == first
    parse_text(folder, first.operative)
    assert config.build("cafe.Table").note == value


@given(word=st.from_regex(r"[A-Za-z_/.~][A-Za-z0-9_/.~:=,#+ -]*", fullmatch=True))
@example("data=4,model=2")
@example("/data/ml-1m")
@example(".5")
@example("None")
def test_a_bare_word_is_text_unless_it_is_a_literal(tmp_path_factory: pytest.TempPathFactory, word: str) -> None:
    try:
        expected = ast.literal_eval(word)
    except (SyntaxError, ValueError):
        expected = word
    assume(expected is not word or word.strip().lower() not in {"true", "false", "none", "null"})
    assume(not isinstance(expected, complex))
    folder = tmp_path_factory.mktemp("bare")
    parse_text(folder, HEAD + "cafe.Table.number = 1\ncafe.Table.note = %NOTE\nNOTE = 0\n", f"NOTE={word}")
    assert config.build("cafe.Table").note == expected


def test_references_scopes_and_partial_application(parse: Parse) -> None:
    parse(
        HEAD
        + """
        SUGAR = 2
        cafe.Drink.strength = 2
        milky/cafe.Drink:
          milk = True
          sugar = %SUGAR
        cafe.Table:
          number = 4
          drinks = (@cafe.Drink(), @milky/cafe.Drink())
          maker = @milky/cafe.Drink
        """.replace("\n        ", "\n")
    )
    table = config.build("cafe.Table")
    plain, milky = table.drinks
    assert dataclasses.astuple(plain) == ("tea", 0, 2, False)
    assert dataclasses.astuple(milky) == ("tea", 2, 2, True)
    assert table.maker(name="mocha").milk and table.maker(name="mocha").name == "mocha"


def test_the_last_binding_wins_from_includes_to_command_line(parse: Parse, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.gin").write_text(HEAD + "cafe.Table.number = %NUMBER\nNUMBER = 1\n")
    text = "include 'deep/base.gin'\nNUMBER = 2\n"
    parsed = parse(text)
    assert config.build("cafe.Table").number == 2 and parsed.macros == {"NUMBER": 2}
    assert [path.name for path in parsed.files] == ["recipe.gin", "base.gin"]
    parse(text, "NUMBER=3")
    assert config.build("Table").number == 3
    parse(text, "NUMBER=3", "cafe.Table.number=%NUMBER", "cafe.Table.note=@cafe.Drink()")
    assert config.build("cafe.Table").note.name == "tea"


def test_includes_are_found_through_search_paths_and_nothing_leaks(parse: Parse, tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "base.gin").write_text(HEAD + "cafe.Table.number = 5\n")
    (tmp_path / "r.gin").write_text("include 'base.gin'\n")
    config.parse(config.parse_argv(["--gin_file", "r.gin", "--gin_search_paths=elsewhere,library"]))
    assert config.build("cafe.Table").number == 5
    with pytest.raises(ConfigError, match="no gin file base.gin"):
        config.parse(config.parse_argv(["--gin_file", "r.gin"]))
    parse(HEAD + "cafe.Drink.sugar = 1\n")
    with pytest.raises(ConfigError, match="does not set up cafe.Table"):
        config.build("cafe.Table")
    with pytest.raises(ConfigError, match="is not known here"):
        parse("cafe.Drink.sugar = 1\n")


# What is written, where it is found to be wrong, and what the message must say.
MISTAKES = {
    "parameter": ("cafe.Drink.suger = 1", 3, "no parameter suger.*did you mean sugar"),
    "parameter in a block": ("cafe.Drink:\n  milk = True\n  suger = 1", 5, "no parameter suger.*did you mean sugar"),
    "class": ("cafe.Drnk.sugar = 1", 3, "cafe has no Drnk.*did you mean cafe.Drink"),
    "block": ("cafe.Drnk:\n  sugar = 1", 3, "cafe has no Drnk.*did you mean cafe.Drink"),
    "class in a value": ("X = 1\ncafe.Table.first = @cafe.Drunk()", 4, "no Drunk.*did you mean cafe.Drink"),
    "class in a list": ("cafe.Table.drinks = [\n  @cafe.Drink(),\n  @cafe.Dronk()]", 5, "no Dronk"),
    "module": ("caffe.Drink.sugar = 1", 3, "no module caffe.*did you mean cafe"),
    "import": ("from recjax.core import shardign", 3, "no module recjax.core.shardign.*did you mean sharding"),
    "import of a class": ("from cafe import Drink", 3, "a module, not a class"),
    "import that fails": ("import cafe_broken", 3, "cafe_broken cannot be imported.*not_installed_anywhere"),
    "not a class": ("cafe.HOUSE.x = 1", 3, "cafe.HOUSE cannot be configured"),
    "macro never used": ("cafe.Drink.sugar = %SUGAR\nSUGAR = 1\nSUGER = 2", 5, "SUGER is set but.*did you mean SUGAR"),
    "macro used by an unused macro": ("A = %B\nB = 1", 3, "A is set but nothing uses it"),
    "macro used by what is overwritten": ("cafe.Drink.sugar = %S\nS = 1\ncafe.Drink.sugar = 2", 4, "S is set but"),
    "macro never set": ("cafe.Drink.sugar = %SUGER\nSUGAR = 1", 3, "SUGER is used but never set.*mean SUGAR"),
    "macro of itself": ("cafe.Drink.sugar = %A\nA = %B\nB = %A", 5, "A is set to itself"),
    "macro in small letters": ("sugar = 1", 3, "neither a parameter nor a macro"),
    "scope": ("cafe.Table.first = @mlky/cafe.Drink()\nmilky/cafe.Drink.milk = True", 4, "scope milky/.*mean mlky"),
    "required": ("cafe.Drink.sugar = %S\nS = %gin.REQUIRED\ncafe.Table.number = %gin.REQUIRED", 4, "S, cafe.Table.num"),
    "value": ("cafe.Drink.name = mocha", 3, "put quotes"),
    "two values": ("cafe.Drink.sugar = 1 2", 3, "cannot read"),
    "no value": ("cafe.Drink.sugar =", 3, "cannot read"),
    "open bracket": ("cafe.Table.drinks = [1,\n\n", None, "cannot read"),
    "open text": ("cafe.Drink.name = 'mocha", 3, "cannot read"),
    "not gin": ("{{ sugar }}", 3, "cannot read"),
    "whole number": ("cafe.Drink.sugar = 1.5", 3, "cafe.Drink.sugar = 1.5.*a whole number"),
    "truth for a number": ("cafe.Drink.sugar = True", 3, "a whole number"),
    "type through macros": ("cafe.Drink.sugar = %A\nA = %B\nB = 'two'", 5, "'two'.*a whole number"),
    "literal for an object": ("cafe.Table.first = 'tea'", 3, "@Drink.*or None"),
    "literals for objects": ("cafe.Table.drinks = ['tea']", 3, "Sequence"),
    "include": ("include 'nowhere.gin'", 3, "no gin file nowhere.gin"),
    "include of itself": ("include 'recipe.gin'", None, "includes itself"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_with_its_place(parse: Parse, kind: str) -> None:
    text, line, message = MISTAKES[kind]
    with pytest.raises(ConfigError, match=f"(?s){message}") as error:
        parse(HEAD + text + "\n")
    if line is not None:
        assert error.value.where.split(",")[0] == f"recipe.gin:{line}"
    else:
        assert "recipe.gin" in error.value.where


@pytest.mark.parametrize("binding", ["SUGAR=5", "cafe.Drink.sugar=5"])
def test_the_command_line_may_replace_what_uses_a_macro(parse: Parse, binding: str) -> None:
    parse(HEAD + "cafe.Drink.sugar = %SUGAR\nSUGAR = %SPOONS\nSPOONS = 2\n", binding)
    assert config.build("cafe.Drink").sugar == 5


# The same on the command line, after a file that is right.
BINDINGS = {
    "macro": ("SUGER=1", "SUGER is set but nothing uses it.*did you mean SUGAR"),
    "parameter": ("cafe.Drink.suger=1", "did you mean sugar"),
    "class": ("cafe.Drnk.sugar=1", "did you mean cafe.Drink"),
    "not imported": ("coffee.Drink.sugar=1", "no module coffee is imported"),
    "type": ("SUGAR=lots", "'lots'.*a whole number"),
    "number": ("SUGAR=1.2.3", "cannot read"),
    "small letters": ("SUGAR=true", "write True"),
    "unbalanced": ("SUGAR=[1", "cannot read"),
    "nothing": ("SUGAR=", "cannot read"),
    "name": ("SUG AR=1", "cannot read"),
}


@pytest.mark.parametrize("kind", BINDINGS)
def test_a_mistake_on_the_command_line_is_named(parse: Parse, kind: str) -> None:
    binding, message = BINDINGS[kind]
    with pytest.raises(ConfigError, match=f"(?s){message}") as error:
        parse(HEAD + "cafe.Drink.sugar = %SUGAR\nSUGAR = 1\n", binding)
    assert error.value.where == f"--gin.{binding}"


@given(data=st.data())
def test_every_single_edit_of_a_name_is_caught_with_the_right_hint(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["TRAIN_STEPS", "BATCH_SIZE", "LEARNING_RATE"]))
    at = data.draw(st.integers(1, len(name) - 1))
    letter = data.draw(st.sampled_from("ABCXYZ_"))
    edited = data.draw(st.sampled_from([name[:at] + name[at + 1 :], name[:at] + letter + name[at:]]))
    uses = "cafe.Table.note = (%TRAIN_STEPS, %BATCH_SIZE, %LEARNING_RATE)\ncafe.Table.number = 1\n"
    text = HEAD + uses + "TRAIN_STEPS = 1\nBATCH_SIZE = 2\nLEARNING_RATE = 3\n"
    with pytest.raises(ConfigError, match=f"did you mean {name}\\?"):
        parse_text(tmp_path_factory.mktemp("edit"), text, f"{edited}=1")


def test_what_has_no_effect_is_known_and_refused_on_the_command_line(parse: Parse) -> None:
    text = HEAD + "cafe.Table.number = 1\ncafe.Drink.sugar = %SUGAR\nSUGAR = 1\n"
    parse(text)
    assert config.unused("cafe.Table") == ("recipe.gin:4", "recipe.gin:5")
    assert config.build("cafe.Table").number == 1
    for binding in ("cafe.Drink.milk=True", "SUGAR=2"):
        parse(text, binding)
        with pytest.raises(ConfigError, match=f"{binding.split('=')[0]} has no effect: cafe.Table is built without it"):
            config.build("cafe.Table")
    parse(text + "cafe.Table.drinks = [%FIRST]\nFIRST = @cafe.Drink()\n", "cafe.Drink.milk=True")
    assert config.unused("cafe.Table") == () and config.build("cafe.Table").drinks[0].milk


def test_required_macros_can_be_given(parse: Parse) -> None:
    text = HEAD + "cafe.Table.number = %N\nN = %gin.REQUIRED\n"
    with pytest.raises(ConfigError, match="not set: N") as error:
        parse(text)
    assert error.value.mend == "--gin.N=..."
    parse(text, "N=3")
    assert config.build("cafe.Table").number == 3


@pytest.mark.parametrize(
    "number, message", [(-1, "^table -1 does not exist$"), (100, "cafe.Table cannot be built: too many tables")]
)
def test_what_a_constructor_refuses_is_told_plainly(parse: Parse, number: int, message: str) -> None:
    parse(HEAD + f"cafe.Table.number = {number}\n")
    with pytest.raises(ConfigError, match=message):
        config.build("cafe.Table")


def test_a_missing_argument_is_told_plainly(parse: Parse) -> None:
    parse(HEAD + "cafe.Table.note = 1\n")
    with pytest.raises(ConfigError, match="cafe.Table cannot be built.*number"):
        config.build("cafe.Table")
    with pytest.raises(ConfigError, match="does not set up cafe.Tabel") as error:
        config.build("cafe.Tabel")
    assert "cafe.Table" in error.value.mend


def test_a_file_that_is_not_text_is_told_plainly(tmp_path: Path) -> None:
    (tmp_path / "recipe.gin").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ConfigError, match="cannot read a gin file"):
        config.parse(config.Flags(gin_files=(str(tmp_path / "recipe.gin"),)))
