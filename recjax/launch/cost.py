"""What one run of a compiled program costs a device: products, memory traffic, collectives, large arrays.

XLA's own analysis counts the body of a loop once; here a body counts as often as it runs. A loop whose bound is not a
constant (such as one over the positions that are not padding) is taken to run over everything that it walks through,
and is counted in `assumed`. FLOPs are those of matrix products and convolutions, a multiply-add being two, and those of
kernels that `recjax.launch.kernel_flops` knows; others are listed in `kernels`. Memory traffic is that of
arrays in main memory which pass from one instruction to the next, of a slice only what is taken: tiling, spills and
reuse are not known, so it is an estimate.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from recjax.launch.hlo import Computation, Instruction, Program, Shape
from recjax.launch.kernel_flops import kernel_flops
from recjax.launch.traffic import BETWEEN, kind_of, leaves_slice, sent

_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("add-dependency", "optimization-barrier", "send", "recv", "iota"),
)
_WRAPPERS = ("call", "call-start", "async-start")
_SLICES = ("dynamic-slice", "slice", "gather")
_COUNTS = ("32", "64")  # bits of a counter
# Custom calls that only reserve room or mark what the compiler does anyway.
_BOOKKEEPING = re.compile(
    "AllocateBuffer|AsyncCollective|Sharding|Barrier|annotate|ConsumeBuffer|Bitcast|SliceId|ZeroCrop|PrepareAsync|AssumeGather"
)

_BESIDE, _ENDS = "async_collective_fusion", "async-collective-done"


@dataclasses.dataclass(frozen=True)
class Large:
    """An array that the program makes: what it is, how many bytes, and which operation of the model it comes from."""

    shape: str
    bytes: int
    source: str


@dataclasses.dataclass
class Cost:
    """Of one device in one step. `sent` and `times` are bytes and calls by kind of collective."""

    flops: float = 0.0
    memory: float = 0.0
    sent: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    times: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    kernels: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    assumed: int = 0
    arrays: dict[tuple[str, str], Large] = dataclasses.field(default_factory=dict)

    def add(self, other: Cost) -> None:
        """Count what another part of the program costs as well."""
        self.flops, self.memory = self.flops + other.flops, self.memory + other.memory
        self.assumed += other.assumed
        self.sent.update(other.sent)
        self.times.update(other.times)
        self.kernels.update(other.kernels)
        self.arrays |= other.arrays

    def largest(self, count: int) -> list[Large]:
        """The largest different arrays."""
        return sorted(self.arrays.values(), key=lambda a: -a.bytes)[:count]

    def sent_within(self) -> float:
        """Bytes that stay in a slice."""
        return sum(b for kind, b in self.sent.items() if not kind.endswith(BETWEEN))

    def sent_between(self) -> float:
        """Bytes that leave it."""
        return sum(b for kind, b in self.sent.items() if kind.endswith(BETWEEN))


def cost_of(program: Program, *, devices: int = 1, slices: int = 1, grouped: float = 1.0) -> Cost:
    """The cost of the whole program, partitioned over `devices` in so many `slices`.

    `grouped` is the part of the rows of a ragged product that a device has the group of, as when every expert is
    chosen equally often.
    """
    walk = _Walk(program, devices, slices, grouped)
    walk.run(program.entry, 1)
    return walk.cost


class _Walk:
    def __init__(self, program: Program, devices: int, slices: int, grouped: float) -> None:
        self.program, self.devices, self.slices, self.grouped = program, devices, slices, grouped
        self.cost = Cost()
        self.begun: set[str] = set()

    def run(self, computation: Computation, times: float) -> None:
        """Instructions whose results go to memory."""
        for i in computation:
            self._compute(i, computation, times)
            if i.opcode == "while":
                turns, is_known = trips(self.program, computation, i)
                self.cost.assumed += not is_known
                self.run(self.program[i.called["body"]], times * turns)
            elif i.opcode == "conditional":
                self._branches(i, times)
            elif i.opcode in _WRAPPERS and (name := i.called.get("calls") or i.called.get("to_apply")):
                self.run(self.program[name], times)
            elif i.opcode not in _FREE and not i.opcode.endswith("-done"):
                self._note(i)
                if not _is_bookkeeping(i):
                    self.cost.memory += times * _moved(self.program, computation, i)

    def _branches(self, i: Instruction, times: float) -> None:
        """The dearest branch counts."""
        before, best = self.cost, None
        for role, name in i.called.items():
            if "branch" in role or role.endswith("computation"):
                self.cost = Cost()
                self.run(self.program[name], times)
                if best is None or (self.cost.flops, self.cost.memory) > (best.flops, best.memory):
                    best = self.cost
        self.cost = before
        if best is not None:
            self.cost.add(best)

    def _compute(self, i: Instruction, computation: Computation, times: float) -> None:
        """Products and collectives, those inside a fusion as well."""
        if i.opcode == "fusion":
            inside = self.program[i.called["calls"]]
            for inner in inside:
                if not (kind_of(inner, inside) and self._goes_on(i, inside)):
                    self._compute(inner, inside, times)
            self.begun.add(inside.name)
        elif i.opcode == "dot":
            self.cost.flops += times * dot_flops(computation, i)
        elif i.opcode == "convolution":
            self.cost.flops += times * convolution_flops(computation, i)
        elif i.opcode == "custom-call":
            if not _is_bookkeeping(i):
                self._kernel(i, computation, times)
        elif kind := kind_of(i, computation):
            if not kind.endswith(BETWEEN) and self.slices > 1 and leaves_slice(i, self.devices, self.slices):
                kind += BETWEEN
            self.cost.sent[kind] += round(times * sent(i, computation, self.devices, self.slices))
            self.cost.times[kind] += round(times)

    def _goes_on(self, fusion: Instruction, inside: Computation) -> bool:
        """Whether collectives in a fusion are parts of some that began before.

        One that runs beside other work is written down again in each piece of that work, and where it ends. Channels
        do not tell such parts from other collectives: all those of `shard_map` share one.
        """
        return inside.name in self.begun or inside.name.startswith(_BESIDE) or fusion.name.startswith(_ENDS)

    def _kernel(self, i: Instruction, computation: Computation, times: float) -> None:
        found = kernel_flops(computation, i, grouped=self.grouped)
        if found is None:
            self.cost.kernels[i.attribute("custom_call_target")] += round(times)
        else:
            self.cost.flops += times * found

    def _note(self, i: Instruction) -> None:
        for shape in i.shapes:
            if not shape.memory and shape.bytes:
                source = "/".join(i.op_name.split("/")[-3:])
                self.cost.arrays.setdefault((str(shape), source), Large(str(shape), shape.bytes, source))


def _is_bookkeeping(i: Instruction) -> bool:
    return i.opcode == "custom-call" and bool(_BOOKKEEPING.search(i.attribute("custom_call_target")))


def trips(program: Program, computation: Computation, loop: Instruction) -> tuple[int, bool]:
    """How often a loop runs, and whether its bounds say so; it counts up to a constant, or else walks over an array.

    Some loops count in twos: XLA writes the pieces of a product that is made while its weights go round twice.
    """
    condition, body = program[loop.called["condition"]], program[loop.called["body"]]
    bounds = [i for i in condition if i.opcode == "constant" and i.shapes and not i.shapes[0].dims]
    numbers = [int(i.literal) for i in bounds if re.fullmatch(r"-?\d+", i.literal)]
    if len(numbers) == 1:
        start, step = _counted(computation, loop, condition, body)
        return max(1, math.ceil((numbers[0] - start) / step)), True
    walked = [1]
    for i in _flat(program, body):
        if i.opcode in ("dynamic-slice", "dynamic-update-slice"):
            home = next(c for c in program.computations.values() if c.instructions.get(i.name) is i)
            whole = home[i.operands[0]].shapes[0]
            part = i.shapes[0] if i.opcode == "dynamic-slice" else home[i.operands[1]].shapes[0]
            walked.append(math.ceil(whole.size / max(1, part.size)))
    return max(walked), False


def _counted(computation: Computation, loop: Instruction, condition: Computation, body: Computation) -> tuple[int, int]:
    """Where the counter of a loop begins, and by what it grows; 0 and 1 unless constants say otherwise."""
    counters = [i for i in condition if i.opcode == "get-tuple-element" and i.shapes[0].dtype.strip("su") in _COUNTS]
    given = computation.operand(loop, 0)
    if len(counters) != 1 or given is None or given.opcode != "tuple":
        return 0, 1
    at = int(counters[0].attribute("index"))
    first, grown = computation.operand(given, at), body.operand(body.root, at)
    parts = grown.operands if grown is not None and grown.opcode == "add" else ()
    steps = [number for name in parts if (number := _number(body.instructions.get(name)))]
    return _number(first) or 0, steps[0] if len(steps) == 1 else 1


def _number(i: Instruction | None) -> int | None:
    is_number = i is not None and i.opcode == "constant" and re.fullmatch(r"-?\d+", i.literal)
    return int(i.literal) if i is not None and is_number else None


def _flat(program: Program, computation: Computation) -> Iterator[Instruction]:
    """The instructions of a computation and of its fusions, not of the loops in it."""
    for i in computation:
        yield i
        if i.opcode == "fusion":
            yield from program[i.called["calls"]]


def dot_flops(computation: Computation, i: Instruction) -> float:
    """2 x elements of the result x elements that are added up for each."""
    left = computation[i.operands[0]].shapes[0]
    return 2.0 * i.shapes[0].size * math.prod(left.dims[d] for d in i.dims("lhs_contracting_dims"))


def convolution_flops(computation: Computation, i: Instruction) -> float:
    """2 x the products that are made, as which TPU programs write matrix products.

    Places of a window that meet padding or a gap do not count: the batch dimensions of a product are written as a
    window that is as wide as the dimension and meets one element of it.
    """
    left, right = (computation[name].shapes[0] for name in i.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {i.attributes[:200]}")
    ins, kernel, outs = labels.groups()
    total = 2.0 * right.dims[kernel.index("i")]
    total *= i.shapes[0].dims[outs.index("b")] * i.shapes[0].dims[outs.index("f")]
    window = _window(i.attribute("window"))
    for at, place in enumerate(sorted(set(ins) - set("bf"))):
        total *= _pairs(
            left.dims[ins.index(place)],
            right.dims[kernel.index(place)],
            i.shapes[0].dims[outs.index(place)],
            {name: values[at] for name, values in window.items() if at < len(values)},
        )
    return total


def _window(text: str) -> dict[str, list[str]]:
    return {name: values.split("x") for name, values in re.findall(r"(\w+)=([\d_x]+)", text)}


def _pairs(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of a place of the result and one of the kernel that meet an element of the input."""
    stride, spread = int(window.get("stride", "1")), int(window.get("lhs_dilate", "1"))
    dilate, low = int(window.get("rhs_dilate", "1")), int(window.get("pad", "0_0").partition("_")[0])
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * dilate - low
    return int(((at >= 0) & (at % spread == 0) & (at // spread < size)).sum())


def _moved(program: Program, computation: Computation, i: Instruction) -> float:
    """Bytes of main memory that an instruction reads and writes."""
    if i.opcode == "fusion":
        inside = program[i.called["calls"]]
        parameters = {int(p.literal): p for p in inside if p.opcode == "parameter"}
        given = [computation.instructions.get(name) for name in i.operands]
        read = sum(_taken(inside, parameters[at], g) for at, g in enumerate(given) if g is not None)
        return read + _written(inside, i)
    if i.opcode in _SLICES:
        return 2 * _main(i.shapes)
    if i.opcode in ("dynamic-update-slice", "scatter"):
        part = computation.instructions.get(i.operands[1 if i.opcode == "dynamic-update-slice" else -1])
        return 2 * _main(part.shapes) if part else 0
    written = _main(i.shapes[:1] if i.opcode.endswith("-start") else i.shapes)
    return written + sum(_main(computation[name].shapes) for name in i.operands if name in computation.instructions)


def _taken(inside: Computation, parameter: Instruction, given: Instruction) -> float:
    """Bytes that a fusion reads of one of its operands."""
    whole = _main(given.shapes[:1] if given.opcode != "tuple" else given.shapes)
    users = inside.users(parameter.name)
    if not whole or not users:
        return 0
    total = 0
    for user, at in users:
        if user.opcode in _SLICES and at == 0:
            total += user.shapes[0].bytes
        elif user.opcode != "dynamic-update-slice" or at != 0:  # which writes in place
            return whole
    return min(whole, total)


def _written(inside: Computation, i: Instruction) -> float:
    """Bytes that a fusion writes; of an array that it updates in place, the part."""
    root = inside.root
    ends = [inside.operand(root, at) for at in range(len(root.operands))] if root.opcode == "tuple" else [root]
    total = 0
    for end, shape in zip(ends, i.shapes, strict=False):
        updated = _update(inside, end)
        total += (updated or shape).bytes if not shape.memory else 0
    return total


def _update(inside: Computation, end: Instruction | None) -> Shape | None:
    while end is not None and end.opcode == "bitcast":
        end = inside.instructions.get(end.operands[0])
    if end is None or end.opcode != "dynamic-update-slice" or end.operands[1] not in inside.instructions:
        return None
    return inside[end.operands[1]].shapes[0]


def _main(shapes: tuple[Shape, ...]) -> int:
    return sum(s.bytes for s in shapes if not s.memory)
