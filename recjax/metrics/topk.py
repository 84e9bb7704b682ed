"""Ranking metrics from the rank of one target per user, as (sum, weight) states that merge exactly.

`rank` is the 0-based place of the target among all candidates (`recjax.index.exact`). With one target per user,
for a cut-off k:
    recall@k = [rank < k]      ndcg@k = [rank < k] / log2(rank + 2)      mrr@k = [rank < k] / (rank + 1)
and without a cut-off mrr = 1 / (rank + 1).
Rows that only fill a batch carry weight 0. States of parts of the data add up to the state of the whole, whatever
way it was cut. numpy in float64: by the time a metric is taken, a user is one integer. A rank among sampled
candidates makes other metrics, which may order systems otherwise: they are named `sampled_...` wherever they appear.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted sum and its weight; adding two is exact merging, `value` is the mean (NaN without any weight)."""

    total: float = 0.0
    weight: float = 0.0

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else float("nan")


State = Mapping[str, Mean]


def per_user(rank: Int[np.ndarray, " n"], ks: Sequence[int]) -> dict[str, Float[np.ndarray, " n"]]:
    """`recall@k`, `ndcg@k` and `mrr@k` of every user, for every k, and `mrr`."""
    place = rank.astype(np.float64)
    values = {f"recall@{k}": (rank < k).astype(np.float64) for k in ks}
    values |= {f"ndcg@{k}": np.where(rank < k, 1.0 / np.log2(place + 2.0), 0.0) for k in ks}
    values |= {f"mrr@{k}": np.where(rank < k, 1.0 / (place + 1.0), 0.0) for k in ks}
    return values | {"mrr": 1.0 / (place + 1.0)}


def topk_state(
    rank: Int[np.ndarray, " n"], ks: Sequence[int], weight: Float[np.ndarray, " n"] | None = None
) -> dict[str, Mean]:
    """The state of every metric of `per_user`; `weight` is 0 for rows that do not count."""
    weight = np.ones(len(rank)) if weight is None else weight.astype(np.float64)
    values = per_user(rank, ks)
    return {name: Mean(float(value @ weight), float(weight.sum())) for name, value in values.items()}


def merge(one: State, other: State) -> dict[str, Mean]:
    """The state of both parts together; a metric that one part lacks is taken from the other."""
    return {name: one.get(name, Mean()) + other.get(name, Mean()) for name in {**one, **other}}


def values(state: State) -> dict[str, float]:
    """The means of a state."""
    return {name: mean.value for name, mean in state.items()}


class Coverage:
    """How much of the catalogue is recommended to anyone: distinct rows among the top k, over catalogue size."""

    def __init__(self, num_rows: int, ks: Sequence[int]) -> None:
        self.seen: dict[int, Bool[np.ndarray, " v"]] = {k: np.zeros(num_rows, bool) for k in ks}

    def add(self, rows: Int[np.ndarray, "n k"], weight: Float[np.ndarray, " n"] | None = None) -> None:
        """Count the recommendations `rows` (best first; row 0 is none) of users with a weight above 0."""
        rows = rows if weight is None else rows[weight > 0]
        for k, seen in self.seen.items():
            if rows.shape[1] < k:
                raise ValueError(f"coverage@{k} needs {k} recommendations, got {rows.shape[1]}")
            seen[rows[:, :k]] = True

    def merge(self, other: "Coverage") -> None:
        """Take over what another part of the users was recommended."""
        for k, seen in self.seen.items():
            seen |= other.seen[k]

    def values(self, valid: Bool[np.ndarray, " v"]) -> dict[str, float]:
        """`coverage@k`, counted among the `valid` rows."""
        size = max(1, int(valid.sum()))
        return {f"coverage@{k}": float((seen & valid).sum() / size) for k, seen in self.seen.items()}
