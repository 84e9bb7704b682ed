"""One side of the evaluation benchmark: ranks every user once for each line read, and prints what it took.

Both sides have the same users, weights of the same shape, and the same job: the rank of every user's last item among
all items but those the user had, and the 50 best items.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from step_data import FIRST_ITEM, histories

WIDTH, HEADS, LAYERS, BATCH, BEST = 64, 2, 2, 256, 50


def torch_side(args: argparse.Namespace) -> tuple[str, int, Callable[[], float]]:
    """Eager PyTorch: users in their order, rows padded to the full length, all slots computed."""
    import torch
    from torch_sasrec import SasRec

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    users, items = histories(args.data)
    model = SasRec(FIRST_ITEM + items, args.length, WIDTH, HEADS, LAYERS, mlp_width=args.mlp, dropout=0.2).eval()
    table = model.table.weight

    @torch.no_grad()
    def rank(part: list[np.ndarray]) -> list[int]:
        ids = np.zeros((len(part), args.length), np.int64)
        for row, events in enumerate(part):
            recent = events[:-1][-args.length :]
            ids[row, : len(recent)] = recent
        last = torch.tensor([min(len(events) - 1, args.length) - 1 for events in part])
        hidden = model(torch.from_numpy(ids))[torch.arange(len(part)), last]
        scores = hidden @ table.T
        label = torch.tensor([int(events[-1]) for events in part])[:, None]
        target = scores.gather(1, label)
        rows = np.repeat(np.arange(len(part)), [len(events) - 1 for events in part])
        seen = np.concatenate([events[:-1] for events in part]).astype(np.int64)
        scores[torch.from_numpy(rows), torch.from_numpy(seen)] = -torch.inf
        scores[:, :FIRST_ITEM] = -torch.inf
        if args.best:
            scores.topk(BEST, dim=1)
        tie = (scores == target) & (torch.arange(scores.shape[1])[None] < label)
        return ((scores > target) | tie).sum(1).tolist()

    def run() -> float:
        ranks = [r for start in range(0, len(users), BATCH) for r in rank(users[start : start + BATCH])]
        return float(np.mean(np.array(ranks) < 10))

    return torch.__version__, len(users), run


def recjax_side(args: argparse.Namespace) -> tuple[str, int, Callable[[], float]]:
    """The evaluator of `recjax evaluate`, on one device for each core."""
    import jax
    import polars as pl

    jax.config.update("jax_num_cpu_devices", args.threads)
    from recjax.core.module import Functional
    from recjax.core.sharding import MeshConfig, make_mesh
    from recjax.data.examples import Examples, write_examples
    from recjax.data.record import Column, Field
    from recjax.data.vocab import ItemVocab
    from recjax.evaluation import Evaluation, Evaluator
    from recjax.models.sequence import Sequence
    from recjax.nn.transformer import TransformerConfig

    users, items = histories(args.data)
    vocab = ItemVocab(tuple(map(str, range(items))))
    frame = pl.DataFrame({"row": np.arange(items) + FIRST_ITEM, "item_id": np.arange(items), "train_count": 1})
    fields = {"user_index": "int64", "items": "int32", "label": "int32", "train_events": "int32"}
    schema = [Field(name=name, dtype=dtype, rank=int(name == "items")) for name, dtype in fields.items()]
    lengths = np.array([len(events) - 1 for events in users])
    columns = {
        "user_index": Column(np.arange(len(users))),
        "items": Column(np.concatenate([events[:-1] for events in users]), np.concatenate([[0], lengths.cumsum()])),
        "label": Column(np.array([events[-1] for events in users])),
        "train_events": Column(lengths),
    }
    path = Path(tempfile.mkdtemp()) / "examples"
    with write_examples(path, vocab=vocab, items=frame, users=frame, facts={"content_hash": "0"}) as writer:
        writer.add("test", schema, columns)
    config = TransformerConfig(num_layers=LAYERS, width=WIDTH, num_heads=HEADS, mlp_width=args.mlp, ffn="relu")
    model = Functional(
        lambda rngs: Sequence(
            num_rows=vocab.num_rows, encoder=config, max_length=args.length, scale_embedding=True, rngs=rngs
        )
    )
    mesh = make_mesh(MeshConfig(shape=f"data={args.threads}"))
    with mesh.activate():
        params = jax.jit(model.init)(jax.random.key(0))
        params = jax.device_put(params, mesh.shardings(model.axes))
    evaluator = Evaluator(
        Examples.open(path),
        split="test",
        config=Evaluation(k=(10, BEST), batch_size=BATCH),
        model=model,
        history_length=args.length,
        mesh=mesh,
    )
    return jax.__version__, len(users), lambda: evaluator(params).values["recall@10"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--who", choices=["torch", "torch_rank", "recjax"], required=True)
    parser.add_argument("--data", default="")
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--mlp", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.best = args.who == "torch"
    try:
        version, users, run = recjax_side(args) if args.who == "recjax" else torch_side(args)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    start = time.perf_counter()
    run()
    print(json.dumps({"version": version, "users": users, "first_s": time.perf_counter() - start}), flush=True)
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        recall = run()
        seconds, used = time.perf_counter() - start, time.process_time() - used
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "cpu_s": used, "recall@10": recall, "peak_mib": peak}), flush=True)


if __name__ == "__main__":
    main()
