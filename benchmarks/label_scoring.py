"""What it costs to score candidates by label words: two layouts that share the prompt beside scoring each alone.

    python benchmarks/label_scoring.py [--prefix 1024] [--candidates 32] [--suffix 64] [--prompts 1] [--rounds 5]
        [--layers 4] [--width 256] [--vocabulary 32768] [--slots 16384] [--naive_slots 0] [--dtype float32]
        [--experts 0]

A Llama-like decoder (rotary positions, four query heads for each key head, SwiGLU; `--experts` n: n experts, two for
each token) with random weights reads prompts of random tokens, each with its candidates, and gives the logits of two
label words for every candidate: `recjax.scoring` from the host's records to logits on the host. Layouts run in turn,
`naive` first; all give the same logits, which is checked. A batch has about so many `--slots`; `--naive_slots` gives
the naive layout batches of another size, as it may be faster with few rows at a time.

Prints markdown: seconds of the fastest round, candidates a second, how many times faster than naive (the median over
rounds, in which the layouts run in turn), tokens read for each candidate and the share that need not be read again,
and what the compiled program needs besides weights and inputs, in MB. On a CPU one thread is used and seconds are
processor time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1 " + os.environ.get(
    "XLA_FLAGS", ""
)

import jax
import numpy as np

from recjax.core.module import Functional
from recjax.data.ranked import ranked_batches
from recjax.data.ranking_records import RankingRecords
from recjax.data.record import Column
from recjax.data.vocab import FIRST_ITEM
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.scoring import Scorer, label_logits

LABELS = (10, 20)
LAYOUTS = ("naive", "cached", "shared")
MB = 10**6


def records_of(args: argparse.Namespace) -> RankingRecords:
    """Prompts of one length with candidates of one length."""
    rng = np.random.default_rng(0)

    def column(length: int) -> Column:
        tokens = rng.integers(FIRST_ITEM, args.vocabulary, args.prompts * length).astype(np.int32)
        return Column(tokens, np.arange(args.prompts + 1) * length)

    many = args.candidates * args.prompts
    bounds = np.arange(args.prompts + 1) * args.candidates
    return RankingRecords.of(
        {
            "items": column(args.prefix),
            "suffixes": column(args.candidates * args.suffix),
            "suffix_lengths": Column(np.full(many, args.suffix, np.int32), bounds),
            "labels": Column(np.zeros(many, np.int32), bounds),
            "user_index": Column(np.arange(args.prompts)),
        }
    )


def model_of(args: argparse.Namespace) -> tuple[Functional, dict]:
    """The decoder and its weights, of the dtype of the computation."""
    more = {}
    if args.experts:
        from recjax.nn.moe import MoeConfig

        more["moe"] = MoeConfig(num_experts=args.experts)
    heads = max(args.width // 64, 4)
    encoder = TransformerConfig(
        num_layers=args.layers,
        width=args.width,
        num_heads=heads,
        num_kv_heads=heads // 4,
        mlp_width=-(-args.width * 8 // 3 // 64) * 64,
        position="rotary",
        norm="rms",
        bias=False,
        ffn="swiglu",
        tied_head=False,
        dtype=args.dtype,
        unroll=False,
        **more,
    )
    model = Functional(partial(Sequence, num_rows=args.vocabulary, encoder=encoder))
    params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(args.dtype), model.init(key)))(jax.random.key(0))
    return model, params


def temporary(model: Functional, params: dict, records: RankingRecords, layout: str, slots: int) -> int:
    """Bytes of the compiled program of the first batch, besides arguments and results."""
    batch = next(ranked_batches(records, layout=layout, slots=slots)).batch
    program = jax.jit(partial(label_logits, model, label_rows=LABELS)).lower(params, batch).compile()
    found = program.memory_analysis()
    return 0 if found is None else found.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"prefix": 1024, "candidates": 32, "suffix": 64, "prompts": 1, "rounds": 5, "layers": 4, "width": 256}
    for name, default in {**sizes, "vocabulary": 32768, "slots": 16384, "naive_slots": 0, "experts": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    records, (model, params) = records_of(args), model_of(args)
    slots: dict[str, int] = {name: args.slots for name in LAYOUTS} | {"naive": args.naive_slots or args.slots}
    scorers = {name: Scorer(model, label_rows=LABELS, layout=name, slots=slots[name]) for name in LAYOUTS}
    scores = {name: scorer(params, records) for name, scorer in scorers.items()}
    tolerance = 1e-4 if args.dtype == "float32" else 0.3
    apart = max(float(np.abs(found.logits - scores["naive"].logits).max()) for found in scores.values())
    assert apart < tolerance, apart
    seconds = np.zeros((args.rounds, len(LAYOUTS)))
    for row in seconds:
        for at, scorer in enumerate(scorers.values()):
            start = clock()
            scorer(params, records)
            row[at] = clock() - start
    count = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    about = ", ".join(f"{name} {value}" for name, value in vars(args).items())
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {count:.1f} million parameters; {about}.")
    print(f"Logits differ by at most {apart:.1e}.\n")
    print("| layout | seconds | candidates/s | times naive | tokens/candidate | not read again | MB |")
    print("|---|" + "---:|" * 6)
    for at, name in enumerate(LAYOUTS):
        fastest, ratio = seconds[:, at].min(), np.median(seconds[:, 0] / seconds[:, at])
        cost, needs = scores[name].cost.report(), temporary(model, params, records, name, slots[name]) / MB
        tokens = f"{cost['tokens_per_candidate']:,.0f} | {cost['prefix_reuse']:.1%}"
        print(
            f"| {name} | {fastest:.3f} | {records.candidates / fastest:,.0f} | {ratio:.1f} | {tokens} | {needs:,.1f} |"
        )


if __name__ == "__main__":
    main()
