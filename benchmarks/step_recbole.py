"""RecBole's side of the train-step benchmark: its own data set, model and optimiser, one target per row."""

import json
import logging
import sys
import tempfile
from pathlib import Path

from step_data import histories, options, serve


def main() -> None:
    args = options()
    try:
        import torch
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import get_model, get_trainer, init_seed
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    import recbole

    logging.disable(logging.CRITICAL)
    sys.argv = sys.argv[:1]  # RecBole reads the command line by itself
    users, _ = histories(args.data)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "log").mkdir()
        lines = ["user_id:token\titem_id:token\ttimestamp:float"]
        # Two more events for RecBole to hold out, so that it trains on the same ones.
        for user, items in enumerate(users, 1):
            lines += [f"{user}\t{item}\t{time}" for time, item in enumerate([*items, items[0], items[0]])]
        (Path(folder) / "log" / "log.inter").write_text("\n".join(lines) + "\n")
        settings = {
            "data_path": folder,
            "checkpoint_dir": folder,
            "use_gpu": False,
            "show_progress": False,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
            "MAX_ITEM_LIST_LENGTH": args.length,
            "train_batch_size": 512,
            "train_neg_sample_args": None,
            "loss_type": "CE",
            "hidden_size": 64,
            "inner_size": 64,
            "n_heads": 2,
            "n_layers": 2,
            "hidden_dropout_prob": 0.2,
            "attn_dropout_prob": 0.2,
        }
        config = Config(model="SASRec", dataset="log", config_dict=settings)
        init_seed(config["seed"], config["reproducibility"])
        train, _, _ = data_preparation(config, create_dataset(config))
        model = get_model("SASRec")(config, train.dataset)
        trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, model)
        torch.set_num_threads(args.threads)
        batches = [batch for batch, _ in zip(train, range(8), strict=False)]
        real = sum(int(b["item_length"].sum()) for b in batches) / sum(len(b) for b in batches) / args.length
        model.train()

        def run(i: int) -> float:
            trainer.optimizer.zero_grad()
            loss = model.calculate_loss(batches[i])
            loss.backward()
            trainer.optimizer.step()
            return loss.item()

        serve({"version": recbole.__version__, "fill": real}, [len(b) for b in batches], run)


if __name__ == "__main__":
    main()
