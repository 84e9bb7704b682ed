"""Whether a literal of a recipe fits the annotation of the parameter it is bound to.

Only mistakes are refused: an annotation that says nothing about literals (a protocol, an array, a type variable)
fits everything, and a list fits where a tuple is asked for, since gin users write both.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import inspect
import types
import typing
from typing import Any


def parameters_of(target: Any) -> list[str] | None:
    """Names of the arguments of a class or function, or None when it takes any (`**kwargs`)."""
    parameters = list(inspect.signature(_function_of(target)).parameters.values())
    if inspect.isclass(target):
        parameters = parameters[1:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]


def hints_of(target: Any) -> dict[str, Any]:
    """Annotations of the arguments of a class or function; empty where they cannot be evaluated."""
    try:
        return typing.get_type_hints(target if dataclasses.is_dataclass(target) else _function_of(target))
    except Exception:  # an annotation may name anything, also what is imported for type checkers only
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` may be bound where `hint` is expected; what is not a literal always may."""
    if not isinstance(value, _LITERALS):
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint in _SCALARS:
        accepted = (int, float) if hint is float else hint
        return isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    if hint is type(None):
        return value is None
    kind = origin or hint
    if not inspect.isclass(kind) or kind is object:
        return True
    if issubclass(kind, dict) or kind is collections.abc.Mapping:
        if not isinstance(value, dict) or len(arguments) != 2:
            return isinstance(value, dict)
        return all(fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in value.items())
    if issubclass(kind, tuple | list) or kind in (collections.abc.Sequence, collections.abc.Iterable):
        if not isinstance(value, tuple | list):
            return False
        if kind is tuple and arguments and arguments[-1] is not ...:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return not arguments or all(fits(v, arguments[0]) for v in value)
    if dataclasses.is_dataclass(kind) or issubclass(kind, enum.Enum) or kind is collections.abc.Callable:
        return False
    return True


def takes_classes(hint: Any) -> bool:
    """Whether a class itself, not an object of it, may be bound here, alone or in a list."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType, tuple, list, collections.abc.Sequence, collections.abc.Iterable):
        return any(takes_classes(option) for option in arguments if option is not ...)
    kind = origin or hint
    return not inspect.isclass(kind) or kind in (Any, object, type, collections.abc.Callable)


def describe(hint: Any) -> str:
    """An annotation as a user would say it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    words = {int: "a whole number", float: "a number", str: "text in quotes", bool: "True or False", type(None): "None"}
    if hint in words:
        return words[hint]
    if dataclasses.is_dataclass(hint):
        return f"@{getattr(hint, '__name__', hint)}()"
    return (
        str(hint).replace("typing.", "").replace("collections.abc.", "")
        if origin
        else getattr(hint, "__name__", str(hint))
    )


_SCALARS = (int, float, str, bool)
_LITERALS = (*_SCALARS, type(None), tuple, list, dict)


def _function_of(target: Any) -> Any:
    # Not inspect.signature of the class: flax modules have a metaclass whose call takes anything.
    return target.__init__ if inspect.isclass(target) else target
