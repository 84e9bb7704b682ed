"""Labels that lie ahead of a row: what a user goes on to do, as a number.

A label of the next day is known a day later. Near the end of the log, and where the next part of a split begins before
it is known, it is unknown: a model that is trained until a moment cannot have been told what came after it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from recjax.core.errors import ConfigError

_UNKNOWN = -1.0


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """The label of the head `name`: the sum of `column` over the same user's rows in the `seconds` after a row.

    Rows of the same second are not after it. A row without a value adds nothing.
    """

    name: str = "value"
    column: str = "rating"
    seconds: int = 86_400

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w-]*", self.name) or not self.column or self.seconds < 1:
            raise ConfigError(f"a label cannot be {self}", expected="a name, a column, at least 1 second")

    @property
    def rule(self) -> str:
        """In words."""
        return f"sum of {self.column} over the next {self.seconds:,} seconds"


def sums_ahead(users: np.ndarray, times: np.ndarray, amounts: np.ndarray, part: np.ndarray, seconds: int) -> np.ndarray:
    """float64 [n]: for each row of a user (numbers from 0) at a time, the sum of the user's amounts after it.

    -1 where a row of the window is in a later `part`, or the window ends after the log.
    """
    if not len(times):
        return np.zeros(0)
    since = times - times.min()
    stride = int(since.max()) + seconds + 2
    order = np.lexsort((since, users))
    keys = (users * stride + since)[order]
    reach = np.concatenate([[0.0], np.cumsum(amounts[order])])
    begin = np.searchsorted(keys, users * stride + since, side="right")
    end = np.searchsorted(keys, users * stride + since + seconds, side="right")
    last = part[order][np.maximum(end - 1, 0)]
    is_known = ((end == begin) | (last <= part)) & (times + seconds <= times.max())
    return np.where(is_known, reach[end] - reach[begin], _UNKNOWN)
