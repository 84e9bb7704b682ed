"""What a train step costs as the catalogue grows: every row updated, or only those of the batch.

    python benchmarks/large_catalogue.py [--rows 10000 100000 1000000 10000000] [--devices 1 8]

For each catalogue and number of simulated devices (over which the table is split by rows), a process of its own trains
a one-block transformer with a softmax over 256 drawn negatives a few steps, with random items, so that every step
touches other rows. `adam` is Adam on everything; `row-wise` has row-wise AdaGrad on the item table, of which a step
reads and writes the rows of its batch alone. Prints a table in markdown: milliseconds of processor time of the fastest
step (which other work on the machine changes little), their ratio, what the compiled step allocates besides its state,
and the peak of the process. `--most_bytes` leaves out what would need more memory for table, moments and gradient.
`--loss full` measures the full softmax instead, with Adam. Nothing here measures quality.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from typing import Any

MIB = 2**20
ARRAYS = {"adam": 4, "row-wise": 1}  # of the table's size: table, gradient, two moments


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One cell, in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from recjax.core import flops, optim, state
    from recjax.core.module import Functional
    from recjax.core.optim import Group, Optimizer
    from recjax.core.sharding import MeshConfig, make_mesh
    from recjax.core.step import make_train_step
    from recjax.losses.sampled import SampledSoftmax
    from recjax.losses.softmax import CatalogueSoftmax
    from recjax.models.sequence import Sequence
    from recjax.nn.transformer import TransformerConfig

    items, width = args.rows[0], args.width
    rows = -(-(items + 2) // 128) * 128
    mesh = make_mesh(MeshConfig(shape=f"data={args.devices[0]}", preset="fsdp"))
    encoder = TransformerConfig(num_layers=1, width=width, num_heads=2, dropout=0.2)
    model = Functional(functools.partial(Sequence, num_rows=rows, encoder=encoder, max_length=args.length))
    groups = (("^table$", Group(kind="rowwise_adagrad")),) if args.kind == "row-wise" else ()
    config = Optimizer(kind="adam", groups=groups)
    params = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = optim.make(config, params, 1000)
    row_wise, frozen = optim.paths_of(config, params)
    objective = CatalogueSoftmax() if args.loss == "full" else SampledSoftmax(num_negatives=256)
    step = make_train_step(model, (objective,), optimizer, seed=0, row_wise=row_wise, frozen=frozen)

    def create(key: jax.Array) -> state.TrainState:
        return state.create(model.init(key), optimizer)

    draw = np.random.default_rng(0)
    shape = (args.batch, args.length)

    def batch() -> dict[str, jax.Array]:
        ids = draw.integers(2, 2 + items, shape).astype(np.int32)
        return mesh.put_batch(
            {
                "history_ids": ids,
                "positions": np.tile(np.arange(args.length, dtype=np.int32), (args.batch, 1)),
                "segment_ids": np.ones(shape, np.int32),
                "target_ids": np.roll(ids, -1, axis=1),
                "weight": np.ones(shape, np.float32),
            }
        )

    with mesh.activate():
        places = state.shardings(mesh, jax.eval_shape(create, jax.random.key(0)), model.axes)
        now = jax.jit(create, out_shardings=places)(jax.random.key(0))
        valid = jax.jit(
            lambda: (jnp.arange(rows) >= 2) & (jnp.arange(rows) < 2 + items), out_shardings=mesh.sharding(("items",))
        )()
        const = {"item_valid": valid, "num_items": jax.device_put(np.int32(items), mesh.sharding())}
        lowered = jax.jit(step, donate_argnums=0, out_shardings=(places, None)).lower(now, batch(), const)
        compiled = lowered.compile()
        seconds = []
        for _ in range(args.steps + 2):
            given = batch()
            start = time.process_time()
            now, metrics = compiled(now, given, const)
            jax.block_until_ready((now, metrics))
            seconds.append(time.process_time() - start)
    memory: Any = compiled.memory_analysis()
    return {
        "milliseconds": min(seconds[2:]) * 1e3,
        "temporary": memory.temp_size_in_bytes / MIB,
        "peak": flops.memory().peak_bytes / MIB,
        "loss": float(metrics["loss"]),
    }


def cell(args: argparse.Namespace, rows: int, devices: int, kind: str) -> dict[str, float] | None:
    """`measure` in a process of its own; None where it would need too much memory."""
    if ARRAYS[kind] * rows * args.width * 4 > args.most_bytes:
        return None
    words = [sys.executable, __file__, "--cell", "--rows", str(rows), "--devices", str(devices), "--kind", kind]
    for name in ("width", "batch", "length", "steps", "loss"):
        words += [f"--{name}", str(getattr(args, name))]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    found = subprocess.run(words, env=env, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


def table(args: argparse.Namespace) -> None:
    """All cells as markdown."""
    kinds = args.kinds if args.loss == "sampled" else ("adam",)
    print(
        f"Width {args.width}, {args.batch} rows of {args.length}, {args.loss} softmax, fastest of {args.steps} steps.\n"
    )
    heads = [f"{kind}, {what}" for kind in kinds for what in ("CPU ms", "temporary MiB", "peak MiB")]
    print("| devices | items | " + " | ".join([*heads, *(["adam / row-wise"] if len(kinds) > 1 else [])]) + " |")
    print("|" + "---|" * (2 + len(heads) + (len(kinds) > 1)))
    for devices in args.devices:
        for rows in args.rows:
            found = [cell(args, rows, devices, kind) for kind in kinds]
            values = [
                "too large" if f is None else f"{f[name]:,.1f}"
                for f in found
                for name in ("milliseconds", "temporary", "peak")
            ]
            if len(kinds) > 1:
                dense, sparse = (f["milliseconds"] if f else None for f in found)
                values.append(f"{dense / sparse:.1f}" if dense and sparse else "")
            print(f"| {devices} | {rows:,} | " + " | ".join(values) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--loss", choices=("sampled", "full"), default="sampled")
    parser.add_argument("--most_bytes", type=float, default=6e9)
    parser.add_argument("--kinds", nargs="+", choices=tuple(ARRAYS), default=list(ARRAYS))
    parser.add_argument("--kind", choices=tuple(ARRAYS), default="adam", help=argparse.SUPPRESS)
    parser.add_argument("--cell", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(measure(args)))
    else:
        table(args)


if __name__ == "__main__":
    main()
