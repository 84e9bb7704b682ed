"""Hidden positives: which, how many, and that it does not depend on how rows are batched."""

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.data.label_noise import HiddenPositives, MissingNegatives, MissingPeriod, Totals

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


def test_a_share_of_the_negatives_weighs_nothing() -> None:
    batch = {"label/click": LABEL, "weight": np.full(N, 2.0, np.float32)}
    got = MissingNegatives(head="click", share=0.5).apply(batch, np.arange(N), N)
    np.testing.assert_array_equal(got["label/click"], LABEL)
    np.testing.assert_array_equal(got["weight"][LABEL != 0], 2)
    negative = got["weight"][LABEL == 0]
    assert set(negative) == {0, 2} and abs((negative == 0).mean() - 0.5) < 0.04
    order = DRAW.permutation(N)
    turned = MissingNegatives(head="click").apply({name: x[order] for name, x in batch.items()}, order, N)
    np.testing.assert_array_equal(turned["weight"], got["weight"][order])


def test_the_last_rows_weigh_nothing() -> None:
    rows = DRAW.permutation(N)
    got = MissingPeriod(share=0.25).apply({"weight": np.ones(N, np.float32)}, rows, N)["weight"]
    np.testing.assert_array_equal(got, rows < 0.75 * N)


def test_totals_are_the_rates_of_domains_and_add_up_to_what_is_there() -> None:
    rates = Totals(head="click").rates(LABEL, DOMAIN)
    known = LABEL >= 0
    for domain in range(3):
        mine = known & (DOMAIN == domain)
        np.testing.assert_allclose(rates[domain] * mine.sum(), LABEL[mine].sum(), rtol=1e-6)
    np.testing.assert_array_equal(Totals(head="click").rates(np.float32([1, -1]), np.int32([2, 1])), [-1, -1, 1])


def test_what_cannot_be_says_so() -> None:
    with pytest.raises(ConfigError, match="share"):
        HiddenPositives(head="click", share=1.5)
    with pytest.raises(ConfigError, match="nobody"):
        HiddenPositives(head="nobody", share=0.5).apply({"label/click": LABEL}, np.arange(N))
