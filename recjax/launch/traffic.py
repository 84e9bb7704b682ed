"""What a collective of a compiled program sends: of which kind, between how many devices, how many bytes from each.

Bytes are what one device has to send at the least, whatever the algorithm, for n devices that share an array of s
bytes (Thakur et al. 2005, Optimization of collective communication operations in MPICH):

    all-gather, reduce-scatter, all-to-all   s (n - 1) / n       all-reduce   2 s (n - 1) / n
    collective-permute, broadcast            s

s is the whole gathered array for the first two, one device's part for the others.
"""

from __future__ import annotations

import math
import re

from recjax.launch.hlo import Computation, Instruction

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Between slices a TPU program sends and receives through the host, and says what for.
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_GRID = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_SCATTER = "all-reduce-scatter"  # how the TPU compiler names an all-reduce of which each device keeps its part


def kind_of(instruction: Instruction, computation: Computation) -> str:
    """One of `KINDS`, with "between slices" after it where it leaves a slice; "" for what is no collective."""
    if instruction.opcode == "send":
        found = _BETWEEN.search(instruction.attributes)
        return f"{found[1].lower().replace('_', '-')} between slices" if found else ""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and computation.name.startswith(_SCATTER):
        return "reduce-scatter"
    return kind if kind in KINDS else ""


def sent(instruction: Instruction, computation: Computation, devices: int, slices: int) -> float:
    """Bytes that each device sends; `devices` and `slices` are those of the whole program."""
    kind = kind_of(instruction, computation)
    operands = instruction.operands if instruction.opcode != "send" else instruction.operands[:1]
    given = sum(s.bytes for name in operands if name in computation.instructions for s in computation[name].shapes)
    if kind.endswith("between slices"):
        return given * (2 if kind.startswith("all-reduce") else 1) * (slices - 1) / slices
    n = group_size(instruction, devices)
    if kind == "all-gather":
        return given * (n - 1)
    if kind == "all-reduce":
        return 2 * given * (n - 1) / n
    return given if kind.startswith("collective") else given * (n - 1) / n


def group_size(instruction: Instruction, devices: int) -> int:
    """How many devices take part together: `replica_groups` as a list, as a grid, or as axes of a mesh."""
    text = instruction.attributes
    if found := _MESH.search(text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[2])
        return math.prod(int(size) if size else sizes[name] for name, _, size in parts)
    if found := _GRID.search(text):
        return int(found[2])
    if found := _LISTED.search(text):
        return found[1].count(",") + 1
    return devices
