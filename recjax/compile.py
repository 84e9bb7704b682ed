"""`recjax compile`: the train step of a recipe, compiled for a TPU topology that nobody has to own.

The compiler is the one that would run on the machine, so what it says holds: whether the step fits, how much memory it
takes, which collectives it makes. Nothing is run and nothing is allocated; examples are read only for their shapes.
Times are bounds, from what the program does and what the chip can do at best (`recjax.launch`), not measurements.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from recjax import cli, command
from recjax.core.errors import ConfigError
from recjax.data.examples import Examples
from recjax.launch import hlo
from recjax.launch.cost import Cost, cost_of
from recjax.launch.estimate import Memory, Setting, Times, advice, mfu_bound, times
from recjax.launch.topology import Topology, describe
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe

_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_LARGEST = 8
UNREADABLE = (
    "What it costs is not known: this jaxlib cannot read the program that libtpu has made. jax says which libtpu goes "
    "with it: pip install 'recjax[tpu]'."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What compiling a train step found; per device where it says nothing else.

    `parameters` and `tokens` (slots of one step) are of the whole run, `model_flops` those of the model's formula
    (`recjax.core.flops`) for a step. `text` is the program. Without one that fits and can be read there is no `cost`.
    """

    recipe: str
    topology: Topology
    mesh: str
    preset: str
    accumulate: int
    parameters: int
    tokens: int
    model_flops: float
    memory: Memory
    cost: Cost | None
    seconds: float
    advice: tuple[str, ...]
    text: str = dataclasses.field(default="", repr=False)

    @property
    def times(self) -> Times | None:
        """Seconds at the peaks of the chip; None without a program.

        Where kernels that nobody knows do part of the arithmetic, it is at least that of the model's formula.
        """
        if self.cost is None:
            return None
        chip = self.topology.chip
        found = times(self.cost, chip, self.memory.arguments + self.memory.results + self.memory.state)
        least = self.model_flops / len(self.topology.devices) / chip.peak if self.cost.kernels else 0.0
        return dataclasses.replace(found, products=max(found.products, least))

    @property
    def mfu(self) -> float | None:
        """The model FLOPs utilisation that the bound allows."""
        if self.times is None:
            return None
        return mfu_bound(self.model_flops / len(self.topology.devices), self.times, self.topology.chip)

    def row(self) -> dict[str, Any]:
        """All of it as JSON."""
        chip, found, cost = self.topology.chip, self.times, self.cost
        told: dict[str, Any] = {
            "recipe": self.recipe,
            "topology": str(self.topology),
            "chips": self.topology.chips,
            "devices": len(self.topology.devices),
            "mesh": self.mesh,
            "sharding": self.preset,
            "accumulate": self.accumulate,
            "parameters": self.parameters,
            "tokens_per_step": self.tokens,
            "model_flops_per_step": self.model_flops,
            "fits": self.memory.fits,
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total, "chip": chip.memory},
            "compile_seconds": round(self.seconds, 1),
            "advice": list(self.advice),
        }
        if cost is not None and found is not None:
            told |= {
                "flops_per_device": cost.flops,
                "memory_traffic": cost.memory,
                "collectives": {k: {"bytes": b, "times": cost.times[k]} for k, b in cost.sent.most_common()},
                "kernels": dict(cost.kernels),
                "assumed_loops": cost.assumed,
                "seconds": {
                    **dataclasses.asdict(found),
                    "bound": found.bound,
                    "bounded_by": found.bounded_by,
                    "serial": found.serial,
                },
                "tokens_per_second_bound": self.tokens / found.bound if found.bound else 0,
                "mfu_bound": self.mfu,
                "largest": [dataclasses.asdict(array) for array in cost.largest(_LARGEST)],
            }
        return told


