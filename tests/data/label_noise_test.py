"""Hidden positives: which, how many, and that it does not depend on how rows are batched."""

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.data.label_noise import HiddenPositives

N = 4000
DRAW = np.random.default_rng(0)
LABEL = DRAW.choice(np.float32([-1, 0, 1]), N)
DOMAIN = DRAW.integers(0, 3, N).astype(np.int32)


def applied(noise: HiddenPositives, rows: np.ndarray) -> np.ndarray:
    batch = {"label/click": LABEL[rows], "label/like": LABEL[rows], "domain": DOMAIN[rows]}
    out = noise.apply(batch, rows)
    np.testing.assert_array_equal(out["label/like"], LABEL[rows])
    assert out["label/click"].dtype == np.float32
    return out["label/click"]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_positives_is_hidden_and_nothing_else(share: float) -> None:
    got = applied(HiddenPositives(head="click", share=share), np.arange(N))
    positive = LABEL > 0
    np.testing.assert_array_equal(got[~positive], LABEL[~positive])
    assert abs((got[positive] == 0).mean() - share) < 0.04
    elsewhere = applied(HiddenPositives(head="click", share=share, domains=(1,)), np.arange(N))
    np.testing.assert_array_equal(elsewhere, np.where(DOMAIN == 1, got, LABEL))


def test_it_is_a_matter_of_the_row_and_the_seed_alone() -> None:
    whole, order = applied(HiddenPositives(head="click", share=0.5), np.arange(N)), DRAW.permutation(N)
    parts = [applied(HiddenPositives(head="click", share=0.5), rows) for rows in np.array_split(order, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[order])
    other = applied(HiddenPositives(head="click", share=0.5, seed=1), np.arange(N))
    assert np.any(other != whole)


def test_what_cannot_be_says_so() -> None:
    with pytest.raises(ConfigError, match="share"):
        HiddenPositives(head="click", share=1.5)
    with pytest.raises(ConfigError, match="nobody"):
        HiddenPositives(head="nobody", share=0.5).apply({"label/click": LABEL}, np.arange(N))
