"""Flags are separated without loss, and files and recipes are found where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recjax.core import flags
from recjax.core.errors import ConfigError

text = st.text("abcXYZ019_./=,'- ", min_size=1)
name = st.from_regex(r"[A-Za-z_][\w./]*", fullmatch=True)
others = st.one_of(text.filter(lambda w: not w.startswith("-")), name.map("--{}".format)).filter(
    lambda w: not w.startswith("--gin")
)


@given(
    words=st.lists(
        st.one_of(
            st.tuples(st.just("file"), text.filter(lambda t: not t.startswith("-"))),
            st.tuples(st.just("binding"), st.builds("{}={}".format, name, text)),
            st.tuples(st.just("rest"), others),
        )
    ),
    joined=st.booleans(),
)
def test_every_word_ends_in_its_place_and_order_is_kept(words: list[tuple[str, str]], joined: bool) -> None:
    argv: list[str] = []
    for kind, word in words:
        if kind == "file":
            argv += [f"--gin_file={word}"] if joined else ["--gin_file", word]
        else:
            argv.append(f"--gin.{word}" if kind == "binding" else word)
    parsed = flags.parse_argv(argv)
    assert parsed.gin_files == tuple(word for kind, word in words if kind == "file")
    assert parsed.bindings == tuple(word for kind, word in words if kind == "binding")
    assert parsed.rest == tuple(word for kind, word in words if kind == "rest")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--gin_fil=x"], "did you mean --gin_file"),
        (["--gin_serach_paths=x"], "did you mean --gin_search_paths"),
        (["--gin.SEED", "1"], "--gin.NAME=VALUE"),
        (["--gin.=1"], "--gin.NAME=VALUE"),
        (["--gin_file"], "has no value"),
        (["--gin_file="], "has no value"),
    ],
)
def test_gin_flags_that_cannot_be_read(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flags.parse_argv(argv)


def test_search_paths_come_between_the_current_folder_and_the_shipped_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "yours"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.gin").write_text("")
    paths = flags.parse_argv(["--gin_search_paths=yours,mine"]).search_paths
    assert flags.find_file("a.gin", paths) == Path("yours/a.gin")
    (tmp_path / "a.gin").write_text("")
    assert flags.find_file("a.gin", paths) == Path("a.gin")
    assert flags.find_file(str(tmp_path / "mine" / "a.gin")).parent.name == "mine"
    with pytest.raises(ConfigError, match="no gin file mine"):
        flags.find_file("mine")


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    for system, files in {
        "alpha": ["10_last.gin", "2_second.gin", "1_first.gin", "notes.gin", "README.md"],
        "beta": ["1_train.gin"],
        "empty": [],
    }.items():
        (tmp_path / "recipe" / system).mkdir(parents=True)
        for file in files:
            (tmp_path / "recipe" / system / file).write_text("")
    return tmp_path


def test_stages_come_in_the_order_of_their_numbers(recipes: Path) -> None:
    assert [p.stem for p in flags.recipe_files("alpha", recipes)] == ["1_first", "2_second", "10_last"]
    for one in ("alpha/2", "alpha/2_second", "alpha/2_second.gin"):
        assert [p.stem for p in flags.recipe_files(one, recipes)] == ["2_second"]
    assert [p.parent.name for p in flags.all_recipe_files(recipes)] == ["alpha", "alpha", "alpha", "beta"]


@pytest.mark.parametrize(
    "name, hint", [("alfa", "alpha"), ("Beta", "beta"), ("alpha/2_secnd", "alpha/2_second"), ("empty", "recjax list")]
)
def test_an_unknown_recipe_has_a_hint(recipes: Path, name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"no recipe {name}") as error:
        flags.recipe_files(name, recipes)
    assert hint in error.value.mend


def test_no_recipes_at_all(tmp_path: Path) -> None:
    assert flags.all_recipe_files(tmp_path) == []
