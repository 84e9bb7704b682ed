"""What it costs to decode nothing but ids that exist: a constrained beam beside the same beam without constraint.

    python benchmarks/constrained_decode.py [--ids 1e5 1e6] [--batch 1 16] [--beams 32] [--rounds 30]

A decoder of 2 layers of width 128 (4 heads, feed-forward 512) writes ids of 4 levels of 256 codes after a prompt of 50
slots, whose keys and values all beams of a row share; each beam keeps those of the codes it wrote. Two searches with
the same model run in turn: `recjax.decode.beam` over a trie of random ids, and one that softmaxes over all codes of a
level and keeps the best. The ids are drawn uniformly ("even": prefixes of three codes have hardly more than one
continuation) or from codes of unequal frequency that depend on the prefix ("skewed": up to all 256 continuations).
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1 " + os.environ.get(
    "XLA_FLAGS", ""
)

import jax
import jax.numpy as jnp
import numpy as np

from recjax.decode.beam import Beams, beam_search
from recjax.decode.build import build_trie
from recjax.decode.trie import Trie

LAYERS, WIDTH, HEADS, INNER, PROMPT = 2, 128, 4, 512, 50
SIZES = (256,) * 4
EXCLUDED = 50
LEAST = 0.02
MB = 10**6


def parameters(key: jax.Array) -> dict[str, jax.Array]:
    """Weights of the decoder, N(0, 1 / fan-in), and a table of codes per level."""
    shapes = {
        "qkv": (LAYERS, WIDTH, 3 * WIDTH),
        "out": (LAYERS, WIDTH, WIDTH),
        "up": (LAYERS, WIDTH, INNER),
        "down": (LAYERS, INNER, WIDTH),
        "codes": (len(SIZES), max(SIZES), WIDTH),
    }
    keys = jax.random.split(key, len(shapes))
    params = {n: jax.random.normal(k, s) / s[1] ** 0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return params | {"codes": jax.random.normal(keys[-1], shapes["codes"]) * 0.2}


def norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], HEADS, WIDTH // HEADS)


def make_step(params: dict[str, jax.Array], memory: jax.Array) -> Callable[..., Any]:
    """The decoder after prompts with keys and values `memory` [layers, 2, b, l, h, k]: `step` for a beam search.

    The state is keys and values of what each beam wrote, [b, m, layers, 2, levels, h, k].
    """

    def step(state: jax.Array, codes: jax.Array | None, level: int) -> tuple[jax.Array, jax.Array]:
        if codes is None:
            x = jnp.zeros((*state.shape[:2], WIDTH)) + 1.0
        else:
            x = jnp.take(params["codes"][level - 1], codes, axis=0)
        for layer in range(LAYERS):
            q, k, v = (heads(part) for part in jnp.split(norm(x) @ params["qkv"][layer], 3, axis=-1))
            state = state.at[:, :, layer, 0, level].set(k).at[:, :, layer, 1, level].set(v)
            keys, values = (state[:, :, layer, i, : level + 1] for i in range(2))
            scores = [
                jnp.einsum("bmhk,blhk->bmhl", q, memory[layer, 0]),
                jnp.einsum("bmhk,bmlhk->bmhl", q, keys),
            ]
            weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1) * (WIDTH // HEADS) ** -0.5, axis=-1)
            mixed = jnp.einsum("bmhl,blhk->bmhk", weights[..., :PROMPT], memory[layer, 1])
            mixed = mixed + jnp.einsum("bmhl,bmlhk->bmhk", weights[..., PROMPT:], values)
            x = x + mixed.reshape(x.shape) @ params["out"][layer]
            x = x + jax.nn.gelu(norm(x) @ params["up"][layer]) @ params["down"][layer]
        return norm(x) @ params["codes"][level].T, state

    return step


def unconstrained(step: Callable[..., Any], state: jax.Array, beams: int) -> tuple[jax.Array, jax.Array]:
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
            logits, state = step(follow(state), codes, level + 1)
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
    params = parameters(jax.random.key(0))
    memory = jnp.asarray(rng.normal(size=(LAYERS, 2, batch, PROMPT, HEADS, WIDTH // HEADS)), jnp.float32)
    state = jnp.zeros((batch, 1, LAYERS, 2, len(SIZES), HEADS, WIDTH // HEADS))
    allowed = jnp.asarray(rng.random(len(codes)) < 0.5)
    exclude = jnp.asarray(rng.integers(0, len(codes), (batch, EXCLUDED)), jnp.int32)

    free = jax.jit(lambda p, m, s: unconstrained(make_step(p, m), s, beams))
    plain = jax.jit(lambda p, m, s, t: beam_search(make_step(p, m), s, t, beams=beams))
    full = jax.jit(lambda p, m, s, t, a, e: beam_search(make_step(p, m), s, t, beams=beams, allowed=a, exclude=e))
    programs = {
        "free": lambda: free(params, memory, state),
        "plain": lambda: plain(params, memory, state, trie),
        "filters": lambda: full(params, memory, state, trie, allowed, exclude),
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
