"""Memory of a train step over a catalogue of a million items, as the compiler plans it and as it comes out.

    python benchmarks/large_catalogue.py [--rows 1000064] [--run]

Prints the bytes of table, gradient and Adam's moments, which no dense step can do without, and what the compiled
step holds at most, with the state donated. `--run` takes two steps as well and prints their time and the peak of the
process. Nothing here measures quality.
"""

import argparse
import functools
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recjax.core import state as train_state
from recjax.core.module import Functional
from recjax.core.step import make_train_step
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_064)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--run", action="store_true", help="also run two steps")
    args = parser.parse_args()

    config = TransformerConfig(num_layers=2, width=args.width, num_heads=2, dropout=0.2)
    model = Functional(functools.partial(Sequence, num_rows=args.rows, encoder=config, max_length=args.length))
    optimizer = optax.adam(1e-3)
    step = jax.jit(make_train_step(model, (CatalogueSoftmax(),), optimizer, seed=0), donate_argnums=0)

    def create(key: jax.Array) -> train_state.TrainState:
        return train_state.create(model.init(key), optimizer)

    draw = np.random.default_rng(0)
    shape = (args.batch, args.length)
    ids = draw.integers(2, args.rows, shape).astype(np.int32)
    batch = {
        "history_ids": ids,
        "positions": np.tile(np.arange(args.length, dtype=np.int32), (args.batch, 1)),
        "segment_ids": np.ones(shape, np.int32),
        "target_ids": np.roll(ids, -1, axis=1),
        "weight": np.ones(shape, np.float32),
    }
    const = {"item_valid": jnp.arange(args.rows) >= 2}
    compiled = step.lower(jax.eval_shape(create, jax.random.key(0)), batch, const).compile()
    m = compiled.memory_analysis()
    needed = 4 * args.rows * args.width * 4
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    print(f"table + gradient + moments  {needed / MIB:10.1f} MiB")
    print(f"held by the compiled step   {held / MIB:10.1f} MiB  ({100 * (held / needed - 1):+.1f}%)")
    print(f"  of that temporary         {m.temp_size_in_bytes / MIB:10.1f} MiB")
    if args.run:
        state = jax.jit(create)(jax.random.key(0))
        for _ in range(2):
            start = time.perf_counter()
            state, metrics = compiled(state, batch, const)
            loss = float(metrics["loss"])
            print(f"step {time.perf_counter() - start:.2f} s, loss {loss:.3f}")
        print(f"peak of the process         {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:10.1f} MiB")


if __name__ == "__main__":
    main()
