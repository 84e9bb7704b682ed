"""Every second of a loop is put down to one thing, and goodput counts only steps that are still there."""

import json
from datetime import UTC, datetime

import pytest

from recjax.core.clock import Clock, kept_until
from recjax.core.writer import RunWriter, read_metrics


class Time:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(clock, time, steps, *, data=1.0, host=2.0, device=3.0, other=()):
    """Steps of a loop that take these seconds; `other` are (kind, seconds) after each."""
    for _ in range(steps):
        for kind, seconds in (("data", data), ("host", host), ("device", device), *other):
            time.now += seconds
            clock.lap(kind)
        clock.step()


def test_a_step_is_taken_apart_and_the_first_one_is_the_start():
    time = Time()
    clock = Clock(began=1000.0, now=time, date=lambda: 1000.0)
    run(clock, time, 1, host=50.0)
    run(clock, time, 4, other=[("save", 0.5)])
    found = clock.take()
    assert (found["start"], found["save"], found["evaluate"]) == (54.0, 2.0, 0.0)
    assert [found[kind] for kind in ("data", "host", "device", "step")] == [1.0, 2.0, 3.0, 6.0]
    assert (found["kept"], found["wall"]) == (24.0, 80.0) and found["goodput"] == pytest.approx(0.3)
    run(clock, time, 2, data=7.0)
    found = clock.take()
    assert (found["data"], found["start"], found["kept"], found["wall"]) == (7.0, 0.0, 48.0, 104.0)
    assert "step" not in clock.take()  # none since


def test_everything_is_put_down_to_something():
    time = Time()
    clock = Clock(began=0.0, now=time, date=lambda: 0.0)
    run(clock, time, 5, other=[("evaluate", 0.25), ("save", 4.0)])
    found = clock.take()
    parts = sum(found[kind] for kind in ("start", "evaluate", "save")) + 4 * found["step"]
    assert parts == pytest.approx(found["wall"])


def test_what_is_repeated_after_a_restart_counts_once(tmp_path):
    """A run of 30 steps, killed after 20 with a checkpoint at 10, and down for a while."""
    time = Time()
    clock, lines = Clock(began=0.0, now=time, date=lambda: 0.0), []
    for step in (10, 20):
        run(clock, time, 10)
        lines.append({"step": step, **{f"time/{name}": value for name, value in clock.take().items()}})
    assert kept_until(lines, 10) == 9 * 6.0 and kept_until(lines, 9) == 0.0
    again = Clock(began=0.0, kept=kept_until(lines, 10), now=time, date=lambda: 220.0)  # 120 s of steps, 100 s down
    run(again, time, 20)
    found = again.take()
    assert found["kept"] == (9 + 19) * 6.0 and found["wall"] == 340.0
    assert found["goodput"] == pytest.approx(168 / 340)


def test_a_writer_knows_of_the_starts_before(tmp_path):
    with RunWriter(tmp_path, first_step=0, total_steps=9) as writer:
        writer.describe({})
        for step, kept in ((3, 30.0), (6, 60.0)):
            writer.write(step, {"train/loss": 1.0, "time/kept": kept})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    long_ago = datetime.fromtimestamp(datetime.now(UTC).timestamp() - 1000, UTC).isoformat(timespec="seconds")
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "started": long_ago}))
    with RunWriter(tmp_path, first_step=4, total_steps=9) as writer:
        found = writer.clock.take()
        assert found["kept"] == 30.0 and 1000 <= found["wall"] < 1100
        assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [3]
        writer.describe({})
    with RunWriter(tmp_path, first_step=4, total_steps=9) as writer:
        assert writer.clock.take()["wall"] >= 1000  # of the first start, not of the second
