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

import numpy as np

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
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))?\s*\{([^}]*)\}")
_GRID = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=(\S+?\](?:T\([\d,]+\))?)")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{\{([\d,{}]+)\}\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{([\d,{}]+)\}\}")
BETWEEN = " between slices"
_SCATTER = "all-reduce-scatter"  # how the TPU compiler names an all-reduce of which each device keeps its part


def kind_of(instruction: Instruction, computation: Computation) -> str:
    """One of `KINDS`, with "between slices" after it where it leaves a slice; "" for what is no collective."""
    if instruction.opcode == "send":
        found = _BETWEEN.search(instruction.attributes)
        return found[1].lower().replace("_", "-") + BETWEEN if found else ""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and computation.name.startswith(_SCATTER):
        return "reduce-scatter"
    return kind if kind in KINDS else ""


def sent(instruction: Instruction, computation: Computation, devices: int, slices: int) -> float:
    """Bytes that each device sends; `devices` and `slices` are those of the whole program.

    What a TPU program sends to other slices says so itself.
    """
    kind = kind_of(instruction, computation)
    operands = instruction.operands if instruction.opcode != "send" else instruction.operands[:1]
    given = sum(s.bytes for name in operands if name in computation.instructions for s in computation[name].shapes)
    if kind.endswith(BETWEEN):
        return given * (2 if kind.startswith("all-reduce") else 1) * (slices - 1) / slices
    n = groups_of(instruction, devices).shape[1]
    if kind == "all-gather":
        return given * (n - 1)
    if kind == "all-reduce":
        return 2 * given * (n - 1) / n
    return given if kind.startswith("collective") else given * (n - 1) / n


def groups_of(instruction: Instruction, devices: int) -> np.ndarray:
    """Which devices take part together, [groups, devices of one], by number in the order of the program's mesh.

    `replica_groups` is written as a list, as a grid, or as axes of a mesh, parts of axes among them; none is all.
    """
    text = instruction.attributes
    if found := _MESH.search(text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        asked = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3])
        taken = {name: (int(before), int(size)) if size else (1, sizes[name]) for name, before, size in asked}
        shape = [n for name, size in sizes.items() for n in _parts(size, *taken.get(name, (1, 1)))]
        inner = range(1, len(shape), 3)
        ids = np.arange(math.prod(shape)) if found[2] is None else _numbers(found[2])
        ids = ids.reshape(shape).transpose(*(at for at in range(len(shape)) if at not in inner), *inner)
        return ids.reshape(-1, math.prod(size for _, size in taken.values()))
    if found := _GRID.search(text):
        return _numbers(found[3]).reshape(int(found[1]), int(found[2]))
    if found := _LISTED.search(text):
        return np.array([[int(n) for n in group.split(",")] for group in found[1].split("},{")])
    return np.arange(devices)[None]


def leaves_slice(instruction: Instruction, devices: int, slices: int) -> bool:
    """Whether devices take part together, or send to each other, that are of different ones of equal `slices`."""
    pairs = _PAIRS.search(instruction.attributes)
    found = pairs[1] if pairs else ""
    together = np.array(re.findall(r"\d+", found), int).reshape(-1, 2) if found else groups_of(instruction, devices)
    home = together // (devices // slices)
    return bool((home != home[:, :1]).any())


def _numbers(text: str) -> np.ndarray:
    """All devices in some order: `[2,4]T(1,0)` for those of a grid with its axes turned, or one after another."""
    if (found := _ORDER.fullmatch(text)) is None:
        return np.array([int(n) for n in text.split(",")])
    shape = [int(n) for n in found[1].split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in found[2].split(",")] if found[2] else range(len(shape))).ravel()


def _parts(size: int, before: int, taken: int) -> tuple[int, int, int]:
    return before, taken, size // (before * taken)
