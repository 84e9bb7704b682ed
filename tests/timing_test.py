"""What a report says of the time of a run follows from the lines of its metrics.jsonl."""

import pytest

from recjax.plots import plot_time
from recjax.timing import timing_section, timing_table


def line(step, *, data=0.001, host=0.002, device=0.007, wall=0.0, kept=0.0, **other):
    parts = {"data": data, "host": host, "device": device, "step": data + host + device}
    told = {**parts, "start": 0.0, "evaluate": 0.0, "save": 0.0, "wall": wall, "kept": kept, "goodput": 0.5, **other}
    return {"step": step, "train/loss": 1.0, **{f"time/{name}": value for name, value in told.items()}}


RECORDS = [
    {"step": 5, "train/loss": 2.0},  # of a version that measured nothing
    line(10, start=30.0, wall=60.0, kept=10.0),
    line(20, wall=100.0, kept=40.0, evaluate=15.0, save=5.0),
    {"step": 20, "valid/ndcg@10": 0.5},
    line(30, device=0.1, wall=200.0, kept=120.0, evaluate=5.0),
]


def test_parts_of_a_step_are_medians_and_those_of_the_run_are_sums():
    rows = {name: (time, share) for name, time, share in timing_table(RECORDS).rows}
    assert rows["a step"] == ("10 ms", "")
    assert rows["- waiting for the device"] == ("7 ms", "70%")
    assert rows["- waiting for data"] == ("1 ms", "10%")
    assert rows["the run, from its first start to its last line"] == ("3.3 min", "")
    assert rows["- steps that were kept (goodput)"] == ("2.0 min", "60%")
    assert rows["- evaluating"] == ("20.0 s", "10%")
    assert rows["- starting: compiling, and the first step"] == ("30.0 s", "15%")


@pytest.mark.parametrize("records", [[], RECORDS[:1]])
def test_nothing_is_said_where_nothing_was_measured(records, tmp_path):
    assert timing_section(records) == "" and plot_time(tmp_path / "time.png", records) is None


def test_the_section_has_the_table_and_the_plot(tmp_path):
    path = plot_time(tmp_path / "time.png", RECORDS)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
    section = timing_section(RECORDS, "![time](time.png)")
    assert section.startswith("## Where the time went") and section.endswith("![time](time.png)")
