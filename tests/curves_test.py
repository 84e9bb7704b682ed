"""How validation went, stage beside stage."""

from __future__ import annotations

from recjax.curves import curve, curves_tables

SEEDS = [
    [
        {"step": 10, "valid/auc": 0.6, "valid/log_loss": 0.7},
        {"step": 12, "train/loss": 1.0},
        {"step": 20, "valid/auc": 0.8},
    ],
    [{"step": 10, "valid/auc": 0.7}, {"step": 20, "valid/auc": 0.6}, {"step": 30, "valid/auc": 0.9}],
]


def test_a_curve_is_the_mean_of_its_seeds_where_all_have_it() -> None:
    found = curve(SEEDS, "auc")
    assert list(found) == [10, 20] and abs(found[10] - 0.65) < 1e-12 and abs(found[20] - 0.7) < 1e-12
    assert curve(SEEDS, "log_loss") == {} and curve([], "auc") == {}


def test_a_table_has_a_row_for_each_stage_that_was_evaluated_more_than_once() -> None:
    once = [[{"step": 10, "valid/auc": 0.5}]]
    long = [[{"step": 10 * k, "valid/auc": k / 100} for k in range(1, 31)]]
    [table] = curves_tables({"a": SEEDS, "once": once})
    assert table.header == ["", "10", "20"] and table.rows == [["a", ".6500", ".7000"]]
    [table] = curves_tables({"a": SEEDS, "long": long})
    assert len(table.header) == 11 and table.header[-1] == "300" and table.rows[0][-1] == "-"
    assert curves_tables({"once": once}) == []
