"""The Batch contract: one flat dict of arrays, with a closed list of field names.

Every producer (pipeline, server, notebook) makes these fields and every consumer (model, objective, metric) looks
them up by name. The first dimension is always the batch row b. Row 0 of a vocabulary is padding; whatever is padded
carries weight 0.
"""

from __future__ import annotations

import re

import numpy as np

PAD = 0

Batch = dict[str, np.ndarray]

FIELDS: dict[str, str] = {
    "history_ids": "int32 [b, l]: item rows, oldest first, 0 where padded; several examples may share a row",
    "history_time": "int64 [b, l]: seconds since 1970, 0 where padded or unknown",
    "query_time": "int64 [b, l]: when the item after each one is asked for; in training and evaluation its own time",
    "masked": "int32 [b, l]: 1 where the item is hidden from the model and is to be predicted",
    "positions": "int32 [b, l]: position inside its own example, restarting at 0 for each packed example",
    "segment_ids": "int32 [b, l]: 1, 2, ... for the examples packed into a row, 0 where padded",
    "prefix": "int32 [b, l]: 1 where a slot is seen by the earlier slots of its example, too: a prompt read as a whole",
    "parents": "int32 [b, l]: segment whose earlier slots a slot sees besides those of its own, 0 where there is none",
    "decoder_ids": "int32 [b, t]: an answer so far, beginning with row 0; the other fields are then of its prompt, "
    "but for target_ids and weight, which are [b, t]",
    "decoder_positions": "int32 [b, t]: position inside its own answer",
    "decoder_segment_ids": "int32 [b, t]: the segment of the prompt that it answers, 0 where padded",
    "target_ids": "int32 [b, l]: the item to be predicted at each position, 0 where there is none",
    "weight": "float32 [b, l]: weight of each target in the loss, 0 where there is none; [b] where rows have labels",
    "label_ids": "int32 [b]: the held-out item of an evaluation row, 0 in rows added to fill the batch",
    "query_at": "int32 [b, q]: the slots of an evaluation row whose next items are asked for, -1 where there is none; "
    "with several users in a row, label_ids and all that is said of a user have b * q entries, row by row",
    "suffix_ids": "int32 [b, m, t]: continuations of the prompt in history_ids, 0 where padded",
    "suffix_at": "int32 [b, m]: the slot of each continuation whose answer is asked for, -1 where there is none",
    "candidate_ids": "int32 [b, n]: items drawn for an evaluation row, to rank the held-out item among, 0 where padded",
    "seen_ids": "int32 [b, n]: items the user already had, 0 where padded; not to be recommended again",
    "user_index": "int64 [b]: number of the user in the prepared examples, -1 in rows added to fill the batch",
    "row_weight": "float32 [b]: 1, or 0 in rows added to fill the batch",
    "item_ids": "int32 [b]: item rows, where a step is about items; weight is [b] then",
    "tokens": "int32 [b, t]: text tokens",
    "domain": "int32 [b]: number of the domain of a row; one that training does not know has the number of domains",
    "owner": "int32 [b]: number of the context of a row, where there are fields of contexts, context/x [r, ...]",
    "negatives": "int32 [b, l, n]: item rows drawn as negatives on the host",
}
# field/x: see recjax.data.fields. context/x: a field that is alike in all rows of a context. label/x: float32 [b], 0 to
# 1, below 0 where unknown. teacher/x: what one said of it. item/x: facts about the catalogue, [v, ...], the same in
# every batch; the engine adds them to what a model sees.
FAMILIES = ("field", "context", "label", "teacher", "item")
_FAMILY = re.compile(rf"({'|'.join(FAMILIES)})/[\w.-]+")


def check_fields(batch: Batch) -> None:
    """Raise `ValueError` for a field name outside the contract (`field/x` and so on are families)."""
    unknown = [k for k in batch if k not in FIELDS and not _FAMILY.fullmatch(k)]
    if unknown:
        raise ValueError(f"fields outside the Batch contract: {unknown}")


def real_tokens(batch: Batch) -> int:
    """Number of positions that carry a training target."""
    return int(np.count_nonzero(batch["weight"]))
