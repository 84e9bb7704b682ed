"""From gin files to one configured object; the only file that imports gin.

gin lets a misspelt macro or scope pass silently, keeps state between parses and reports mistakes as tracebacks. Here
every name is checked against what it refers to: a mistake is a `ConfigError` that says where it is and which known
name is nearest. Library code carries no gin decorators; a recipe begins with
`from __gin__ import dynamic_registration`, imports modules and binds what it finds in them. Arithmetic and conditions
have no place in a recipe: derive values in Python.

gin's state is one per process: `parse` replaces all of it, `build` and `snapshot` speak of the last parse.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gin
from gin import config as gin_config
from gin import config_parser

from recjax.core.errors import ConfigError, RecjaxError
from recjax.core.fits import describe, fits, hints_of, parameters_of, takes_classes
from recjax.core.flags import Flags, did_you_mean, find_file, parse_argv, recipe_files
from recjax.core.names import DYNAMIC, Mistake, Names

__all__ = ["Flags", "Parsed", "Snapshot", "build", "parse", "parse_argv", "recipe_files", "snapshot", "unused"]

_MACRO = re.compile(r"[A-Z][A-Z0-9_]*")
# What may stand on a command line without quotes: it looks neither like a number nor like gin syntax.
_BARE_WORD = re.compile(r"[A-Za-z_/.~][^'\"\[\](){}@%]*")
_TYPOS = {"true": "True", "false": "False", "none": "None", "null": "None"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parsed:
    """What was parsed: the files with their includes, in order, and the final value of each macro that is a literal."""

    files: tuple[Path, ...]
    macros: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The configuration as gin files that parse to the same again."""

    config: str  # everything that was bound
    operative: str  # what was used while building, defaults included


def parse(flags: Flags) -> Parsed:
    """Read the files and bindings of a command line in place of any earlier configuration.

    Raises `ConfigError` for a file that is missing or cannot be read, for an unknown module, name, parameter, macro or
    scope, for a value of another type than its parameter, for a macro that nothing uses and for one left REQUIRED.
    """
    gin.clear_config()
    reader = _Reader(flags.search_paths)
    _CURRENT[:] = [reader]
    for name in flags.gin_files:
        reader.read_file(find_file(name, flags.search_paths, where=f"--gin_file={name}"))
    for binding in flags.bindings:
        reader.read_binding(binding)
    reader.check(flags.unused_macros)
    literal = {k: b.value for k, b in reader.macros.items() if not any(gin_config.iterate_references([b.value]))}
    return Parsed(files=tuple(reader.files), macros=literal)


def build(name: str = "recipe.Recipe") -> Any:
    """Call the class or function `name` (the end of its full name) with what the configuration binds for it.

    Raises `ConfigError` when it is not configured, when an argument is missing, when a value is refused, or when a
    binding of the command line sets something that is not part of `name`.
    """
    full = _full(name)
    for where in unused(name):
        if where.startswith("--gin."):
            raise ConfigError(f"{where.partition('=')[0]} has no effect: {name} is built without it", where=where)
    try:
        return gin.get_configurable(full)()
    except RecjaxError as error:
        # gin raises a copy that appends its own call stack; the message of the original says it all.
        origin: BaseException = error
        while isinstance(origin.__context__, RecjaxError):
            origin = origin.__context__
        raise origin from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} cannot be built: {str(error).splitlines()[0]}", where=_call_of(error)) from error


def unused(name: str = "recipe.Recipe") -> tuple[str, ...]:
    """Places of the bindings that have no effect on `build(name)`: nothing refers to what they set.

    A shared file may well say more than one recipe uses; a recipe of its own that does so is mistaken.
    """
    return _CURRENT[0].unused(_full(name))


def snapshot() -> Snapshot:
    """The configuration last parsed, as text."""
    return Snapshot(config=gin.config_str(120), operative=gin.operative_config_str(120))