def compile_recipe(recipe: Recipe, examples: Sequence[Examples], topology: Topology, *, rows: int = 0) -> Compiled:
    """Compile the train step of `recipe` for `topology`; with `rows`, as if the model's table had that many.

    Raises `MeshError` where the mesh does not fit the topology, the model or the batch.
    """
    if rows:
        model = recipe.model
        recipe = dataclasses.replace(recipe, model=lambda num_rows, rngs: model(num_rows=rows, rngs=rngs))
    assembly = Assembly(recipe, examples, topology.devices)
    state, batch = assembly.abstract_state(), _abstract_batch(assembly)
    const = assembly.const()
    if rows:
        const = {name: _with_rows(x, assembly.num_rows, rows) for name, x in const.items()}
    step = assembly.train_step()
    parts, tokens = assembly.mesh.size_of("batch") * recipe.accumulate, math.prod(batch["weight"].shape)
    setting = Setting(
        preset=recipe.mesh.preset,
        mesh=recipe.mesh.shape,
        accumulate=recipe.accumulate,
        rows=recipe.feed.batch_size // parts,
        remats=_remats(assembly),
        devices=len(topology.devices),
        table=rows or assembly.num_rows,
        slots=tokens // recipe.accumulate,
    )
    held = {"state": _bytes(state), "arguments": _bytes((state, batch, const))}
    began, cost, text = time.perf_counter(), None, ""
    try:
        with assembly.mesh.activate():
            program = step.lower(state, batch, const).compile()
    except jax.errors.JaxRuntimeError as error:
        memory = refused(str(error), **held)
        if memory is None:
            raise
    else:
        stats: Any = program.memory_analysis()
        memory = Memory(
            state=held["state"],
            arguments=stats.argument_size_in_bytes,
            results=stats.output_size_in_bytes - stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            code=stats.generated_code_size_in_bytes,
        )
        text = text_of(program)
        if text:
            # every expert chosen equally often, each on the devices that have it
            chosen = 1 / assembly.mesh.size_of("experts")
            cost = cost_of(hlo.parse(text), devices=len(topology.devices), slices=topology.slices, grouped=chosen)
    return Compiled(
        recipe=recipe.name,
        topology=topology,
        mesh=recipe.mesh.shape,
        preset=recipe.mesh.preset,
        accumulate=recipe.accumulate,
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        tokens=tokens,
        model_flops=assembly.flops_per_token().total * tokens,
        memory=memory,
        cost=cost,
        seconds=time.perf_counter() - began,
        advice=tuple(advice(memory, topology.chip, setting)),
        text=text,
    )


def text_of(program: Any) -> str:
    """The text of a compiled program; "" where this jaxlib cannot read what another version of libtpu has written."""
    try:
        return program.as_text() or ""
    except jax.errors.JaxRuntimeError:
        return ""


