"""Recipes of production size, compiled for TPU pods: what fits, the time of a step, what a device sends.

    python benchmarks/compile_table.py                 # compiles what is not in results/compile.json yet
    python benchmarks/compile_table.py NAME [NAME ...] # compiles these, anew
    python benchmarks/compile_table.py --render        # only writes results/compile.md anew

Every row is a `recjax compile` in a process of its own (it needs `pip install 'recjax[tpu]'`, and no TPU). The data is
the simulated world: only shapes matter. Tables have the rows that `--rows` says. A language model is compiled as the
decoder that it is, over rows of 4,096 tokens.
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
from recjax.nn import moe
from recjax.nn import transformer
from recjax import recipe
"""
_DECODER, _T5 = "recipe/scaling_law/1_train", "recipe/search_and_rec_t5/1_train"
_LANGUAGE_MODEL = (
    "transformer.TransformerConfig.kernel = 'splash'",
    "transformer.TransformerConfig.dropout = 0.0",
    "sequence.Sequence.embedding_dropout = 0.0",
    "sequence.Sequence.scale_embedding = False",
    "pipeline.Feed.row_length = 4096",
    "pipeline.Feed.history_length = 4096",
)
_EXPERTS = (*_LANGUAGE_MODEL, "moe.MoeConfig.kernel = 'megablox'")
_HALF = ("transformer.TransformerConfig.dtype = 'bfloat16'",)
_PROMPTS = ("pipeline.Feed.row_length = 512", "pipeline.Feed.answer_length = 64")
_MILLION = 1_000_064


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


def language_model(name: str, model: str, **more: Any) -> Row:
    """A decoder of words in the preset for them."""
    return Row(**{"name": name, "files": (_DECODER, model), "lines": _LANGUAGE_MODEL, "sharding": "fsdp_text", **more})


def decoder_of_items(name: str, model: str, **more: Any) -> Row:
    """A decoder over a million items, in bfloat16."""
    return Row(**{"name": name, "files": (_DECODER, model), "lines": _HALF, "rows": _MILLION, **more})


def t5(size: str, **more: Any) -> Row:
    """Search and recommendation by T5 1.1, a million items beside its words."""
    return Row(
        **{
            "name": f"T5 1.1 {size} for search and recommendation, 1M items",
            "files": (_T5, f"model/t5_{size}"),
            "lines": _PROMPTS,
            "rows": _MILLION,
            **more,
        }
    )


_LLAMA, _MISTRAL = "model/llama_1b", "model/mistral_7b"
PODS = (
    decoder_of_items("LSRM 75M, 1M items", "model/lsrm_75m", topology="v5e:4x4", batch=1024),
    decoder_of_items("LSRM 829M, 1M items", "model/lsrm_829m", topology="v5e:4x4", batch=1024),
    decoder_of_items(
        "LSRM 829M, 1M items, 2 slices",
        "model/lsrm_829m",
        topology="v5e:4x4",
        slices=2,
        batch=2048,
        mesh="replica=2,data=16",
    ),
    Row(
        name="HSTU-large of MovieLens-1M",
        files=("recipe/hstu/1_no_time", "model/hstu_large"),
        topology="v5e:2x2",
        batch=128,
        sharding="data",
        rows=3_968,
    ),
    t5("small", topology="v5e:4x4", batch=256),
    t5("base", topology="v5e:4x4", batch=256),
    t5("large", topology="v5e:4x4", batch=256),
    t5("xl", topology="v5p:4x4x4", batch=256),
    language_model("Llama 3.2 1B", _LLAMA, topology="v5e:4x4", batch=32, rows=128_256),
    language_model("Mistral 7B", _MISTRAL, topology="v5p:4x4x4", batch=128, rows=32_768),
    language_model(
        "Mixtral 8x7B",
        "model/mixtral_8x7b",
        lines=_EXPERTS,
        topology="v5p:4x4x8",
        batch=256,
        mesh="data=16,expert=8",
        rows=32_128,
    ),
    *(
        language_model(
            f"Mixtral 8x7B by ragged_dot{name}",
            "model/mixtral_8x7b",
            topology="v5p:4x4x8",
            batch=256,
            mesh="data=16,expert=8",
            sharding=sharding,
            rows=32_128,
        )
        for name, sharding in (("", "fsdp_text"), (", table by rows", "fsdp"))
    ),
    language_model(
        "Mixtral 8x22B",
        "model/mixtral_8x22b",
        lines=_EXPERTS,
        topology="v6e:16x16",
        batch=256,
        mesh="data=32,expert=8",
        rows=32_896,
    ),
)
WEAK = tuple(
    language_model(f"Llama 3.2 1B on {chips}", _LLAMA, topology=f"v5e:{shape}", batch=2 * chips, rows=128_256)
    for chips, shape in ((8, "2x4"), (16, "4x4"), (32, "4x8"), (64, "8x8"), (128, "8x16"), (256, "16x16"))
)


