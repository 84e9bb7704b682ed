"""What a model of sequences answers about candidates that it is asked about one by one (`recjax.infer`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recjax.core.module import Params
from recjax.data import answers
from recjax.data.vocab import FIRST_ITEM
from recjax.index.scoring import log_partition
from recjax.infer_catalogue import item_table, results_of_users
from recjax.inference import Inference
from recjax.recommend import batch_of
from recjax.retrieve import encode

FIELD = "asked"  # of a held-out example: the rows of its candidates, the target's first


def candidates(asked: Inference) -> None:
    """`answers`: the log-probability of each candidate of a held-out user as the next item.

    That is of a softmax over the whole catalogue, so that answers to different users can be put in one order.
    """
    num_items = asked.examples.vocab.num_items

    def run(params: Params, prompt: jax.Array, seen: jax.Array, *times: jax.Array) -> Any:
        query, table = encode(asked.model, params, batch_of(prompt, *times))
        row = jnp.arange(table.shape[-2])
        is_item = (row >= FIRST_ITEM) & (row < FIRST_ITEM + num_items)
        return query, log_partition(query, table, valid=is_item)

    head, ids = asked.examples.manifest[FIELD], asked.examples.user_ids()
    table = np.asarray(item_table(asked), np.float32)
    users, labels, logits = {}, {}, {}
    for split in answers.SPLITS:
        examples = asked.examples.source(split)
        rows_of = {int(one["user_index"]): one[FIELD] for one in map(examples.__getitem__, range(len(examples)))}
        said, names, right = [], [], []
        for found, (queries, partitions) in results_of_users(asked, run, split=split):
            for user, query, partition in zip(found.tolist(), queries, partitions, strict=True):
                rows = rows_of[user]
                said.append(table[rows] @ query - partition)
                names += [ids[user]] * len(rows)
                right.append(np.arange(len(rows)) == 0)
        users[split], labels[split] = names, {head: np.concatenate(right)}
        logits[split] = {head: np.concatenate(said)}
    answers.write_answers(asked.out, users, labels, logits, **asked.origin)