def refused(message: str, *, state: int, arguments: int) -> Memory | None:
    """What a compiler that ran out of memory says of it; None for another message."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"\(?([\d.]+)([KMGT])\)? (?:exceeds available \w+ \(|of )([\d.]+)([KMGT])", message)
    if found is None:
        return None
    needed, room = (float(n) * _SIZES[unit] for n, unit in (found.group(1, 2), found.group(3, 4)))
    return Memory(state=state, arguments=arguments, needed=needed, room=room)


def render(found: Compiled) -> str:
    """The report, as markdown."""
    chip, memory, mib = found.topology.chip, found.memory, 2**20
    device = "device (half a chip)" if chip.devices_per_chip > 1 else "chip"
    lines = [
        f"## {found.recipe} on {found.topology}",
        "",
        f"{found.topology.chips:,} chips, MESH = {found.mesh!r}, SHARDING = {found.preset!r}, accumulate = "
        f"{found.accumulate}; {found.parameters:,} parameters; {found.tokens:,} tokens a step",
        "",
        f"| memory of a {device} | MiB |",
        "|---|---:|",
        f"| parameters and optimiser | {memory.state / mib:,.0f} |",
        f"| batch and facts | {max(memory.arguments - memory.state, 0) / mib:,.0f} |",
    ]
    if memory.fits:
        lines += [
            f"| made during the step | {(memory.temporaries + memory.results) / mib:,.0f} |",
            f"| program | {memory.code / mib:,.0f} |",
        ]
    lines += [f"| all | {memory.total / mib:,.0f} |", f"| there is | {(memory.room or chip.memory) / mib:,.0f} |", ""]
    lines += [f"**{'Fits' if memory.fits else 'Does not fit'}** ({memory.total / chip.memory:.0%} of the {device})."]
    lines += [f"- {line}" for line in found.advice]
    if memory.fits and found.cost is None:
        lines += ["", UNREADABLE]
    return "\n".join(lines + ([""] + _costs(found) if found.cost else [])) + "\n"


def _costs(found: Compiled) -> list[str]:
    """The part of the report that is about a program that fits."""
    cost, spent, chip = found.cost, found.times, found.topology.chip
    assert cost is not None and spent is not None
    model = found.model_flops / len(found.topology.devices)
    lines = [
        "| at the peaks of the chip | | ms a step |",
        "|---|---:|---:|",
        f"| products | {cost.flops:.3g} FLOP ({_ratio(cost.flops, model)} the model's own) | {_ms(spent.products)} |",
        f"| memory, at least | {spent.memory * chip.memory_rate / 1e9:,.2f} GB | {_ms(spent.memory)} |",
        f"| memory, at most | {cost.memory / 1e9:,.2f} GB | {_ms(spent.traffic)} |",
        f"| sent to other chips | {cost.sent_within() / 1e9:,.3f} GB | {_ms(spent.links)} |",
    ]
    if found.topology.slices > 1:
        lines.append(f"| sent to other slices | {cost.sent_between() / 1e9:,.3f} GB | {_ms(spent.network)} |")
    lines += [
        "",
        f"A step takes at least {_ms(spent.bound)} ms (bound by {spent.bounded_by}), and {_ms(spent.serial)} ms where "
        f"nothing runs beside anything else: at most {found.tokens / spent.bound:,.0f} tokens a second, MFU at most "
        f"{found.mfu:.0%} of {chip.peak / 1e12:,.0f} TFLOP/s.",
        "",
        "| collective | times | MB sent by a device |",
        "|---|---:|---:|",
        *(f"| {kind} | {cost.times[kind]:,} | {sent / 1e6:,.1f} |" for kind, sent in cost.sent.most_common()),
        "",
        "| largest arrays | MB | from |",
        "|---|---:|---|",
        *(f"| {a.shape} | {a.bytes / 1e6:,.1f} | {a.source} |" for a in cost.largest(_LARGEST)),
    ]
    if cost.kernels:
        listed = ", ".join(f"{name} ({count:,} times)" for name, count in cost.kernels.most_common(6))
        lines += ["", f"Kernels whose arithmetic is not counted: {listed}."]
    if cost.assumed:
        lines += ["", f"{cost.assumed} loops end by what the data says; they are counted for rows without padding."]
    return lines


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of several compilations as one markdown table."""
    lines = [
        "| recipe | topology | mesh | parameters | tokens a step | GiB a device | fits | GB sent by a device "
        "| ms: least | serial | bound by | most MFU |",
        "|---|---|---|---:|---:|---:|---|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        mesh = f"{row['mesh']}, {row['sharding']}" + (f", {row['accumulate']} parts" if row["accumulate"] > 1 else "")
        cells = [row["recipe"], row["topology"], mesh, f"{row['parameters']:,}", f"{row['tokens_per_step']:,}"]
        cells += [f"{row['memory']['total'] / 2**30:.1f} of {row['memory']['chip'] / 2**30:.0f}"]
        cells += ["yes" if row["fits"] else "no", *_costs_of_row(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _costs_of_row(row: Mapping[str, Any]) -> list[str]:
    spent = row.get("seconds")
    if not spent:
        return [""] * 5
    sent = sum(told["bytes"] for told in row["collectives"].values())
    cells = [f"{sent / 1e9:,.2f}", f"{spent['bound'] * 1e3:,.0f}", f"{spent['serial'] * 1e3:,.0f}"]
    return [*cells, spent["bounded_by"], f"{row['mfu_bound']:.0%}"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def _ratio(value: float, by: float) -> str:
    return f"{value / by:.2f} x" if by else "beside"


def _abstract_batch(assembly: Assembly) -> dict[str, Any]:
    """Shapes of a global batch, from the first one of the feed."""
    size, sharding = assembly.recipe.feed.batch_size, assembly.mesh.sharding(("batch",))
    return {
        name: jax.ShapeDtypeStruct((size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding)
        for name, x in next(assembly.batches()).items()
    }


def _with_rows(x: Any, old: int, new: int) -> Any:
    """An array that has an entry for each row of the table, with another number of them."""
    if x.shape[:1] != (old,):
        return x
    return jax.ShapeDtypeStruct((new, *x.shape[1:]), x.dtype, sharding=x.sharding)


def _bytes(tree: Any) -> int:
    """Bytes that the arrays of a tree of shapes take on one device."""
    shards = ((x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * jax.dtypes.itemsize_bits(dtype) // 8 for shape, dtype in shards)


def _remats(assembly: Assembly) -> bool | None:
    """Whether all encoders of the model recompute their layers; None where none has the choice."""
    model = assembly.model.bind(assembly.abstract_params())
    chosen = [getattr(part, "config", None) for part in vars(model).values()]
    found = [c.remat != "none" for c in chosen if c is not None and hasattr(c, "remat")]
    return all(found) if found else None


def main(argv: list[str]) -> int:
    """`recjax compile`; status 1 where the step does not fit."""
    flags = command.parser("compile")
    flags.add_argument("--topology", required=True, help="chip and shape, as in v5p:4x4x8, v6e:16x16 or v5e:2x2")
    flags.add_argument("--slices", type=int, default=1, help="so many slices, joined by the data-centre network")
    flags.add_argument("--rows", type=int, default=0, help="rows of the model's table, instead of those of the data")
    flags.add_argument("--out", type=Path, help="write the report here as well: .json, or else markdown")
    flags.add_argument("--hlo", type=Path, help="write the compiled program here, as text")
    jax.config.update("jax_platforms", "cpu")  # what is compiled for is not asked for by its platform
    given = command.parse(flags, argv)
    args = given.args
    if args.rows < 0 or args.rows % 128:
        raise ConfigError(f"--rows {args.rows}", expected="a multiple of 128, as tables have")
    topology = describe(args.topology, args.slices)
    found = compile_recipe(given.recipe, ensure_prepared(given.recipe.mixture, args.cache), topology, rows=args.rows)
    report = render(found)
    print(report, end="")
    if args.hlo is not None and found.text:
        args.hlo.write_text(found.text, encoding="utf-8")
    if args.out is not None:
        as_json = args.out.suffix == ".json"
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found.row(), indent=1) + "\n" if as_json else report, encoding="utf-8")
    return 0 if found.memory.fits else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
