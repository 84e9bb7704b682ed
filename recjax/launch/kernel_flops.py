"""The arithmetic of ready-made kernels in a compiled TPU program, by formula.

The text of a program says of a kernel its name and the shapes that go in and come out. Known are the two that models
here are made of, as jax and XLA:TPU write them:

    ragged-dot, gmm [n, i] rows, sorted by group, with [e, i, o]: 2 n i o
    tgmm            the gradient of the latter, [i, n] with [n, o]: as much
    splash_mha_*    h heads of width k over pairs of blocks: two products forward, four for keys and values, three for
                    queries, each 2 h q s k, of which a causal mask leaves the blocks that reach the past

A kernel that goes by the data does a part of that; who asks says which.
"""

from __future__ import annotations

import re

from recjax.launch.hlo import Computation, Instruction, Shape

CAUSAL = "causal_attention"  # the scope in which `recjax.nn.flash` calls a kernel that skips the future
_SPLASH = {"fwd": 2, "dkv": 4, "dq": 3}
_GROUPED = re.compile(r"jit\(t?gmm\)/pallas_call")
_NAME = re.compile(r"splash_m[hq]a_(fwd|dkv|dq)_")


def kernel_flops(computation: Computation, i: Instruction, *, grouped: float = 1.0) -> float | None:
    """FLOPs of a custom call; None for a kernel that is not known.

    `grouped` is the part of the rows of a ragged product that are of one of its groups: those past the last group are
    skipped.
    """
    given = [computation[name].shapes[0] for name in i.operands if name in computation.instructions]
    if i.name.startswith("ragged-dot-metadata"):
        return 0.0
    if i.name.startswith("ragged-dot") or _GROUPED.search(i.op_name):
        return 2.0 * _floats(given)[0].size * i.shapes[0].dims[-1] * grouped
    found = _NAME.search(i.name)
    if found is None:
        return None
    q, k = _floats(given)[:2]
    pairs = q.size * k.dims[-2] * _reached(i, found[1], q.dims[-2], k.dims[-2])
    return 2.0 * _SPLASH[found[1]] * pairs


def _floats(shapes: list[Shape]) -> list[Shape]:
    return [s for s in shapes if s.dtype.startswith(("f", "bf"))]


def _reached(i: Instruction, part: str, queries: int, keys: int) -> float:
    """The part of all pairs that lie in blocks which a causal mask does not rule out as a whole."""
    if CAUSAL not in i.op_name:
        return 1.0
    suffix = "" if part == "fwd" else f"_{part}"
    q, k = (_block(i.attributes, f"block_{side}{suffix}") for side in ("q", "kv"))
    ends = range(q, queries + 1, q)
    return sum(min(keys, -(-end // k) * k) for end in ends) * q / (queries * keys)


def _block(attributes: str, name: str) -> int:
    found = re.search(rf'"{name}\\?": (\d+)', attributes)
    if found is None:
        raise ValueError(f"a splash kernel that does not say {name}: {attributes[:200]}")
    return int(found[1])
