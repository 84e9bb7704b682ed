"""Records straight from dicts, as the tests of this folder write them."""

from __future__ import annotations

import numpy as np
import pytest

from recjax.baselines.records import Records


@pytest.fixture
def records_of():
    def make(rows):
        items = [np.asarray(r["items"], np.int32) for r in rows]
        return Records(
            items=np.concatenate([*items, np.zeros(0, np.int32)]),
            offsets=np.concatenate([[0], np.cumsum([len(i) for i in items])]).astype(np.int64),
            user_index=np.array([r["user_index"] for r in rows], np.int64),
            label=np.array([r.get("label", 0) for r in rows], np.int32),
            train_events=np.array([r.get("train_events", 0) for r in rows], np.int32),
        )

    return make
