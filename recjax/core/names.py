"""What the names of one gin file refer to, with a hint when one refers to nothing.

A file knows the modules it imports and nothing else: no registry is filled behind its back, and what one file
imports is not visible in the next. It does not import gin: it is handed the statements and the means to import.
"""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from recjax.core.flags import did_you_mean

DYNAMIC = "__gin__.dynamic_registration"


class Mistake(SyntaxError):
    """A mistake found while a statement is parsed; a SyntaxError, because gin's parser passes those on as they are."""

    def __init__(self, what: str, *, expected: str = "", mend: str = "") -> None:
        super().__init__(what)
        self.expected, self.mend = expected, mend


@runtime_checkable
class Import(Protocol):
    """An import statement of a gin file."""

    @property
    def module(self) -> str: ...
    @property
    def is_from(self) -> bool: ...
    @property
    def alias(self) -> str | None: ...
    def bound_name(self) -> str: ...


class Names:
    """The modules that one file imported, by the name they have in it."""

    def __init__(self) -> None:
        self.dynamic = False
        self.modules: dict[str, Any] = {}

    def add(self, statement: Import, process: Callable[[Any], None]) -> None:
        """Import a module by `process` and bind its name; raises `Mistake` when it does not exist or cannot load."""
        try:
            process(statement)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{statement.module}.".startswith(f"{error.name}."):
                raise Mistake(f"{statement.module} cannot be imported: {error}") from error
            parent, _, last = error.name.rpartition(".")
            near = did_you_mean(last, _submodules(parent))
            raise Mistake(f"no module {error.name}", expected="a module, not a class or function", mend=near) from None
        except ImportError as error:
            raise Mistake(f"{statement.module} cannot be imported: {error}") from error
        if statement.module == DYNAMIC:
            self.dynamic = True
        else:
            self.modules[statement.bound_name()] = statement

    def resolve(self, selector: str) -> Any:
        """The class or function that `selector` names; raises `Mistake`."""
        if not self.dynamic:
            begin = "begin the file with `from __gin__ import dynamic_registration`"
            raise Mistake(f"{selector} is not known here", mend=f"{begin} and import its module")
        first, *others = selector.split(".")
        if first not in self.modules:
            known = sorted(self.modules)
            near = did_you_mean(first, known) or f"import the module of {first}"
            raise Mistake(f"no module {first} is imported", expected=", ".join(known), mend=near)
        statement = self.modules[first]
        value = sys.modules[statement.module if statement.is_from or statement.alias else first]
        path = first
        for name in others:
            if not hasattr(value, name):
                raise Mistake(f"{path} has no {name}", mend=did_you_mean(f"{path}.{name}", _members(path, value)))
            value, path = getattr(value, name), f"{path}.{name}"
        if not callable(value):
            raise Mistake(f"{selector} cannot be configured", expected="a class or a function")
        return value


def _members(path: str, value: Any) -> list[str]:
    found = getattr(value, "__dict__", {}).items()
    return [f"{path}.{k}" for k, v in found if not k.startswith("_") and (callable(v) or inspect.ismodule(v))]


def _submodules(package: str) -> list[str]:
    path = getattr(sys.modules.get(package), "__path__", None)
    return [module.name for module in pkgutil.iter_modules(path)] if package else []
