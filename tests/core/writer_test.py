"""The logs of a run: exact, cut at the right place, and written by one process."""

from __future__ import annotations

import io
import json
import math
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from recjax.core import writer
from recjax.core.config import Snapshot
from recjax.core.progress import Progress
from recjax.core.writer import LateMetrics, RunWriter, read_metrics


def open_writer(path, first_step=0):
    return RunWriter(path, first_step=first_step, total_steps=100)


def events(folder):
    """(step, tag, value) of all TensorBoard events, in the order of writing."""
    out = []
    for file in sorted(folder.iterdir(), key=lambda f: f.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            out += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return out


def test_floats_come_back_bit_by_bit(tmp_path):
    values = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    odd = [math.nan, math.inf, -math.inf, -0.0, float(np.finfo(np.float32).tiny), 1 / 3]
    with open_writer(tmp_path) as out:
        for step, value in enumerate([*values, *odd]):
            out.write(step, {"loss": float(value)})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(206))
    got = np.array([line["loss"] for line in lines])
    np.testing.assert_array_equal(got[:200].astype(np.float32).view(np.int32), values.view(np.int32))
    assert [struct.pack("d", x) for x in got[200:]] == [struct.pack("d", x) for x in odd]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert events(tmp_path / "tensorboard")[3] == (3, "loss", values[3])


def test_a_resumed_run_leaves_the_metrics_of_one_that_was_never_stopped(tmp_path):
    def go(path, first, last):
        with open_writer(path, first) as out:
            for step in range(first + 1, last + 1):
                out.write(step, {"loss": 1 / step})
                if step % 2 == 0:
                    out.write(step, {"valid/loss": 2 / step})

    go(tmp_path / "whole", 0, 9)
    go(tmp_path / "killed", 0, 7)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as torn:
        torn.write('{"step": 8, "lo')
    go(tmp_path / "killed", 4, 9)
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    go(tmp_path / "killed", 0, 9)  # no checkpoint: from the start
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == logs[0]


def test_late_metrics_come_one_step_late_and_all_of_them_come():
    late, got = LateMetrics(), []
    add = jax.jit(lambda x: {"loss": x + 0.5, "count": x})
    for step in range(1, 5):
        got.append(late.put(step, add(jnp.float32(step)), waited=step / 10))
    got.append(late.flush())
    assert got[0] is None and late.flush() is None
    assert [(m.step, m.values, m.waited) for m in got[1:]] == [
        (s, {"loss": s + 0.5, "count": float(s)}, s / 10) for s in range(1, 5)
    ]
    assert all(m.seconds >= 0 for m in got[1:])


def test_the_manifest_says_what_ran_and_keeps_earlier_starts(tmp_path):
    for step in (0, 40):
        with open_writer(tmp_path, step) as out:
            out.describe({"command": ["recjax", "train"], "seed": 3}, Snapshot(config="A = 1\n", operative="B = 2\n"))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["seed"], manifest["first_step"], len(manifest["earlier"])) == (3, 40, 1)
    assert manifest["earlier"][0]["first_step"] == 0 and manifest["versions"]["jax"] == jax.__version__
    assert manifest["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert (tmp_path / "config.gin").read_text() == "A = 1\n"
    assert (tmp_path / "operative_config.gin").read_text() == "B = 2\n"


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.jax, "process_index", lambda: 1)
    with open_writer(tmp_path / "run") as out:
        out.describe({})
        out.write(1, {"loss": 1.0})
        out.progress(1, loss=1.0)
        out.message("hello")
    assert not (tmp_path / "run").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_progress_shows_count_fields_rate_and_time_left(stream, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("train", total=400, start=100, stream=stream) as progress:
        for done in range(101, 201):
            clock[0] += 0.5
            progress.update(done, loss=6.125)
        progress.message("[saved]")
    shown = stream.getvalue()
    assert "train" in shown and "loss 6.125" in shown and "2 steps/s" in shown and "[saved]" in shown
    if not stream.isatty():
        lines = [line for line in shown.splitlines() if "loss" in line]
        assert lines[0].startswith("train 101/400") and "101" not in lines[1]
        assert lines[-1].startswith("train 200/400 50%") and lines[-1].endswith("1:40 left")
        assert len(lines) == 6  # one every ten seconds, and where it ended
