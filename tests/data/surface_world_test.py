"""The simulated world of organic content and ads: true chances, tastes that pass, ads that begin later."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recjax.core.errors import ConfigError
from recjax.data.impression_log import read_log
from recjax.data.sources import DataDir
from recjax.data.surface_world import ADS, ORGANIC, SurfaceWorld
from recjax.metrics.auc import auc


def test_the_best_auc_of_a_surface_is_that_of_the_chances() -> None:
    world = SurfaceWorld(rows=20_000)
    made = world.draw()
    told = world.measured(made)
    for number, name in enumerate(("organic", "ads")):
        mine = made.domain == number
        assert told[f"{name}_best_auc"] == round(auc(made.chance[mine].astype(float), made.click[mine]), 4)
        said = made.chance[mine].mean() / 65536
        assert abs(made.click[mine].mean() - said) < 4 * np.sqrt(said * (1 - said) / mine.sum())
    assert told["ads_rows"] == pytest.approx(0.12, abs=0.01) and told["ads_clicks"] < told["organic_clicks"] - 0.05
    assert made.device[made.domain == ADS].mean() < 1.5 - 0.3 < made.device[made.domain == ORGANIC].mean()


def test_an_ad_is_shown_as_one_from_its_month_on_and_organically_before() -> None:
    world = SurfaceWorld(rows=60_000, items=100, ad_items=0.4)
    made, month, begins = world.draw(), world.month(), world.begins()
    ads = np.flatnonzero(begins < world.months)
    assert len(ads) == 40 and set(made.item[made.domain == ADS]) <= set(ads.tolist())
    assert (month[made.domain == ADS] >= begins[made.item[made.domain == ADS]]).all()
    later = ads[begins[ads] > 0]
    assert len(later) >= 10
    for item in later.tolist():  # cold on the surface of ads, known from organic content
        assert ((made.item == item) & (made.domain == ORGANIC) & (month < begins[item])).any()


def test_part_of_a_taste_lasts_and_part_is_gone_after_two_months() -> None:
    def alike(drift: float, apart: int) -> float:
        world = SurfaceWorld(rows=60_000, users=15, items=15, drift=drift, gap=0.0, shift=0.0, ad_items=0.5)
        made, month = world.draw(), world.month()
        total, count = np.zeros((world.months, 225)), np.zeros((world.months, 225))
        pair = made.user * 15 + made.item
        organic = (made.domain == ORGANIC) & (made.device == 0)
        np.add.at(total, (month[organic], pair[organic]), made.score[organic])
        np.add.at(count, (month[organic], pair[organic]), 1)
        score = total / np.maximum(count, 1)
        found = [
            np.corrcoef(score[m][both], score[m + apart][both])[0, 1]
            for m in range(world.months - apart)
            for both in [(count[m] > 0) & (count[m + apart] > 0)]
        ]
        return float(np.mean(found))

    assert alike(0.0, 3) > 0.999
    near, far = alike(1.5, 1), alike(1.5, 2)
    assert near > far + 0.1 and far > 0.2 and abs(far - alike(1.5, 4)) < 0.1


def test_a_seed_gives_the_same_bytes() -> None:
    """Pinned: a change of these numbers is a change of the world, and needs a new version."""
    frame = SurfaceWorld(rows=5000).tables().interactions.drop("surface", "device")
    assert frame.sum().row(0) == (855_773, 516_159, 7_891_058_625_000, 1808, 10_458, 56_928, 44_943)


def test_what_is_written_reads_as_the_world(tmp_path: Path) -> None:
    world = SurfaceWorld(rows=300)
    log, ours = read_log(DataDir(path=str(world.write(tmp_path / "world")))), world.tables().interactions
    by = ["timestamp", "user_id"]
    assert log.rows.sort(by).select(ours.drop("order").columns).equals(ours.drop("order").sort(by))
    assert set(ours["surface"]) == {"organic", "ads"} and "domain" not in ours.columns


def test_settings_that_make_no_world_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"domains": 3}, {"ads": 0.0}, {"months": 0}, {"leak": 2.0}]
    for settings in wrong:
        with pytest.raises(ConfigError, match="makes no world"):
            SurfaceWorld(**settings)