def _full(name: str) -> str:
    known = sorted(_CURRENT[0].objects) if _CURRENT else []
    found = [k for k in known if f".{k}".endswith(f".{name}")]
    if len(found) != 1:
        raise ConfigError(
            f"the configuration {'has more than one' if found else 'does not set up'} {name}",
            expected=", ".join(found or known) or "a gin file that does (--gin_file=FILE)",
            mend=did_you_mean(name, known),
        )
    return found[0]


_CURRENT: list[_Reader] = []


class _Binding(NamedTuple):
    value: Any
    where: str
    given: int  # by which of the files and bindings of the command line


class _Delegate(gin_config.ParserDelegate):
    """Resolves the names inside values, with hints."""

    def __init__(self, names: Names) -> None:
        super().__init__()
        self._names = names

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        self._names.resolve(scoped_selector.rpartition("/")[2])
        return super().configurable_reference(scoped_selector, evaluate)


class _SyntaxOnly(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
        return None

    def macro(self, macro_name: str) -> None:
        return None


class _Reader:
    """Statements in the order they are read, each remembered with the place it stands at."""

    def __init__(self, search_paths: Iterable[str]) -> None:
        self.files: list[Path] = []
        self.macros: dict[str, _Binding] = {}
        self.bindings: dict[tuple[str, str, str], _Binding] = {}
        self.objects: dict[str, Any] = {}
        self._replaced: list[_Binding] = []
        self._given = 0
        self._search = tuple(search_paths)
        self._open: list[Path] = []
        self._imports: dict[str, config_parser.ImportStatement] = {}

    def read_file(self, path: Path) -> None:
        resolved, shown = path.resolve(), _shown(path)
        if resolved in self._open:
            raise ConfigError("a gin file includes itself", where=" -> ".join(map(_shown, [*self._open, resolved])))
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("cannot read a gin file", where=shown, expected="UTF-8 text") from error
        self.files.append(path)
        self._given += not self._open
        self._open.append(resolved)
        names = Names()
        with gin_config._parse_scope() as context:
            self._read(text, names, context, lambda line: f"{shown}:{line}")
            gin_config._IMPORTS.update(context.imports)  # gin writes these into a snapshot
        self._imports.update(names.modules)
        self._open.pop()

    def read_binding(self, binding: str) -> None:
        """A binding of the command line, in which names mean what they mean in the files."""
        name, _, value = binding.partition("=")
        self._given += 1
        where = f"--gin.{binding}"
        names = Names()
        with gin_config._parse_scope() as context:
            if self._imports:
                names.add(_import_statement(DYNAMIC), context.process_import)
                for statement in self._imports.values():
                    names.add(statement, context.process_import)
            self._read(f"{name} = {_quoted(value, where)}", names, context, lambda line: where)

    def _read(self, text: str, names: Names, context: gin_config.ParseContext, where: Callable[[int], str]) -> None:
        parser: Any = None
        line = 0
        try:
            parser = config_parser.ConfigParser(io.StringIO(text), _Delegate(names))
            while True:
                line = 0
                statement = parser.parse_statement()
                if statement is None:
                    return
                line = statement.location.line_num
                if isinstance(statement, config_parser.ImportStatement):
                    names.add(statement, context.process_import)
                elif isinstance(statement, config_parser.IncludeStatement):
                    self.read_file(find_file(statement.filename, self._search, where=where(line)))
                elif isinstance(statement, config_parser.BlockDeclaration):
                    names.resolve(statement.selector)
                else:
                    self._bind(statement, names, context, where(line))
        except (SyntaxError, ValueError, tokenize.TokenError) as error:
            raise _readable(error, where(line or _line_of(error, parser))) from error.__cause__

    def _bind(self, statement: Any, names: Names, context: gin_config.ParseContext, where: str) -> None:
        scope, selector, parameter, value, _ = statement
        if not parameter:
            name = f"{scope}/{selector}" if scope else selector
            if not _MACRO.fullmatch(name):
                raise Mistake(
                    f"{name} is neither a parameter nor a macro",
                    expected="module.Class.parameter = VALUE, or a macro in UPPER_CASE",
                    mend=did_you_mean(name, self.macros),
                )
            gin.bind_parameter((name, "gin.macro", "value"), value)
            self._note_replaced(self.macros.get(name))
            self.macros[name] = _Binding(value, where, self._given)
            return
        target = names.resolve(selector)
        known = parameters_of(target)
        if known is not None and parameter not in known:
            near = did_you_mean(parameter, known)
            raise Mistake(f"{selector} has no parameter {parameter}", expected=", ".join(known), mend=near)
        gin.bind_parameter((scope, selector, parameter), value)
        configurable: Any = context.get_configurable(selector)
        full = configurable.selector
        self.objects[full] = target
        key = (scope, full, parameter)
        self._note_replaced(self.bindings.get(key))
        self.bindings[key] = _Binding(value, where, self._given)

    def _note_replaced(self, binding: _Binding | None) -> None:
        """Remember what another file or the command line replaces: the macros that it used are not there in vain."""
        if binding is not None and binding.given != self._given:
            self._replaced.append(binding)

    def check(self, unused_macros: Iterable[str]) -> None:
        """Judge what depends on the whole: of several bindings of one name only the last counts."""
        used: dict[str, str] = {}
        scopes: set[str] = set()
        for binding in self.bindings.values():
            for reference in self._references(binding.value):
                name = _macro_name(reference)
                if name is None:
                    scopes.update(reference.scopes)
                    self.objects.setdefault(reference.configurable.selector, reference.configurable.wrapped)
                else:
                    used.setdefault(name, binding.where)
        self._check_macros(used, unused_macros)
        for (scope, full, parameter), binding in self.bindings.items():
            lost = [part for part in scope.split("/") if part and part not in scopes]
            if lost:
                near = did_you_mean(lost[0], scopes)
                raise ConfigError(f"nothing is ever built in the scope {lost[0]}/", where=binding.where, mend=near)
            self._check_value(full, parameter, binding)

    def unused(self, root: str) -> tuple[str, ...]:
        """Places of the bindings and macros that nothing reached from `root` refers to."""
        reached: set[str] = set()
        used: set[str] = set()
        waiting = [root]
        while waiting:
            full = waiting.pop()
            if full in reached:
                continue
            reached.add(full)
            for binding in (b for (_, owner, _), b in self.bindings.items() if owner == full):
                for reference in self._references(binding.value):
                    name = _macro_name(reference)
                    waiting.extend([reference.configurable.selector] if name is None else [])
                    used.update([name] if name else [])
        lost = [b for (_, full, _), b in self.bindings.items() if full not in reached]
        lost += [b for name, b in self.macros.items() if name not in used]
        return tuple(b.where for b in lost)

    def _references(self, value: Any) -> Iterator[Any]:
        """The references inside a value and inside the macros it uses, macros included."""
        seen: set[str] = set()
        waiting = [value]
        while waiting:
            for reference in gin_config.iterate_references([waiting.pop()]):
                name = _macro_name(reference)
                if name == "gin.REQUIRED" or name in seen:
                    continue
                yield reference
                if name is not None:
                    seen.add(name)
                    waiting.extend([self.macros[name].value] if name in self.macros else [])

    def _check_macros(self, used: dict[str, str], unused: Iterable[str]) -> None:
        for name, where in used.items():
            if name not in self.macros:
                near = did_you_mean(name, self.macros) or f"set {name}"
                raise ConfigError(f"the macro {name} is used but never set", where=where, mend=near)
        before = {name for b in self._replaced for r in self._references(b.value) if (name := _macro_name(r))}
        for name, binding in self.macros.items():
            if name not in (*used, *before, *unused):
                raise ConfigError(
                    f"the macro {name} is set but nothing uses it",
                    where=binding.where,
                    expected="one of " + ", ".join(sorted(used)) if used else "",
                    mend=did_you_mean(name, used),
                )
        named = self.macros | {".".join([*full.split(".")[-2:], k]): b for (_, full, k), b in self.bindings.items()}
        unset = {name: binding.where for name, binding in named.items() if _macro_name(binding.value) == "gin.REQUIRED"}
        if unset:
            raise ConfigError(
                "not set: " + ", ".join(unset),
                where=", ".join(dict.fromkeys(unset.values())),
                mend=" ".join(f"--gin.{name}=..." for name in unset),
            )

    def _check_value(self, full: str, parameter: str, binding: _Binding) -> None:
        passed: list[str] = []
        while name := _macro_name(binding.value):
            if name in passed:
                raise ConfigError(f"the macro {name} is set to itself", where=binding.where)
            passed.append(name)
            binding = self.macros[name]
        value = binding.value
        hint = hints_of(self.objects[full]).get(parameter, Any)
        if not fits(value, hint):
            name = ".".join([*full.split(".")[-2:], parameter])
            raise ConfigError(f"{name} = {value!r}", where=binding.where, expected=describe(hint))
        for reference in gin_config.iterate_references([value]):
            if _macro_name(reference) or reference.evaluate or takes_classes(hint):
                continue
            configurable: Any = reference.configurable
            if dataclasses.is_dataclass(configurable.wrapped):
                what = f"{reference!r} is a class where an object of it is needed"
                raise ConfigError(what, where=binding.where, mend=f"write {reference!r}()")


def _readable(error: Exception, where: str) -> ConfigError:
    """What gin's parser, or a look-up in a value, has to say."""
    if isinstance(error, Mistake):
        return ConfigError(error.msg, where=where, expected=error.expected, mend=error.mend)
    expected = "NAME = VALUE, the value a Python literal, @reference or %MACRO"
    if isinstance(error, SyntaxError):
        source = (error.text or "").strip()
        mend = "put quotes around text" if "parse token" in error.msg else error.msg
        return ConfigError(f"cannot read {source or 'the gin syntax'}", where=where, expected=expected, mend=mend)
    if isinstance(error, tokenize.TokenError):
        return ConfigError(f"cannot read the value: {error.args[0]}", where=where, expected=expected)
    return ConfigError(str(error).splitlines()[0], where=where)


def _line_of(error: Exception, parser: Any) -> int:
    """The line that was being parsed."""
    if isinstance(error, SyntaxError) and error.lineno:
        return error.lineno
    if isinstance(error, tokenize.TokenError):
        return error.args[1][0]
    return parser.current_token.start[0] if parser else 1


def _quoted(value: str, where: str) -> str:
    """A value of the command line as gin reads it: text may be given without quotes when it is nothing else."""
    if value.strip().lower() in _TYPOS and value.strip() not in _TYPOS.values():
        raise ConfigError(f"cannot read {value}", where=where, mend=f"write {_TYPOS[value.strip().lower()]}")
    try:
        config_parser.ConfigParser(f"X = {value}", _SyntaxOnly()).parse_statement()
        return value
    except (SyntaxError, tokenize.TokenError):
        return repr(value) if _BARE_WORD.fullmatch(value) else value


def _macro_name(value: Any) -> str | None:
    """X when `value` is the reference `%X`."""
    is_macro = isinstance(value, gin_config.ConfigurableReference) and repr(value).startswith("%")
    return repr(value)[1:] if is_macro else None


def _shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _import_statement(module: str) -> config_parser.ImportStatement:
    return config_parser.ImportStatement(module, True, None, config_parser.Location(None, 0, None, ""))


def _call_of(error: BaseException) -> str:
    found = re.findall(r"In call to configurable '([^']+)'", str(error))
    return " <- ".join(found)
