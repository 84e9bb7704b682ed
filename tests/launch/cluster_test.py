"""Real processes that find each other by what a scheduler tells them, count their devices and train as one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from recjax.core import saved
from recjax.core.errors import TRY_AGAIN, ClusterError
from recjax.core.writer import read_metrics
from recjax.launch import cluster
from recjax.launch.surroundings import Cluster

JOIN = """
import sys
import time
from recjax import cli
from recjax.core.sharding import MeshConfig, make_mesh

def main(argv):
    from recjax.launch import cluster
    found = cluster.initialize()
    cluster.initialize()
    import jax
    print(found.source, jax.process_index(), jax.process_count(), jax.device_count(), cluster.is_lead())
    make_mesh(MeshConfig(shape="data=2,model=3", preset="fsdp_model"))
    return 0

sys.exit(cli.run(main))
"""


def slurm(processes: int, job: int) -> list[dict[str, str]]:
    """What `srun` tells the tasks of a step on this machine."""
    step = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(processes)}
    step["SLURM_STEP_TASKS_PER_NODE"] = str(processes)
    return [{**step, "SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)} for k in range(processes)]


def jobset(processes: int, port: int) -> list[dict[str, str]]:
    """What our JobSet tells its pods, all of which are here."""
    told = {"JOBSET_COORDINATOR": f"localhost:{port}", "JOBSET_JOBS": "2", "JOBSET_PODS": str(processes // 2)}
    return [
        {**told, "JOBSET_JOB_INDEX": str(job), "JOB_COMPLETION_INDEX": str(pod)}
        for job in range(2)
        for pod in range(processes // 2)
    ]


def start(words: Sequence[str], told: Mapping[str, str], devices: int) -> subprocess.Popen[str]:
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", **told}
    return subprocess.Popen(
        [sys.executable, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def all_of(running: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        said = [process.communicate(timeout=900) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(process.returncode, *both) for process, both in zip(running, said, strict=True)]


def free_number(first: int) -> int:
    """Different for the workers of a test run, and from run to run."""
    return first + os.getpid() % 4000


def test_two_processes_of_a_jobset_meet_count_and_add() -> None:
    found = all_of([start(["-c", JOIN], told, 3) for told in jobset(2, free_number(20000))])
    said = [output.splitlines()[-1] for _, output, _ in found]  # Gloo talks too
    assert said == ["JobSet 0 2 6 True", "JobSet 1 2 6 False"], found
    assert "2 processes x 3 devices = 6; a sum over all of them is right" in found[0][2]
    assert all("(JobSet: pod 0 of 1 in job" in errors for _, _, errors in found)
    assert [status for status, _, _ in found] == [0, 0]


def test_a_process_that_never_comes_is_named_and_may_be_tried_again() -> None:
    """Process 1 of a SLURM step of two is not started."""
    told = {**slurm(2, free_number(0))[0], "RECJAX_START_TIMEOUT": "1"}
    ((status, _, errors),) = all_of([start(["-c", JOIN], told, 1)])
    assert status == TRY_AGAIN and "process 1 on localhost did not come" in errors and "Traceback" not in errors


def test_unequal_hosts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self, process: int) -> None:
            self.process_index = process

    two = Cluster(source="test", why="-", coordinator="a:1", processes=3, hosts=("a", "b", "c"))
    monkeypatch.setattr(cluster.jax, "process_count", lambda: 3)
    monkeypatch.setattr(cluster.jax, "devices", lambda: [Device(k) for k in (0, 0, 1, 2, 2)])
    with pytest.raises(ClusterError, match="process 1 on b has 1"):
        cluster.check_devices(two)


def test_the_sum_over_all_devices_of_one_process_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Cluster(source="test", why="-")
    cluster.check_sum(alone)
    monkeypatch.setattr(cluster.jax, "process_index", lambda: 1)
    with pytest.raises(ClusterError, match="is 16"):  # eight devices that say they are of process 1
        cluster.check_sum(alone)


@pytest.mark.heavy
def test_a_run_goes_on_with_4_then_2_then_1_processes(tiny_gin: Path, tmp_path: Path) -> None:
    """Four tasks of SLURM, two pods of a JobSet, one process; the table and its optimiser rows cut in four, two, one.

    The losses are those of one process, but for the order in which devices add up (float32, nine steps).
    """

    def words(name: str, last: int) -> list[str]:
        more = [f"--gin.TRAIN_STEPS={last}", "--gin.recipe.Recipe.log_every=1", "--gin.SHARDING=fsdp"]
        more += ["--gin.optim.Optimizer.kind=sgd"]
        return ["-m", "recjax", "train", f"--gin_file={tiny_gin}", f"--workdir={tmp_path / name}", *more]

    def finish(running: Sequence[subprocess.Popen[str]]) -> str:
        found = all_of(running)
        assert all(status == 0 for status, _, _ in found), [errors[-2000:] for _, _, errors in found]
        return found[0][2]

    finish([start(words("plain", 9), {}, 1)])
    said = finish([start(words("moved", 3), told, 1) for told in slurm(4, free_number(0))])
    assert "4 processes x 1 devices = 4" in said and re.search(r"SLURM: task 0 of 4 in job \d+ on localhost", said)
    said = finish([start(words("moved", 6), told, 1) for told in jobset(2, free_number(25000))])
    assert "2 processes x 1 devices = 2" in said
    finish([start(words("moved", 9), {}, 1)])
    curves = [
        [line["train/loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "train/loss" in line]
        for name in ("plain", "moved")
    ]
    assert len(curves[0]) == len(curves[1]) == 9
    np.testing.assert_allclose(curves[1], curves[0], rtol=5e-5)
    plain, moved = (saved.read(tmp_path / name / "checkpoints" / saved.name_of(9)) for name in ("plain", "moved"))
    assert plain.iterator["data"] == moved.iterator["data"]


@pytest.mark.heavy
def test_one_of_two_processes_is_told_to_stop_and_both_come_back(tiny_gin: Path, tmp_path: Path) -> None:
    """Both save after the same step and end with 143; `recjax launch local` starts them again, to the same end."""

    def launch(name: str) -> subprocess.Popen[str]:
        words = ["-m", "recjax", "launch", "local", "--verb=train", "--processes=2", "--devices=1"]
        words += [f"--gin_file={tiny_gin}", f"--workdir={tmp_path / name}", "--gin.TRAIN_STEPS=60"]
        return start([*words, "--gin.recipe.Recipe.log_every=1"], {}, 1)

    def losses(name: str) -> list[float]:
        file = tmp_path / name / "metrics.jsonl"
        return [line["train/loss"] for line in (read_metrics(file) if file.exists() else []) if "train/loss" in line]

    plain = launch("plain")
    running = launch("told")
    while running.poll() is None and len(losses("told")) < 3:
        time.sleep(0.05)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    ((status, _, errors),) = all_of([running])
    assert status == 0, errors[-3000:]
    assert "told to stop: saving after this step" in errors and "recjax: status 143, restart 1 of 100" in errors
    assert all_of([plain])[0][0] == 0
    assert losses("told") == losses("plain") and len(losses("plain")) == 60
