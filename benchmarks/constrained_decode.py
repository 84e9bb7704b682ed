"""What it costs to decode nothing but ids that exist: a constrained beam beside the same beam without constraint.

    python benchmarks/constrained_decode.py [--ids 1e5 1e6] [--batch 1 16] [--beams 32] [--rounds 30]

A `models.sequence.Sequence` of 2 layers of width 128 (4 heads, feed-forward 512) writes ids of 4 levels of 256 codes
after a prompt of 50 slots, whose keys and values all beams of a row share; each beam keeps those of the codes it wrote.
Two searches with the same model run in turn: `recjax.decode.beam` over a trie of random ids, and one that softmaxes
over all codes of a level and keeps the best. The ids are drawn uniformly ("even": prefixes of three codes have hardly
more than one continuation) or from codes of unequal frequency that depend on the prefix ("skewed": up to all 256).
`filters` adds a filter of half of the ids, the same for a batch, and 50 ids taken out of each row's answers.

Prints markdown: milliseconds of one step (a level of all rows: model and search) in the fastest round, and by how much
more than without constraint, the median over the rounds, in which the three run in turn; on a CPU, processor time on
one thread. What comes out is checked to exist. MB are those of all arrays of the trie, with those that translate
between leaves and rows.

For comparison, STATIC (Su et al. 2026, arXiv 2602.22647), which is the published vectorised trie: 0.033 ms more per
step, 0.25% of inference, with a model of 3 billion parameters on a TPU v6e; about 90 MB per million ids. A share of
inference depends on the model: the one here is so small that the search weighs far more.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1 " + os.environ.get(
    "XLA_FLAGS", ""
)

import jax
import jax.numpy as jnp
import numpy as np

from recjax.core.module import Functional
from recjax.decode.beam import Beams, beam_search
from recjax.decode.build import build_trie
from recjax.decode.trie import Trie
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig

FIRST = 2  # the first row of a table that is a code

LAYERS, WIDTH, HEADS, PROMPT = 2, 128, 4, 50
SIZES = (256,) * 4
START = FIRST + np.cumsum([0, *SIZES[:-1]])
ROWS = 1152  # of the table: two that are no codes, the codes, and some to a multiple of 128
EXCLUDED = 50
LEAST = 0.02
MB = 10**6


def prompted(batch: int) -> tuple[Functional, Any, jax.Array, Any, Any]:
    """The model, its parameters, and after a batch of prompts: output, memory, and an empty suffix of one beam."""
    encoder = TransformerConfig(num_layers=LAYERS, width=WIDTH, num_heads=HEADS)
    model = Functional(partial(Sequence, num_rows=ROWS, encoder=encoder, max_length=PROMPT + len(SIZES)))
    params = jax.jit(model.init)(jax.random.key(0))
    params["table"] *= 10  # of a trained model's size, so that codes are not all alike
    prompts = {
        "history_ids": np.random.default_rng(1).integers(FIRST, FIRST + sum(SIZES), (batch, PROMPT), np.int32),
        "positions": np.tile(np.arange(PROMPT, dtype=np.int32), (batch, 1)),
        "segment_ids": np.ones((batch, PROMPT), np.int32),
        "query_at": np.full((batch, 1), PROMPT - 1, np.int32),
    }

    def prefill(params: Any, prompts: Any) -> tuple[jax.Array, Any, Any]:
        module: Any = model.bind(params)
        hidden, memory = module.prefill(prompts)
        return hidden, memory, module.start(memory, 1, len(SIZES))

    return model, params, *jax.jit(prefill)(params, prompts)


def make_step(model: Functional, params: Any, hidden: jax.Array, memory: Any) -> Callable[..., Any]:
    """`step` for a beam search, by one more token at a time."""
    module: Any = model.bind(params)

    def step(suffix: Any, codes: jax.Array | None, level: int) -> tuple[jax.Array, Any]:
        out = hidden[:, None]
        if codes is not None:
            out, suffix = module.extend(memory, suffix, codes + int(START[level - 1]), level - 1)
        table = jax.lax.dynamic_slice_in_dim(memory.table, int(START[level]), SIZES[level])
        return jnp.einsum("bmd,vd->bmv", out, table), suffix

    return step


def unconstrained(step: Callable[..., Any], state: Any, beams: int) -> tuple[jax.Array, jax.Array]:
    """A beam search over all sequences of codes: scores [b, m] and codes [b, m, levels]."""
    logits, state = step(state, None, 0)
    scores = jnp.zeros(logits.shape[:2])
    written = jnp.zeros((*logits.shape[:2], 0), jnp.int32)
    for level, size in enumerate(SIZES):
        candidates = scores[..., None] + jax.nn.log_softmax(logits, axis=-1)
        scores, place = jax.lax.top_k(candidates.reshape(len(scores), -1), beams)
        parents, codes = place // size, place % size

        def follow(x: jax.Array, parents: jax.Array = parents) -> jax.Array:
            return jax.vmap(lambda rows, at: jnp.take(rows, at, axis=0, mode="clip"))(x, parents)

        written = jnp.concatenate([follow(written), codes[..., None]], axis=2)
        if level < len(SIZES) - 1:
            logits, state = step(jax.tree.map(follow, state), codes, level + 1)
    return scores, written


def draw_ids(n: int, kind: str) -> np.ndarray:
    """[n, levels] distinct ids."""
    rng = np.random.default_rng(0)
    found = np.zeros((0, len(SIZES)), np.int64)
    while len(found) < n:
        if kind == "even":
            drawn = rng.integers(0, SIZES, (n, len(SIZES)))
        else:
            ranks = np.floor(256 * rng.random((n, len(SIZES))) ** 3).astype(np.int64)
            drawn = ranks.copy()
            for level in range(1, len(SIZES)):  # which codes are frequent depends on the code before
                drawn[:, level] = (ranks[:, level] + 97 * drawn[:, level - 1]) % 256
        found = np.unique(np.concatenate([found, drawn]), axis=0)
    return rng.permutation(found)[:n]


def times(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of a run of each program in each round, in which they run in turn, each for some `LEAST` seconds."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    repeats = dict.fromkeys(programs, 2)
    for at in range(rounds + 1):
        for name, run in programs.items():
            start = clock()
            for _ in range(repeats[name]):
                jax.block_until_ready(run())
            passed = (clock() - start) / repeats[name]
            if at:
                seconds[name].append(passed)
            else:
                repeats[name] = max(1, round(LEAST / passed))
    return {name: np.asarray(of) for name, of in seconds.items()}


def check(found: Beams, trie: Trie, codes: np.ndarray, beams: int) -> None:
    """Every answer is an id of its own."""
    rows = np.asarray(trie.rows_of(found.leaf))
    assert np.asarray(found.valid).all() and all(len(set(row.tolist())) == beams for row in rows)
    assert rows.min() >= 0 and rows.max() < len(codes)


def measure(codes: np.ndarray, trie: Trie, batch: int, beams: int, rounds: int) -> str:
    """Milliseconds of a step without constraint, with it, and with filters, and by how much more that is."""
    rng = np.random.default_rng(1)
    model, *prompt = prompted(batch)
    allowed = jnp.asarray(rng.random(len(codes)) < 0.5)
    exclude = jnp.asarray(rng.integers(0, len(codes), (batch, EXCLUDED)), jnp.int32)

    def constrained(params: Any, hidden: Any, memory: Any, suffix: Any, trie: Trie, filters: Any) -> Beams:
        return beam_search(make_step(model, params, hidden, memory), suffix, trie, beams=beams, **filters)

    free = jax.jit(lambda p, h, m, s: unconstrained(make_step(model, p, h, m), s, beams))
    held = jax.jit(constrained)
    programs = {
        "free": lambda: free(*prompt),
        "plain": lambda: held(*prompt, trie, {}),
        "filters": lambda: held(*prompt, trie, {"allowed": allowed, "exclude": exclude}),
    }
    for name in ("plain", "filters"):
        check(programs[name](), trie, codes, beams)
    seconds = times(programs, rounds)
    per_step = {name: of.min() / len(SIZES) * 1e3 for name, of in seconds.items()}
    more = {name: np.median(of / seconds["free"]) - 1 for name, of in seconds.items()}
    return f"{per_step['free']:.3f} | " + " | ".join(
        f"{per_step[name]:.3f} | {more[name]:+.1%}" for name in ("plain", "filters")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=float, nargs="+", default=[1e5])
    parser.add_argument("--kinds", nargs="+", choices=("even", "skewed"), default=["even", "skewed"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--beams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {args.beams} beams, {args.rounds} rounds.\n")
    print("| ids | codes | branch | MB | build s | rows | free ms | constrained ms | more | with filters ms | more |")
    print("|" + "---|" * 11)
    for ids in args.ids:
        for kind in args.kinds:
            codes = draw_ids(int(ids), kind)
            start = time.process_time()
            trie = build_trie(codes, SIZES)
            built = time.process_time() - start
            branch = "-".join(str(n) for n in trie.shape.branch)
            about = f"| {int(ids):,} | {kind} | {branch} | {trie.nbytes / MB:.1f} | {built:.2f} |"
            for batch in args.batch:
                line = measure(codes, jax.device_put(trie), batch, args.beams, args.rounds)
                print(f"{about} {batch} | {line} |", flush=True)


if __name__ == "__main__":
    main()
