"""Recipes of production size, compiled for TPU pods: what fits, and the least time of a step.

    python benchmarks/compile_table.py               # compiles what is not in results/compile.json yet
    python benchmarks/compile_table.py --render      # only writes results/compile.md anew

Every row is a `recjax compile` in a process of its own (it needs `pip install 'recjax[tpu]'`, and no TPU). The data is
the simulated world: only shapes matter. Tables have the rows that `--rows` says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from recjax.compile import summary

RESULTS = Path(__file__).parent / "results"
TABLE, ROWS = RESULTS / "compile.md", RESULTS / "compile.json"

_IMPORTS = """from __gin__ import dynamic_registration
from recjax.core import adapters
from recjax.data import pipeline
from recjax.models import seq2seq
from recjax.models import sequence
from recjax.nn import transformer
from recjax import recipe
"""
_LANGUAGE_MODEL = (
    "transformer.TransformerConfig.kernel = 'splash'",
    "transformer.TransformerConfig.dropout = 0.0",
    "sequence.Sequence.embedding_dropout = 0.0",
    "sequence.Sequence.scale_embedding = False",
    "pipeline.Feed.row_length = 4096",
    "pipeline.Feed.history_length = 4096",
)
_HALF = ("transformer.TransformerConfig.dtype = 'bfloat16'",)
_T5_BASE = (  # T5 1.1 base: 12 + 12 layers
    "seq2seq.t5_stack.num_layers = 12",
    "seq2seq.t5_stack.width = 768",
    "seq2seq.t5_stack.num_heads = 12",
    "seq2seq.t5_stack.head_dim = 64",
    "seq2seq.t5_stack.mlp_width = 2048",
    "pipeline.Feed.row_length = 512",
    "pipeline.Feed.answer_length = 64",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compilation: gin files, lines after them, and the flags of `recjax compile`."""

    name: str
    files: tuple[str, ...]
    lines: tuple[str, ...] = ()
    topology: str
    slices: int = 1
    batch: int
    mesh: str = "data=-1"
    sharding: str = "fsdp"
    rows: int = 0

    def run(self, folder: Path) -> dict[str, Any] | None:
        """What `recjax compile` found; None where it could not say."""
        gin, out = folder / "row.gin", folder / "row.json"
        includes = [f"include 'configs/{name}.gin'" for name in self.files]
        gin.write_text("\n".join([_IMPORTS, *includes, *self.lines]) + "\n")
        words = ["-m", "recjax.compile", f"--gin_file={gin}", f"--topology={self.topology}", f"--slices={self.slices}"]
        words += [f"--rows={self.rows}", f"--out={out}", f"--gin.BATCH_SIZE={self.batch}"]
        words += [f"--gin.MESH={self.mesh!r}", f"--gin.SHARDING={self.sharding!r}"]
        subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=False)
        return {**json.loads(out.read_text()), "recipe": self.name} if out.exists() else None


_LSRM = ("recipe/scaling_law/1_train", "model/lsrm_829m")
TABLE_ROWS = (
    Row(name="LSRM 829M, 1M items", files=_LSRM, lines=_HALF, topology="v5e:4x4", batch=1024, rows=1_000_064),
    Row(
        name="LSRM 829M, 1M items, 2 slices",
        files=_LSRM,
        lines=_HALF,
        topology="v5e:4x4",
        slices=2,
        batch=2048,
        mesh="replica=2,data=16",
        rows=1_000_064,
    ),
    Row(
        name="T5 1.1 base for search and recommendation, 1M items",
        files=("recipe/search_and_rec_t5/1_train",),
        lines=_T5_BASE,
        topology="v5e:4x4",
        batch=256,
        rows=1_000_064,
    ),
    Row(
        name="Mixtral 8x7B",
        files=("recipe/scaling_law/1_train", "model/mixtral_8x7b"),
        lines=_LANGUAGE_MODEL,
        topology="v5p:4x4x8",
        batch=256,
        mesh="data=16,expert=8",
        rows=32_128,
    ),
    Row(
        name="Mixtral 8x22B",
        files=("recipe/scaling_law/1_train", "model/mixtral_8x22b"),
        lines=_LANGUAGE_MODEL,
        topology="v6e:16x16",
        batch=256,
        mesh="data=32,expert=8",
        rows=32_896,
    ),
)


def render(rows: dict[str, dict[str, Any]]) -> str:
    """The table as it is committed."""
    about = (
        "# Recipes compiled for TPU pods\n\n"
        "By `python benchmarks/compile_table.py`, with XLA:TPU of libtpu and no TPU. Memory is that of the compiler; "
        "times are bounds from what the program does and the chip's peaks (`recjax/launch`), nothing was run. Memory "
        "traffic is an estimate from above, so a step that is bound by it may be faster.\n\n"
    )
    notes = [
        f"- **{row['recipe']}** does not fit: {'; '.join(row['advice'])}." for row in rows.values() if row["advice"]
    ]
    sent = [
        f"- {row['recipe']}: "
        + ", ".join(
            f"{kind} {told['bytes'] / 1e9:.2f} GB in {told['times']:,}" for kind, told in row["collectives"].items()
        )
        for row in rows.values()
        if row.get("collectives")
    ]
    collectives = ["\nSent by a device in a step, by kind of collective:\n", *sent] if sent else []
    return about + summary(list(rows.values())) + "\n".join(["", *notes, *collectives]) + "\n"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--render", action="store_true", help="compile nothing")
    render_only = flags.parse_args().render
    found = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    for row in () if render_only else TABLE_ROWS:
        if row.name not in found:
            with tempfile.TemporaryDirectory() as folder:
                told = row.run(Path(folder))
            if told is not None:
                found[row.name] = told
                ROWS.write_text(json.dumps(found, indent=1) + "\n")
    TABLE.write_text(render({row.name: found[row.name] for row in TABLE_ROWS if row.name in found}))


if __name__ == "__main__":
    main()
