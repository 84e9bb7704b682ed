"""The simulated world with labels: the same bytes for a seed, and labels that follow what is said of them."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recjax.core.errors import ConfigError
from recjax.data.impression_log import read_log
from recjax.data.rated_world import RatedWorld
from recjax.data.sources import DataDir
from recjax.metrics.auc import auc


def test_a_seed_gives_the_same_bytes() -> None:
    """Pinned: a change of these numbers is a change of the world, and needs a new version."""
    frame = RatedWorld(rows=5000).tables().interactions.drop("domain", "device")
    assert frame.sum().row(0) == (687_389, 483_663, 7_891_058_625_000, 1867, 10_696, 56_928, 55_062)


def test_the_best_auc_is_that_of_the_chances() -> None:
    world = RatedWorld(rows=3000)
    made = world.draw()
    told = world.measured(made)
    assert told["best_auc"] == round(auc(made.chance.astype(float), made.click), 4)
    assert told["clicks"] == round(made.click.mean(), 4)
    decile = np.digitize(made.chance, np.quantile(made.chance, np.arange(0.1, 1, 0.1)))
    for k in range(10):
        mine = decile == k
        said = made.chance[mine].mean() / 65536
        assert abs(made.click[mine].mean() - said) < 4 * np.sqrt(said * (1 - said) / mine.sum()) + 1e-3


def test_a_shift_makes_domains_disagree() -> None:
    def agreement(shift: float) -> float:
        world = RatedWorld(rows=30_000, domains=2, shift=shift, users=20, items=20, noise=0.3)
        made = world.draw()
        clicks, shown = np.zeros((2, 400)), np.zeros((2, 400))
        np.add.at(clicks, (made.domain, made.user * 20 + made.item), made.click)
        np.add.at(shown, (made.domain, made.user * 20 + made.item), 1)
        both = (shown >= 8).all(0)
        rates = clicks[:, both] / shown[:, both]
        return float(np.corrcoef(rates)[0, 1])

    assert agreement(0.0) > 0.8 > 0.5 > agreement(2.0)


def test_ratings_and_clicks_go_together() -> None:
    frame = RatedWorld().tables().interactions
    clicks = frame.group_by("rating").agg(pl.col("click").mean()).sort("rating")["click"].to_list()
    assert len(clicks) == 5 and clicks == sorted(clicks)


def test_what_is_written_reads_as_the_world(tmp_path: Path) -> None:
    world = RatedWorld(rows=300)
    log = read_log(DataDir(path=str(world.write(tmp_path / "world"))))
    ours = world.tables()
    by = ["timestamp", "user_id"]
    assert (
        log.rows.sort(by)
        .select(ours.interactions.drop("order").columns)
        .equals(ours.interactions.drop("order").sort(by))
    )
    assert ours.items is not None and log.sides["items"].equals(ours.items)
    assert json.loads((tmp_path / "world" / "simulated.json").read_text())["measured"]["clicks"] > 0.2


def test_settings_that_make_no_world_are_refused() -> None:
    for settings in ({"rows": 1}, {"domains": 0}, {"shift": -1.0}, {"rank": 9}):
        with pytest.raises(ConfigError, match="makes no world"):
            RatedWorld(**settings)
