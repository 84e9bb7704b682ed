"""PyTorch's side of the train-step benchmark."""

import json

from step_data import FIRST_ITEM, batches, fill, histories, options, serve


def main() -> None:
    args = options()
    try:
        import torch
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    from torch_hstu import Hstu
    from torch_sasrec import SasRec, full_softmax, sampled_softmax

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    users, items = histories(args.data)
    parts = batches(users, args.rows, args.length, packed=False, timed=args.model == "hstu")
    names = ("target_ids", "history_ids", *(("history_time",) if args.model == "hstu" else ()))
    tensors = [tuple(torch.from_numpy(b[k]).long() for k in names) for b in parts]
    shape = {"width": 64, "heads": 2, "layers": 2, "dropout": 0.2}
    if args.model == "hstu":
        model = Hstu(FIRST_ITEM + items, args.length, **shape)
    else:
        model = SasRec(FIRST_ITEM + items, args.length, mlp_width=64, **shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def run(i: int) -> float:
        optimizer.zero_grad()
        targets, *inputs = tensors[i]
        if args.loss == "full":
            loss = full_softmax(model, tuple(inputs), targets)
        else:
            loss = sampled_softmax(model, tuple(inputs), targets, negatives=128, first=FIRST_ITEM, items=items)
        loss.backward()
        optimizer.step()
        return loss.item()

    facts = {"version": torch.__version__, "fill": fill(parts)}
    serve(facts, [int((b["weight"] > 0).sum()) for b in parts], run)


if __name__ == "__main__":
    main()