def render(found: dict[str, dict[str, Any]]) -> str:
    """The tables as they are committed."""
    pods, weak = ([found[row.name] for row in rows if row.name in found] for rows in (PODS, WEAK))
    about = (
        "# Recipes compiled for TPU pods\n\n"
        "By `python benchmarks/compile_table.py`, with XLA:TPU of libtpu and no TPU. Memory is that of the compiler. "
        "FLOPs and what is sent are read from the compiled program; times are from these and the chip's peaks "
        "(`recjax/launch`): the least, where all runs beside all and memory moves only what is there between "
        "steps, and the serial one, where nothing does and all traffic counts that the program shows. MFU counts the "
        "whole square of attention, as is usual, and may pass 100% where a program leaves the future out. Nothing "
        "was run.\n\n"
    )
    notes = [f"- **{row['recipe']}** does not fit: {'; '.join(row['advice'])}." for row in pods if row["advice"]]
    collectives = ["", "Sent by a device in a step, by kind of collective:", "", *map(_sent, pods)]
    scaling = ["", "## The same work a chip on more chips", "", *_scaling(weak)] if weak else []
    return about + summary(pods) + "\n".join(["", *notes, *collectives, *scaling]) + "\n"


def _sent(row: dict[str, Any]) -> str:
    told = (f"{kind} {of['bytes'] / 1e9:.2f} GB in {of['times']:,}" for kind, of in row.get("collectives", {}).items())
    return f"- {row['recipe']}: {', '.join(told) or 'not known'}"


def _scaling(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Llama 3.2 1B, two rows of 4,096 tokens on every chip of a v5e slice, all of it split over all chips.",
        "",
        "| chips | tokens a step | GiB a chip | TFLOP a chip | GB sent by a chip | ms: least | serial | most MFU |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        sent, spent = sum(of["bytes"] for of in row["collectives"].values()), row["seconds"]
        lines.append(
            f"| {row['chips']} | {row['tokens_per_step']:,} | {row['memory']['total'] / 2**30:.1f} | "
            f"{row['flops_per_device'] / 1e12:.1f} | {sent / 1e9:.2f} | {spent['bound'] * 1e3:,.0f} | "
            f"{spent['serial'] * 1e3:,.0f} | {row['mfu_bound']:.0%} |"
        )
    return lines


def _is_known(row: dict[str, Any] | None) -> bool:
    """Whether a program was compiled and read, or is known not to fit."""
    return row is not None and ("seconds" in row or not row["fits"])


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("names", nargs="*", help="rows to compile anew")
    flags.add_argument("--render", action="store_true", help="compile nothing")
    args = flags.parse_args()
    found = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    for row in () if args.render else (*PODS, *WEAK):
        if row.name in args.names if args.names else not _is_known(found.get(row.name)):
            with tempfile.TemporaryDirectory() as folder:
                told = row.run(Path(folder))
            if told is not None:
                found[row.name] = told
                ROWS.write_text(json.dumps(found, indent=1) + "\n")
    TABLE.write_text(render(found))


if __name__ == "__main__":
    main()
