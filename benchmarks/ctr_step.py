"""What a train step of a ranker costs: DCNv2 beside a plain PyTorch one, and as its table grows.

    python benchmarks/ctr_step.py [--rows 1000000] [--growth 100000 1000000 10000000]

Both sides train the same network on the same random rows: fields of equal size in one table, three cross layers with
whole matrices, and a tower of `--widths`. PyTorch has a sparse `nn.Embedding` with row-wise Adagrad (`Adagrad` on a
sparse gradient) and Adam on the rest; recjax has its row-wise AdaGrad and Adam. First losses must agree, the
parameters being copied. `--growth` then measures recjax alone with other tables. Processor time of the fastest step,
which other work on the machine changes little, one thread on either side. Prints markdown.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np

from recjax.core import optim, state
from recjax.core.module import Functional
from recjax.core.optim import Group, Optimizer
from recjax.core.step import make_train_step
from recjax.data.fields import FIRST_ROW, FieldShape, table_rows
from recjax.losses.binary_heads import BinaryHead
from recjax.models.ranker import Ranker
from recjax.nn.crossing import Cross
from recjax.nn.field_vectors import FieldConfig
from recjax.nn.tower import TowerConfig

Products = Literal["float32", "bfloat16"]
PRODUCTS: tuple[Products, ...] = ("float32", "bfloat16")
Batch = dict[str, np.ndarray]


def shapes(args: argparse.Namespace, rows: int) -> list[FieldShape]:
    """Fields of equal size."""
    size = rows // args.fields
    return [
        FieldShape(name=f"f{i:02}", kind="categorical", rows=size, offset=FIRST_ROW + i * size)
        for i in range(args.fields)
    ]


def batches(args: argparse.Namespace, rows: int) -> Iterator[Batch]:
    """Random rows, the values of a field as often as Zipf's law has it."""
    draw, fields = np.random.default_rng(0), shapes(args, rows)
    while True:
        batch = {"label/click": (draw.random(args.batch) < 0.3).astype(np.float32)}
        batch["weight"] = np.ones(args.batch, np.float32)
        for field in fields:
            value = np.exp(draw.random(args.batch) * np.log(field.rows)).astype(np.int64) % field.rows
            batch[f"field/{field.name}"] = (field.offset + value).astype(np.int32)
        yield batch


def recjax_step(args: argparse.Namespace, rows: int, products: Products) -> tuple[Callable[[Batch], float], Any]:
    """A step that gives its loss, and the parameters that it starts from."""
    fields = shapes(args, rows)
    interaction = Cross(layers=args.layers, deep=TowerConfig(widths=tuple(args.widths)))
    model = Functional(
        functools.partial(
            Ranker,
            num_rows=table_rows(fields),
            fields=fields,
            interaction=interaction,
            inputs=FieldConfig(width=args.width),
            products=products,
        )
    )
    config = Optimizer(kind="adam", groups=(("^table$", Group(kind="rowwise_adagrad")),))
    params = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = optim.make(config, params, 1000)
    row_wise, frozen = optim.paths_of(config, params)
    objective = BinaryHead(name="click", head="label", label="click")
    step = make_train_step(model, (objective,), optimizer, seed=0, row_wise=row_wise, frozen=frozen)
    step = jax.jit(step, donate_argnums=0)
    now = jax.jit(lambda key: state.create(model.init(key), optimizer))(jax.random.key(0))
    start = jax.tree.map(np.array, now.params) if rows <= args.rows else None

    def run(batch: Batch) -> float:
        nonlocal now
        now, metrics = step(now, {k: jnp.asarray(x) for k, x in batch.items()}, {})
        return float(metrics["loss"])

    return run, start


def torch_step(args: argparse.Namespace, start: Any) -> Callable[[Batch], float]:
    """The same in plain PyTorch, from the same parameters."""
    import torch
    from torch import nn

    torch.set_num_threads(1)

    class DCNv2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = args.fields * args.width
            self.table = nn.Embedding(*start["table"].shape, sparse=True)
            self.cross = nn.ModuleList(nn.Linear(flat, flat) for _ in range(args.layers))
            layers, inner = [], flat
            for width in args.widths:
                layers += [nn.Linear(inner, width), nn.ReLU()]
                inner = width
            self.deep = nn.Sequential(*layers)
            self.head = nn.Linear(flat + inner, 1)

        def forward(self, ids: Any) -> Any:
            first = x = self.table(ids).flatten(1)
            for layer in self.cross:
                x = x + first * layer(x)
            return self.head(torch.cat([x, self.deep(first)], dim=1)).squeeze(1)

    model, inside = DCNv2(), start["interaction"]
    linears = [(model.cross[i], inside[f"cross{i}"]) for i in range(args.layers)]
    linears += [(model.deep[2 * i], inside["deep"][f"layer{i}"]) for i in range(len(args.widths))]
    with torch.no_grad():
        model.table.weight.copy_(torch.from_numpy(start["table"]))
        for linear, p in [*linears, (model.head, start["head_label"]["output"]["out"])]:
            linear.weight.copy_(torch.from_numpy(p["weight"].T.copy()))
            linear.bias.copy_(torch.from_numpy(p["bias"]))
    rest = [p for name, p in model.named_parameters() if not name.startswith("table")]
    optimizers = [torch.optim.Adagrad([model.table.weight], lr=1e-3), torch.optim.Adam(rest, lr=1e-3)]
    loss_of = nn.BCEWithLogitsLoss()

    def run(batch: Batch) -> float:
        names = sorted(name for name in batch if name.startswith("field/"))
        ids = torch.from_numpy(np.stack([batch[name] for name in names], axis=1).astype(np.int64))
        loss = loss_of(model(ids), torch.from_numpy(batch["label/click"]))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return float(loss)

    return run


def fastest(run: Callable[[Batch], float], given: Iterator[Batch], steps: int) -> float:
    """Seconds of processor time of the fastest step after the first two."""
    seconds = []
    for _ in range(steps + 2):
        batch = next(given)
        start = time.process_time()
        run(batch)
        seconds.append(time.process_time() - start)
    return min(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--growth", type=int, nargs="*", default=[10**5, 10**6, 10**7])
    parser.add_argument("--fields", type=int, default=39)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[400, 400])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--products", choices=PRODUCTS, default="bfloat16", help="of the steps of --growth")
    args = parser.parse_args()
    runs, start = {}, None
    for products in PRODUCTS:
        runs[f"recjax, {products} products"], start = recjax_step(args, args.rows, products)
    runs["PyTorch"] = torch_step(args, start)
    first = next(batches(args, args.rows))
    losses = [run(first) for run in runs.values()]
    if max(losses) - min(losses) > 1e-3:
        raise SystemExit(f"not the same network: the losses of the first batch are {losses}")
    print(f"Batch {args.batch}, {args.fields} fields of width {args.width}, {args.rows:,} rows, one thread.\n")
    found = {name: fastest(run, batches(args, args.rows), args.steps) for name, run in runs.items()}
    print("| | CPU ms | rows/s | against PyTorch |\n|---|---|---|---|")
    for name, seconds in found.items():
        ratio = found["PyTorch"] / seconds
        print(f"| {name} | {seconds * 1e3:,.0f} | {args.batch / seconds:,.0f} | {ratio:.2f} |", flush=True)
    if args.growth:
        print("\n| rows | CPU ms |\n|---|---|")
    for rows in args.growth:
        seconds = fastest(recjax_step(args, rows, args.products)[0], batches(args, rows), args.steps)
        print(f"| {rows:,} | {seconds * 1e3:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
