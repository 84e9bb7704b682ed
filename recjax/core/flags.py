"""Flags in the manner of T5X, and where recipes are kept; no gin and no jax, so that help and listings are immediate.

    --gin_file=FILE              a gin file; may be repeated, later files win
    --gin.NAME=VALUE             a macro (`--gin.SEED=1`) or a parameter (`--gin.recipe.Recipe.seed=1`); wins over files
    --gin_search_paths=DIR,DIR   further folders in which files and their includes are looked for

A relative file is looked for in the current folder, then in the search paths, then in the recipes of this package.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from recjax.core.errors import ConfigError

_PREFIX = "RECJAX_"
_STAGE = re.compile(r"(\d+)_\w+\.gin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What a command line says about configuration; `rest` is everything else, in its order.

    `unused_macros` may be set without anything that uses them: those of other stages.
    """

    gin_files: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    search_paths: tuple[str, ...] = ()
    unused_macros: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()


def parse_argv(argv: Sequence[str]) -> Flags:
    """Separate the gin flags from the others; raises `ConfigError` for a gin flag that cannot be read."""
    files: list[str] = []
    bindings: list[str] = []
    paths: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, sep, value = word.partition("=")
        if flag in ("--gin_file", "--gin_search_paths"):
            if not sep:
                value = next(words, "")
            if not value:
                raise ConfigError(f"{flag} has no value", expected=f"{flag}=PATH")
            files.extend([value] if flag == "--gin_file" else [])
            paths.extend(filter(None, value.split(",")) if flag == "--gin_search_paths" else [])
        elif flag.startswith("--gin."):
            name = flag.removeprefix("--gin.")
            if not sep or not name:
                raise ConfigError(f"cannot read {word}", expected="--gin.NAME=VALUE, for example --gin.SEED=1")
            bindings.append(f"{name}={value}")
        elif flag.startswith(("--gin", "-gin")):
            known = ["--gin_file", "--gin_search_paths", "--gin.NAME"]
            raise ConfigError(f"no flag {flag}", expected=" or ".join(known), mend=did_you_mean(flag, known))
        else:
            rest.append(word)
    return Flags(gin_files=tuple(files), bindings=tuple(bindings), search_paths=tuple(paths), rest=tuple(rest))


def take_cluster(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without the place of this process among several, and that place as environment variables."""
    names = {"--coordinator": _PREFIX + "COORDINATOR", "--processes": _PREFIX + "NUM_PROCESSES"}
    names["--process"] = _PREFIX + "PROCESS_ID"
    if not any(word.startswith("--coordinator=") for word in argv):
        return list(argv), {}
    told = {_PREFIX + "CLUSTER_FROM_FLAGS": "1", **dict.fromkeys(names.values(), "")}
    rest = []
    for word in argv:
        flag, sep, value = word.partition("=")
        if sep and flag in names:
            told[names[flag]] = value
        else:
            rest.append(word)
    return rest, told


def config_root() -> Path:
    """The folder of the shipped gin files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def search_folders(search_paths: Iterable[str] = ()) -> list[Path]:
    """Where a relative gin file is looked for, in order."""
    root = config_root()
    return [Path(), *(Path(p).expanduser() for p in search_paths), root, root.parent]


def find_file(name: str, search_paths: Iterable[str] = (), *, where: str = "") -> Path:
    """The gin file `name`; raises `ConfigError` with the folders searched and the nearest existing name."""
    given = Path(name).expanduser()
    folders = [Path()] if given.is_absolute() else search_folders(search_paths)
    for folder in folders:
        if (folder / given).is_file():
            return folder / given
    root = config_root()
    shipped = [path.relative_to(root.parent).as_posix() for path in sorted(root.rglob("*.gin"))]
    shipped += [path.removeprefix("configs/") for path in shipped]
    raise ConfigError(
        f"no gin file {name}",
        where=where,
        expected="a file in " + ", ".join(str(folder.absolute()) for folder in folders),
        mend=did_you_mean(name, shipped) or "`recjax list` shows the recipes",
    )


def recipe_files(name: str, root: Path | None = None) -> list[Path]:
    """The stages of a recipe in order: `sasrec` names all of them, `sasrec/1` or `sasrec/1_train` one.

    Stages are the files `<number>_<stage>.gin` of `configs/recipe/<name>/`; raises `ConfigError` when there is none.
    """
    recipes = (root or config_root()) / "recipe"
    system, _, stage = name.partition("/")
    stages = _stages(recipes / system)
    if stage:
        wanted = stage.removesuffix(".gin")
        stages = [path for path in stages if wanted in (path.stem, path.stem.partition("_")[0])]
    if not stages:
        known = [f"{path.parent.name}/{path.stem}" for path in all_recipe_files(root)]
        near = did_you_mean(name, known if stage else sorted({k.partition("/")[0] for k in known}))
        raise ConfigError(f"no recipe {name}", where=str(recipes), mend=near or "`recjax list` shows the recipes")
    return stages


def all_recipe_files(root: Path | None = None) -> list[Path]:
    """Every stage of every recipe, by name and stage number."""
    recipes = (root or config_root()) / "recipe"
    folders = sorted(path for path in recipes.iterdir() if path.is_dir()) if recipes.is_dir() else []
    return [path for folder in folders for path in _stages(folder)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint with the nearest of the known names, or nothing."""
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return f"did you mean {lowered[near[0]]}?" if near else ""


def _stages(folder: Path) -> list[Path]:
    numbered = [(int(m[1]), p) for p in folder.glob("*.gin") if (m := _STAGE.fullmatch(p.name))]
    return [path for _, path in sorted(numbered)]
