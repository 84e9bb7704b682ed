"""What a user goes on to do, against a loop over rows."""

from __future__ import annotations

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.data.ahead import Ahead, sums_ahead


@pytest.mark.parametrize("seconds", [1, 7, 100])
def test_sums_are_those_of_the_rows_that_follow_and_unknown_where_not_all_are_known(seconds: int) -> None:
    draw = np.random.default_rng(seconds)
    users, times = draw.integers(0, 6, 300), draw.integers(1000, 1200, 300)
    amounts, part = draw.random(300), (times >= 1150).astype(np.int8) + (times >= 1180)
    found = sums_ahead(users, times, amounts, part, seconds)
    for row in range(300):
        after = (users == users[row]) & (times > times[row]) & (times <= times[row] + seconds)
        is_known = times[row] + seconds <= times.max() and not (part[after] > part[row]).any()
        np.testing.assert_allclose(found[row], amounts[after].sum() if is_known else -1, atol=1e-12)
    assert (found >= 0).any() and (found < 0).any()


def test_a_log_of_nothing_and_labels_that_cannot_be() -> None:
    nothing = np.zeros(0, np.int64)
    assert len(sums_ahead(nothing, nothing, np.zeros(0), nothing, 10)) == 0
    for wrong in (lambda: Ahead(name=""), lambda: Ahead(column=""), lambda: Ahead(seconds=0)):
        with pytest.raises(ConfigError):
            wrong()
    assert Ahead().rule == "sum of rating over the next 86,400 seconds"
