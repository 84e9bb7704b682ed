"""`recjax list`: what each recipe reproduces, what it takes and what came out.

A recipe begins with a block of comments; the listing is read from there, so that it cannot drift from the file:

    # title: Self-attentive sequential recommendation
    # paper: Kang and McAuley 2018
    # data: MovieLens-1M, or the simulated world
    # command: recjax run sasrec
    # cost: 3 min on 2 cores
    # expected: recall@10 0.25
    # measured:

A stage of several may add its part in the experiment, `role:` "arm" (compared with the other arms), "main" (the arm
that is the system: the bundle and the head of the report are its) or "teacher" (only feeds later stages); `against:`,
the arm that it is compared with if that is not the first; and `infer:`, the kinds of artifact that `recjax run` writes
when it is done. Where no stage is "main", the last one that is no teacher is. A field goes on until the next one; text
before the first field belongs to none. Neither gin nor jax is needed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from recjax import cli
from recjax.core.errors import ConfigError
from recjax.core.flags import all_recipe_files, config_root, recipe_files

ROLES = ("", "arm", "main", "teacher")
_COLUMNS = ("recipe", "stage", "role", "paper", "data", "cost", "expected", "measured")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The fields at the top of a recipe, empty where not given."""

    title: str = ""
    paper: str = ""
    data: str = ""
    command: str = ""
    cost: str = ""
    expected: str = ""
    measured: str = ""
    role: str = ""
    infer: str = ""
    against: str = ""

    @property
    def compared(self) -> bool:
        """Whether the stage is an arm of an experiment."""
        return self.role in ("arm", "main")


FIELDS = tuple(field.name for field in dataclasses.fields(Header))
_FIELD = re.compile(rf"#\s*({'|'.join(FIELDS)}):\s*(.*)")


def read_header(path: Path) -> Header:
    """The header of a gin file; raises `ConfigError` for a field given twice or a file that is not text."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot read a gin file", where=str(path), expected="UTF-8 text") from error
    fields: dict[str, list[str]] = {}
    current: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.startswith("#"):
            break
        if found := _FIELD.match(line):
            if found[1] in fields:
                raise ConfigError(f"{found[1]} is given twice", where=f"{path}:{number}")
            current = fields.setdefault(found[1], [])
            line = found[2]
        current.append(line.lstrip("#").strip())
    header = Header(**{name: " ".join(filter(None, text)) for name, text in fields.items()})
    if header.role not in ROLES:
        raise ConfigError(f"a stage cannot be {header.role!r}", where=f"{path}: role", expected="arm, main or teacher")
    return header


def main_stage(headers: Mapping[str, Header]) -> str:
    """The stage that is the system, of the headers of some stages in order; raises `ConfigError` when two say so."""
    if len(mains := [name for name, header in headers.items() if header.role == "main"]) > 1:
        raise ConfigError("a recipe has one main stage", where=", ".join(mains), mend="role: arm in all others")
    learners = [name for name, header in headers.items() if header.role != "teacher"]
    return [*headers, *learners, *mains][-1]


def listing(files: Sequence[Path]) -> list[dict[str, str]]:
    """One row per stage: recipe, stage, file, and the fields of its header; the system of a recipe is its "main"."""
    root = config_root().parent
    recipes = {path.parent: recipe_files(path.parent.name, path.parents[2]) for path in files}
    mains = {folder / main_stage({p.stem: read_header(p) for p in stages}) for folder, stages in recipes.items()}
    return [
        {
            "recipe": path.parent.name,
            "stage": path.stem,
            "file": path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path),
            **dataclasses.asdict(read_header(path)),
            **({"role": "main"} if path.with_suffix("") in mains else {}),
        }
        for path in files
    ]


def main(argv: list[str]) -> int:
    """Print the recipes, or the whole header of those named."""
    parser = cli.ArgumentParser("list")
    parser.add_argument("recipe", nargs="*", help="show these alone, with everything their headers say")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    files = [path for name in options.recipe for path in recipe_files(name)] or all_recipe_files()
    rows = listing(files)
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif options.recipe:
        print("\n\n".join("\n".join(f"{k + ':':<10}{v}" for k, v in row.items() if v) for row in rows))
    elif sys.stdout.isatty():
        _print_table(rows)
    else:
        print("\n".join("\t".join(row) for row in [_COLUMNS, *([r[c] for c in _COLUMNS] for r in rows)]))
    return 0


def _print_table(rows: list[dict[str, str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*_COLUMNS, box=box.SIMPLE_HEAD, show_edge=False)
    previous = ""
    for row in rows:
        name, previous = "" if row["recipe"] == previous else row["recipe"], row["recipe"]
        table.add_row(name, *(row[c] for c in _COLUMNS[1:]))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(cli.run(main))
