"""recjax's side of the train-step benchmark: the step of `recjax train`, one device for each core."""

import dataclasses
import functools
import time

import jax
import numpy as np
import optax
from step_data import FIRST_ITEM, batches, fill, histories, options, serve

from recjax.core import state as train_state
from recjax.core.module import Functional
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.core.step import make_train_step
from recjax.losses.sampled import SampledSoftmax
from recjax.losses.softmax import CatalogueSoftmax
from recjax.models.sequence import Sequence
from recjax.nn.transformer import TransformerConfig

CONFIGS = {
    "sasrec": TransformerConfig(mlp_width=64, ffn="relu", dropout=0.2, attention_dropout=0.2),
    "hstu": TransformerConfig(attention="hstu", ffn="none", relative="position_time", dropout=0.2),
}


def main() -> None:
    args = options()
    jax.config.update("jax_num_cpu_devices", args.threads)
    users, items = histories(args.data)
    num_rows = -(-(FIRST_ITEM + items) // 128) * 128
    parts = batches(users, args.rows, args.length, packed=True, timed=args.model == "hstu")
    config = CONFIGS[args.model]
    config = dataclasses.replace(config, max_length=args.length)
    model = Functional(
        functools.partial(
            Sequence,
            num_rows=num_rows,
            encoder=config,
            max_length=args.length,
            embedding_dropout=0.2,
            scale_embedding=True,
        )
    )
    objective = CatalogueSoftmax() if args.loss == "full" else SampledSoftmax(num_negatives=128)
    optimizer = optax.adam(1e-3)
    rows = np.arange(num_rows)
    const = {"item_valid": (rows >= FIRST_ITEM) & (rows < FIRST_ITEM + items), "item_count": np.ones(num_rows, "f4")}
    mesh = make_mesh(MeshConfig(shape=f"data={args.threads}"))
    with mesh.activate():
        state = train_state.create(jax.jit(model.init)(jax.random.key(0)), optimizer)
        state = jax.device_put(state, train_state.shardings(mesh, jax.eval_shape(lambda: state), model.axes))
        const = jax.device_put(const, mesh.sharding())
        start = time.perf_counter()
        step = make_train_step(model, (objective,), optimizer, seed=0, accumulate=args.accumulate)
        step = jax.jit(step, donate_argnums=0).lower(state, mesh.put_batch(parts[0]), const).compile()
        compile_s = time.perf_counter() - start
        m = step.memory_analysis()
        plan = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes

        def run(i: int) -> float:
            nonlocal state
            state, metrics = step(state, mesh.put_batch(parts[i]), const)
            return float(metrics["loss"])

        facts = {"version": jax.__version__, "compile_s": compile_s, "plan_mib": args.threads * plan / 2**20}
        serve(facts | {"fill": fill(parts)}, [int((b["weight"] > 0).sum()) for b in parts], run)


if __name__ == "__main__":
    main()
