"""Who may import whom. Data flows down the tree and never back up; heavy libraries stay where their job is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "recjax"

# Messages and files: the parts of core that know no jax.
FILES_AND_ERRORS = ("core.errors", "core.folder", "core.artifact", "core.remote")

# A folder of recjax, and what of recjax it may import besides itself. Entry points (recjax/*.py) may import all.
INSIDE = {
    "core": (),
    "nn": ("core",),
    "index": ("core",),
    "decode": ("core",),
    "losses": ("core.errors", "core.sharding", "core.rows"),
    "metrics": ("core.errors", "core.sharding"),
    "models": ("core", "nn"),
    "bridge": ("core", "models", "nn"),
    "launch": ("core",),
    "data": FILES_AND_ERRORS,
    "prompts": ("core.errors", "data"),
    "tasks": (*FILES_AND_ERRORS, "data", "prompts"),
    "serve": (*FILES_AND_ERRORS, "data.ranker_features", "data.raw", "data.text", "data.vocab", "index", "prompts"),
    "baselines": (*FILES_AND_ERRORS, "data", "index", "metrics"),
    # An entry point with files of its own.
    "study": (
        *("core", "data", "losses", "models", "nn", "command", "cli", "evaluate", "evaluation", "plots", "prepare"),
        *("recipe", "result_files", "tables", "train", "trained"),
    ),
}
# Files that may import more than their folder.
MORE = {"launch/__main__.py": ("cli",), "serve/__main__.py": ("cli",)}

# A library, and who may import it: a file, a folder "x/", or the entry points "*".
OUTSIDE = {
    "gin": ("core/config.py",),
    "jax": (
        "core/",
        "nn/",
        "index/",
        "bridge/",
        "decode/",
        "losses/",
        "metrics/",
        "models/",
        "baselines/",
        "serve/",
        "launch/",
        "data/pipeline.py",
        "*",
    ),
    "flax": ("core/module.py", "nn/", "models/", "bridge/t5x.py"),
    "optax": ("core/",),
    "orbax": ("core/",),
    "apache_beam": ("data/beam.py", "data/beam_runner.py"),
    "grain": ("data/pipeline.py", "data/shards.py"),
    "array_record": ("data/shards.py",),
    "tensorflow": ("tasks/seqio_bridge.py", "data/tfds_import.py", "export_saved_model.py"),
    "tensorflow_datasets": ("data/tfds_import.py",),
    "seqio": ("tasks/seqio_bridge.py",),
    "sentencepiece": ("data/text.py", "data/piece_words.py"),
    "bm25s": ("index/bm25.py",),
    "faiss": ("index/approximate.py",),
    "fastapi": ("serve/",),
    "uvicorn": ("serve/",),
    "fsspec": ("core/remote.py",),
    "tensorstore": ("bridge/",),
    "tokenizers": ("bridge/", "data/text_json.py"),
    "torch": (),
    "transformers": (),
}
# Libraries that are imported when they are needed, never when a module is.
INSIDE_FUNCTIONS = (
    "tensorflow",
    "tensorflow_datasets",
    "seqio",
    "sentencepiece",
    "tokenizers",
    "bm25s",
    "faiss",
    "matplotlib",
    "uvicorn",
    "fsspec",
)
# Modules that answer at once, so that a mistake on the command line does not wait for jax.
LIGHT = ("cli", "list", "core.errors", "core.flags", "core.fits", "core.names")


class Import(NamedTuple):
    line: int
    module: str
    later: bool


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file; `from a import b` counts as `a.b`, which may be a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    blocks += [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    inside = {id(node) for block in blocks for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (Import(node.lineno, name, id(node) in inside) for name in names)


def covers(allowed: str, module: str) -> bool:
    return module == allowed or module.startswith(f"{allowed}.")


def may_use(file: str, place: str) -> bool:
    """Whether `place` of the table covers the file."""
    return file == place or (place.endswith("/") and file.startswith(place)) or (place == "*" and "/" not in file)


def broken_rules(path: Path, file: str) -> list[str]:
    folder = file.partition("/")[0] if "/" in file else None
    found = []
    for line, module, later in imports(path):
        library, _, rest = module.partition(".")
        if library == "recjax" and folder is not None and rest not in ("", "__version__"):
            allowed = (folder, *INSIDE[folder], *MORE.get(file, ()))
            if not any(covers(a, rest) for a in allowed):
                found.append(f"{file}:{line} imports {module}; {folder} may import {', '.join(allowed)}")
        if library in OUTSIDE and not any(may_use(file, place) for place in OUTSIDE[library]):
            found.append(f"{file}:{line} imports {library}; only {', '.join(OUTSIDE[library]) or 'no file'} may")
        if library in INSIDE_FUNCTIONS and not later:
            found.append(f"{file}:{line} imports {library} before it is needed")
    return found


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_imports_follow_the_table(file: str) -> None:
    assert broken_rules(PACKAGE / file, file) == []


def test_every_folder_is_in_the_table() -> None:
    assert {file.partition("/")[0] for file in FILES if "/" in file} == set(INSIDE)


@pytest.mark.parametrize(
    "file, text, broken",
    [
        ("models/x.py", "from recjax.losses import objective", True),
        ("models/x.py", "import recjax.nn.embed", False),
        ("losses/x.py", "from recjax.core import sharding", False),
        ("losses/x.py", "from recjax.core import module", True),
        ("losses/x.py", "def f():\n    from recjax.models import sequence", True),
        ("data/x.py", "import jax.numpy as jnp", True),
        ("data/pipeline.py", "import jax.numpy as jnp", False),
        ("tasks/seqio_bridge.py", "import seqio", True),
        ("tasks/seqio_bridge.py", "def f():\n    import seqio", False),
        ("train.py", "def f():\n    import tensorflow as tf", True),
        ("train.py", "import gin", True),
        ("train.py", "from recjax.serve import bundle", False),
    ],
)
def test_the_table_tells_right_from_wrong(tmp_path: Path, file: str, text: str, broken: bool) -> None:
    (tmp_path / "x.py").write_text(text)
    assert bool(broken_rules(tmp_path / "x.py", file)) == broken


def test_light_modules_load_without_heavy_ones() -> None:
    heavy = {"jax", "flax", "gin", "numpy", "polars", "rich", "tensorflow"}
    code = f"import sys, {', '.join(f'recjax.{m}' for m in LIGHT)}\nprint(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_that_trains_loads_tensorflow() -> None:
    """Importing every module but those that exist for TensorFlow leaves it alone, also through libraries."""
    modules = [f"recjax.{file.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__") for file in FILES]
    code = "\n".join(f"import {module}" for module in modules if not module.endswith("__main__"))
    check = "import sys; print(sorted({'tensorflow', 'seqio', 'tensorflow_datasets', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
