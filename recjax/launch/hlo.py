"""The text of a compiled XLA program, read into computations and instructions.

Only the text says what a program does after partitioning and scheduling: which collectives there are, what stays in
fast memory, what loops over what. It is read line by line into plain records; what they cost is for
`recjax.launch.cost`. Attributes are kept as text and asked for by name. It refuses text without an entry computation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAMED = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r'\}(?:, execution_thread="\w*")?\s*')
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_COMMENT = re.compile(r"/\*.*?\*/")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One array: its element type, its dimensions, and the memory it lies in (0 is the device's main memory)."""

    dtype: str
    dims: tuple[int, ...]
    memory: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without what tiling pads."""
        return math.ceil(self.size * bits(self.dtype) / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a computation. `shapes` has one entry, or one for each array of a tuple, nested ones flattened."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations this one calls, by role: calls, to_apply, body, condition, and branches by their number."""
        found = {role: name for role, name in _CALLED.findall(self.attributes)}
        if branches := _BRANCHES.search(self.attributes):
            names = (name.strip().lstrip("%") for name in branches[1].split(","))
            found |= {f"branch {at}": name for at, name in enumerate(names)}
        return found

    @property
    def op_name(self) -> str:
        """The operation of the traced program that it comes from."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """The value of an attribute that is one word, one `{...}` or `"..."`; "" where it has none."""
        found = re.search(rf'\b{name}=(?:"([^"]*)"|(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})|([^\s,}}]+))', self.attributes)
        return "" if found is None else next(group for group in found.groups() if group is not None)

    def dims(self, name: str) -> tuple[int, ...]:
        """An attribute such as `dimensions={0,1}`."""
        return tuple(int(x) for x in re.findall(r"\d+", self.attribute(name)))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run."""

    name: str
    instructions: Mapping[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @property
    def root(self) -> Instruction:
        """What the computation returns."""
        return next(i for i in self if i.is_root)

    def operand(self, instruction: Instruction, at: int) -> Instruction | None:
        """The instruction that an operand comes from, seen through copies and bitcasts; None where there is none."""
        names = instruction.operands
        found = self.instructions.get(names[at]) if at < len(names) else None
        while found is not None and found.opcode in ("copy", "bitcast", "convert") and found.operands:
            found = self.instructions.get(found.operands[0])
        return found

    def users(self, name: str) -> list[tuple[Instruction, int]]:
        """Every use of a result, seen through bitcasts: the instruction and the place among its operands."""
        found = []
        for user, at in self._direct_users.get(name, ()):
            found += self.users(user.name) if user.opcode == "bitcast" and not user.is_root else [(user, at)]
        return found

    @functools.cached_property
    def _direct_users(self) -> dict[str, list[tuple[Instruction, int]]]:
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for user in self:
            for at, operand in enumerate(user.operands):
                found.setdefault(operand, []).append((user, at))
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A module: its computations by name, and the one that it starts with."""

    computations: Mapping[str, Computation]
    entry: Computation

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]


def bits(dtype: str) -> int:
    """Bits of one element: bf16 16, s4 4, f8e4m3fn 8, c64 64, pred 8."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def shapes_of(text: str) -> tuple[Shape, ...]:
    """All arrays of a type as HLO writes it, such as `(f32[8,4]{1,0:T(8,128)S(1)}, s32[])`."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(_COMMENT.sub("", text)):
        memory = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d) for d in dims.split(",") if d)
        found.append(Shape(dtype=dtype, dims=sizes, memory=int(memory[1]) if memory else 0))
    return tuple(found)


def parse(text: str) -> Program:
    """The program that `compiled.as_text()` writes out; raises `ValueError` where it is none."""
    computations: dict[str, Computation] = {}
    entry, current, pending = "", None, ""
    for line in (*text.splitlines(), "}"):
        if current is None:
            if begins := _COMPUTATION.match(line):
                current = {}
                computations[begins[2]] = Computation(begins[2], current)
                entry = begins[2] if begins[1] else entry
            continue
        ends, begins = _END.fullmatch(line), _INSTRUCTION.match(line)
        if (ends or begins) and pending:
            instruction = _instruction(pending)
            current[instruction.name] = instruction
        # What a kernel says of itself may have lines of its own, and some of them begin with braces.
        pending = "" if ends else line if begins else pending + line
        current = None if ends else current
    if not entry:
        raise ValueError("this is not the text of an XLA program: it has no ENTRY computation")
    return Program(computations=computations, entry=computations[entry])


def _instruction(line: str) -> Instruction:
    """`name = `, and after it a type, an opcode, operands in parentheses, attributes."""
    begins = _INSTRUCTION.match(line)
    assert begins is not None
    text = line[begins.end() :]
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opens = rest.index("(")
    closes = _closing(rest, opens)
    inside = rest[opens + 1 : closes]
    return Instruction(
        name=begins[2],
        opcode=rest[:opens],
        shapes=shapes_of(kind),
        operands=tuple(_NAMED.findall(_COMMENT.sub("", inside))),
        literal=inside,
        attributes=rest[closes + 1 :],
        is_root=bool(begins[1]),
    )


def _closing(text: str, opens: int) -> int:
    """Where the parenthesis at `opens` is closed."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opens):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")
