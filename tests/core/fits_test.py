"""Literals of the annotated type fit, others do not, and what cannot be judged is let through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Array, Float

from recjax.core import fits


@dataclasses.dataclass(frozen=True)
class Thing:
    size: int = 0


class Shape(Protocol):
    def area(self) -> float: ...


FITTING: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers()),
    (float, st.floats() | st.integers()),
    (bool, st.booleans()),
    (str, st.text()),
    (int | None, st.none() | st.integers()),
    (Literal["a", "b"], st.sampled_from("ab")),
    (tuple[int, ...], st.lists(st.integers()) | st.lists(st.integers()).map(tuple)),
    (tuple[int, str], st.tuples(st.integers(), st.text())),
    (Sequence[float], st.lists(st.integers() | st.floats())),
    (Mapping[str, int], st.dictionaries(st.text(), st.integers())),
    (dict, st.dictionaries(st.text(), st.integers())),
    (Any, st.integers() | st.text() | st.lists(st.integers())),
    (object, st.integers() | st.text()),
    (Path, st.text()),
    (Float[Array, "b l"], st.floats()),
]
REFUSED: list[tuple[Any, Any]] = [
    (int, 1.0),
    (int, True),
    (int, "1"),
    (int, None),
    (float, "1"),
    (float, False),
    (bool, 1),
    (str, 1),
    (int | None, "x"),
    (Literal["a", "b"], "c"),
    (tuple[int, ...], (1, "x")),
    (tuple[int, ...], 1),
    (tuple[int, str], (1,)),
    (Sequence[float], "text"),
    (Mapping[str, int], {"a": "b"}),
    (Mapping[str, int], {1: 1}),
    (Mapping[str, int], [1]),
    (Thing, "thing"),
    (Thing | None, 3),
    (Sequence[Thing], ["thing"]),
    (Callable[..., int], "f"),
]


@given(data=st.data())
def test_literals_of_the_type_fit(data: st.DataObject) -> None:
    hint, values = data.draw(st.sampled_from(FITTING))
    assert fits.fits(data.draw(values), hint)


@pytest.mark.parametrize("hint, value", REFUSED, ids=str)
def test_others_do_not_and_the_expected_type_can_be_said(hint: Any, value: Any) -> None:
    assert not fits.fits(value, hint)
    assert fits.describe(hint)


def test_what_is_no_literal_is_never_judged() -> None:
    assert fits.fits(Thing(), int) and fits.fits(len, str) and fits.fits([Thing()], Sequence[int])
    assert fits.fits(3, Shape)


def test_classes_fit_where_something_is_called_or_nothing_is_said() -> None:
    for hint in (Callable[..., Thing], Callable[..., Thing] | None, type, type[Thing], Any, list[Callable[[], int]]):
        assert fits.takes_classes(hint), hint
    for hint in (Thing, Thing | None, Sequence[Thing], tuple[Thing, ...], Shape, int):
        assert not fits.takes_classes(hint), hint


def test_parameters_of_classes_functions_and_open_signatures() -> None:
    def open_ended(a: int, **rest: int) -> None: ...

    def plain(a: int, *others: int, b: str = "") -> None: ...

    assert fits.parameters_of(Thing) == ["size"]
    assert fits.parameters_of(plain) == ["a", "b"]
    assert fits.parameters_of(open_ended) is None
    assert fits.hints_of(Thing)["size"] is int
