"""Groups of users and items, so that a mean over all does not hide who is served well.

Items, by popularity in the training split: walk the catalogue from the most to the least popular item (equal
counts in row order); an item belongs to the `head` while the items before it hold less than a third of all training
events, to the `torso` while they hold less than two thirds, and else to the `tail`. Items without any training
event are `unseen`. So head, torso and tail carry about the same number of events, and very different numbers of
items. Users: `cold` with at most so many training events, else `warm`.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

ITEM_BUCKETS = ("head", "torso", "tail", "unseen")
USER_BUCKETS = ("cold", "warm")


def mass_groups(
    item_count: Float[np.ndarray, " v"], valid: Bool[np.ndarray, " v"], parts: int
) -> Int[np.ndarray, " v"]:
    """0 to parts - 1 for every row, from the most to the least popular: parts of equal number of training events.

    An item is in part p while the items before it hold less than (p + 1) / parts of all events; items without events
    are in the last part. -1 where the row is not an item.
    """
    count = np.where(valid, item_count, 0).astype(np.float64)
    order = np.argsort(-count, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(count[order])[:-1]])
    groups = np.empty(len(count), np.int8)
    bounds = count.sum() * np.arange(1, parts) / parts
    groups[order] = np.searchsorted(bounds, before, side="right")
    groups[count == 0] = parts - 1
    groups[~valid] = -1
    return groups


def item_buckets(item_count: Float[np.ndarray, " v"], valid: Bool[np.ndarray, " v"]) -> Int[np.ndarray, " v"]:
    """Index into `ITEM_BUCKETS` of every row, -1 where the row is not an item."""
    buckets = mass_groups(item_count, valid, 3)
    buckets[valid & (item_count == 0)] = 3
    return buckets


def user_buckets(train_events: Int[np.ndarray, " n"], cold_events: int) -> Int[np.ndarray, " n"]:
    """Index into `USER_BUCKETS`: cold with at most `cold_events` events in the training split."""
    return np.where(train_events <= cold_events, 0, 1).astype(np.int8)


def popularity_percentile(
    item_count: Float[np.ndarray, " v"], valid: Bool[np.ndarray, " v"]
) -> Float[np.ndarray, " v"]:
    """Share of the catalogue that is less popular than each item, equals counted half; 0 where not an item.

    The catalogue's own mean is 0.5; always recommending the most popular item gives nearly 1.
    """
    count = item_count[valid]
    ordered = np.sort(count)
    below = np.searchsorted(ordered, count, side="left")
    upto = np.searchsorted(ordered, count, side="right")
    percentile = np.zeros(len(item_count))
    percentile[valid] = (below + upto) / 2 / max(1, len(count))
    return percentile
