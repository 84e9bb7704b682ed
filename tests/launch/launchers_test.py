"""What the launchers would do: read by the parsers of those who get it, and done to stand-ins that write it down."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from recjax.core.errors import ConfigError
from recjax.launch import __main__ as verb
from recjax.launch import slurm
from recjax.launch.plan import LaunchError, Plan, check_mesh, job_of
from recjax.launch.surroundings import JOBSET, decide
from recjax.launch.tpu import KINDS, slice_of

SCHEMA = json.loads(Path(__file__).with_name("jobset_schema.json").read_text())


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert verb.main(list(words)) == 0
    return capsys.readouterr().out


def stand_in(folder: Path, name: str, text: str) -> None:
    """A command of that name, which adds its arguments to `calls`."""
    path = folder / name
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$(printf "%q " {name} "$@")" >> {folder}/calls\n{text}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def calls(folder: Path) -> list[list[str]]:
    return [shlex.split(line.replace("$'", "'")) for line in (folder / "calls").read_text().splitlines()]


def bash(folder: Path, script: str, **env: str) -> int:
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(["bash", "-c", script], env={**os.environ, "PATH": path, **env}, timeout=60).returncode


# GKE


def jobset(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    text = shown(capsys, "gke", "sasrec", "--image=repo/recjax:1", *words)
    body = text.partition(".yaml\n")[2].rpartition("\n\nkubectl apply")[0]
    found = yaml.safe_load(body)
    jsonschema.validate(found, SCHEMA)
    return found


@pytest.mark.parametrize(
    ("words", "jobs", "pods", "chips"),
    [
        (("--tpu=v6e:4x4",), 1, 4, {"google.com/tpu": 4}),
        (("--tpu=v5p:4x4x8", "--slices=3", "--spot", "--queue=q", "--bucket=b"), 3, 32, {"google.com/tpu": 4}),
        (("--tpu=v5e:2x4", "--gin.MESH=data=8"), 1, 1, {"google.com/tpu": 8}),
        (("--tpu=tpu7x:2x2x2", "--gin.MESH=data=16"), 1, 2, {"google.com/tpu": 4}),
        (("--pods=5", "--gpus=8", "--service_account=me"), 1, 5, {"nvidia.com/gpu": 8}),
        (("--pods=2",), 1, 2, None),
    ],
)
def test_a_jobset_is_one(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], jobs: int, pods: int, chips: dict[str, int] | None
) -> None:
    spec = jobset(capsys, *words, "--workdir=/bucket/a b")["spec"]
    (group,) = spec["replicatedJobs"]
    job = group["template"]["spec"]
    assert (group["replicas"], job["parallelism"], job["completions"]) == (jobs, pods, pods)
    (container,) = job["template"]["spec"]["containers"]
    assert container.get("resources", {}).get("limits") == chips == container.get("resources", {}).get("requests")
    assert container["command"][:3] == ["recjax", "run", "sasrec"] and "--workdir=/bucket/a b" in container["command"]
    # A mistake of the user ends it; what else fails a pod fails its job at once, and restarts the set.
    assert job["backoffLimit"] == 0 and spec["failurePolicy"]["maxRestarts"] == 100
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert spec["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    assert spec["coordinator"]["replicatedJob"] == group["name"]


def test_the_pods_of_a_jobset_find_each_other_by_what_it_sets(capsys: pytest.CaptureFixture[str]) -> None:
    """The variables of every pod, as Kubernetes fills them in, make each another process of the right number."""
    spec = jobset(capsys, "--pods=3", "--gpus=1", "--gin.MESH=data=3")["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    env = {e["name"]: e for e in job["template"]["spec"]["containers"][0]["env"]}
    annotations = {"jobset.sigs.k8s.io/coordinator": "sasrec-workers-0-0.sasrec", "jobset.sigs.k8s.io/job-index": "0"}

    def value(entry: dict[str, Any]) -> str:
        if "value" in entry:
            return entry["value"]
        found = re.fullmatch(r"metadata\.annotations\['(.+)'\]", entry["valueFrom"]["fieldRef"]["fieldPath"])
        assert found is not None
        return annotations[found[1]]

    assert {*env, "JOB_COMPLETION_INDEX"} == set(JOBSET)
    for pod in range(3):
        told = {name: value(entry) for name, entry in env.items()} | {"JOB_COMPLETION_INDEX": str(pod)}
        cluster = decide(told)
        assert (cluster.process, cluster.processes) == (pod, 3)
        assert cluster.coordinator == "sasrec-workers-0-0.sasrec:8482"


def test_xpk_is_called_with_what_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--image=i", "--tpu=v5p:4x4x8", "--slices=2", "--xpk=c", "--zone=z", "--project=p", "--gin.SEED=1")
    found = shlex.split(shown(capsys, "gke", "sasrec", *words).splitlines()[-1])
    assert found[:3] == ["xpk", "workload", "create"]
    flags = dict(word.removeprefix("--").split("=", 1) for word in found[3:])
    assert flags == {
        "workload": "sasrec", "cluster": "c", "tpu-type": "v5p-256", "num-slices": "2", "docker-image": "i",
        "max-restarts": "100", "command": "recjax run sasrec --gin.SEED=1", "project": "p", "zone": "z",
    }  # fmt: skip


# SLURM


def test_a_batch_script_asks_for_what_was_said_and_parses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = shown(capsys, "slurm", "sasrec", "--nodes=4", "--gpus=8", "--time=1:00:00", "--partition=p", "--gin.SEED=1")
    script = text.partition(".sbatch\n")[2].rpartition("\n\nsbatch ")[0]
    head = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert script.startswith("#!/bin/bash\n") and script.splitlines()[1 : 1 + len(head)] == head
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in head)
    assert options == {
        "job-name": "sasrec", "nodes": "4", "ntasks-per-node": "1", "gpus-per-node": "8", "time": "1:00:00",
        "partition": "p", "signal": "TERM@120", "requeue": "", "open-mode": "append", "output": "%x-%j.log",
    }  # fmt: skip
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "srun --kill-on-bad-exit=1 --label recjax run sasrec --gin.SEED=1 &" in script


@pytest.mark.parametrize(
    ("status", "restarts", "again"), [(0, 0, False), (143, 0, True), (75, 0, True), (137, 3, True), (143, 100, False)]
)
def test_the_batch_script_is_queued_again_when_the_end_says_so(
    tmp_path: Path, status: int, restarts: int, again: bool
) -> None:
    stand_in(tmp_path, "srun", f"exit {status}")
    stand_in(tmp_path, "scontrol", "")
    args = argparse.Namespace(nodes=1, gpus=0, cpus=0, time="", partition="", account="", setup="")
    text = slurm.script(job_of("sasrec", "run", []), args)
    assert bash(tmp_path, text, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts)) == status
    done = calls(tmp_path)
    assert done[0] == ["srun", "--kill-on-bad-exit=1", "--label", "recjax", "run", "sasrec"]
    assert done[1:] == ([["scontrol", "requeue", "7"]] if again else [])


def test_the_batch_script_passes_sigterm_on_and_waits(tmp_path: Path) -> None:
    stand_in(
        tmp_path,
        "srun",
        "trap 'echo told >> $0.log; sleep 0.2; exit 143' TERM\ntouch $0.up\nwhile :; do sleep 0.05; done",
    )
    stand_in(tmp_path, "scontrol", "")
    args = argparse.Namespace(nodes=1, gpus=0, cpus=0, time="", partition="", account="", setup="")
    text = slurm.script(job_of("sasrec", "run", []), args)
    (tmp_path / "job").write_text(text)
    up = f"(while [ ! -e {tmp_path}/srun.up ]; do sleep 0.02; done; kill -TERM $$) & exec bash {tmp_path}/job"
    assert bash(tmp_path, up, SLURM_JOB_ID="7") == 143
    assert (tmp_path / "srun.log").read_text() == "told\n" and calls(tmp_path)[-1] == ["scontrol", "requeue", "7"]


# TPU VMs


def queued(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    text = shown(capsys, "tpu_vm", "sasrec", "--project=p", "--zone=us-east5-b", *words)
    script = text.partition(".sh\n")[2].rpartition("\n\nbash ")[0]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    return script


GCLOUD = """
case "$*" in
  *" describe "*) head -1 {folder}/states; [ $(wc -l < {folder}/states) -gt 1 ] && sed -i 1d {folder}/states ;;
  *" ssh "*"recjax run"*) exit $(cat {folder}/status) ;;
esac
"""


def flags_of(words: list[str]) -> dict[str, str]:
    """--name value and --name=value."""
    found, at = {}, 0
    while at < len(words):
        name, sep, value = words[at].partition("=")
        follows = not sep and at + 1 < len(words) and not words[at + 1].startswith("--")
        if name.startswith("--"):
            found[name] = value if sep else words[at + 1] if follows else ""
        at += 2 if follows and name.startswith("--") else 1
    return found


def test_slices_are_asked_for_set_up_and_trained_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = queued(capsys, "--tpu=v5e:4x4", "--slices=2", "--spot", "--valid=6h")
    stand_in(tmp_path, "gcloud", GCLOUD.format(folder=tmp_path))
    stand_in(tmp_path, "sleep", "")
    (tmp_path / "states").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    (tmp_path / "status").write_text("0")
    assert bash(tmp_path, script) == 0
    done = [call for call in calls(tmp_path) if call[0] == "gcloud"]
    assert done[0][1:6] == ["compute", "tpus", "queued-resources", "create", "sasrec"]
    assert flags_of(done[0][6:]) == {
        "--project": "p", "--zone": "us-east5-b", "--accelerator-type": "v5litepod-16", "--spot": "",
        "--runtime-version": "v2-alpha-tpuv5-lite", "--node-count": "2", "--node-prefix": "sasrec",
        "--valid-until-duration": "6h",
    }  # fmt: skip
    assert [call[4] for call in done[1:4]] == ["describe"] * 3
    assert [call[4] for call in done[4:6]] == ["scp"] * 2
    trained = [call for call in done if call[4] == "ssh" and "recjax run sasrec" in " ".join(call)]
    assert sorted(call[5] for call in trained) == ["sasrec-0", "sasrec-1"]
    assert all("--worker=all" in call for call in trained)


def test_slices_that_were_taken_away_are_asked_for_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = queued(capsys, "--tpu=v5e:2x2", "--spot", "--restarts=2")
    stand_in(tmp_path, "gcloud", GCLOUD.format(folder=tmp_path))
    (tmp_path / "states").write_text("ACTIVE\nSUSPENDED\n")
    (tmp_path / "status").write_text("255")
    assert bash(tmp_path, script) == 1
    assert [call[4] for call in calls(tmp_path)].count("create") == 3
    assert [call[4] for call in calls(tmp_path)].count("delete") == 3
    (tmp_path / "calls").unlink()
    (tmp_path / "states").write_text("ACTIVE\n")
    (tmp_path / "status").write_text("2")  # a mistake of the user is not tried again
    assert bash(tmp_path, script) == 2
    assert [call[4] for call in calls(tmp_path)].count("create") == 1


def test_a_managed_instance_group(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--tpu=v6e:4x4", "--group", "--image=repo/r:1", "--project=p", "--zone=us-east5-b", "--spot")
    lines = shown(capsys, "tpu_vm", "sasrec", *words).splitlines()
    policy, template, group = (shlex.split(line) for line in lines[-3:])
    assert policy[1:5] == ["compute", "resource-policies", "create", "workload-policy"]
    assert flags_of(policy)["--accelerator-topology"] == "4x4" and flags_of(policy)["--region"] == "us-east5"
    assert flags_of(template)["--machine-type"] == "ct6e-standard-4t"
    assert flags_of(template)["--metadata-from-file"].startswith("startup-script=")
    assert flags_of(group)["--size"] == "4"
    assert flags_of(group)["--workload-policy"] == f"projects/p/regions/us-east5/resourcePolicies/{policy[5]}"


@pytest.mark.parametrize(
    "words",
    [
        ("tpu_vm", "sasrec", "--project=p", "--zone=z-a"),
        ("tpu_vm", "sasrec", "--project=p", "--zone=z-a", "--tpu=tpu7x:2x2x1"),
        ("tpu_vm", "sasrec", "--project=p", "--zone=z-a", "--tpu=v6e:4x4", "--group", "--image=i", "--slices=2"),
        ("tpu_vm", "sasrec", "--project=p", "--zone=z-a", "--tpu=v6e:4x4", "--gin.MESH=data=8"),
        ("gke", "sasrec", "--tpu=v6e:4x4"),
        ("gke", "sasrec", "--image=i", "--tpu=v9:4x4"),
        ("gke", "sasrec", "--image=i", "--tpu=v6e:3x3"),
        ("gke", "sasrec", "--image=i", "--xpk=c"),
        ("gke", "nosuchrecipe", "--image=i"),
        ("gke", "--image=i"),
        ("ray", "sasrec", "--tpu=v6e:4x4"),
        ("slurm", "sasrec", "--verb=serve"),
        ("local", "sasrec", "--processes=2", "--devices=4", "--gin.MESH=data=4", "--dry-run"),
        ("local", "sasrec", "--gin_fiel=x", "--dry-run"),
        ("cloud", "sasrec"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        verb.main(list(words))


def test_names_and_numbers_of_slices() -> None:
    found = {
        name: slice_of(name) for name in ("v4:2x2x4", "v5e:1x1", "v5e:16x16", "v5p:2x2x1", "v6e:2x4", "tpu7x:4x4x4")
    }
    told = {name: (s.accelerator, s.hosts, s.chips_per_host, s.devices, s.machine) for name, s in found.items()}
    assert told == {
        "v4:2x2x4": ("v4-32", 4, 4, 16, "ct4p-hightpu-4t"),
        "v5e:1x1": ("v5litepod-1", 1, 1, 1, "ct5lp-hightpu-1t"),
        "v5e:16x16": ("v5litepod-256", 64, 4, 256, "ct5lp-hightpu-4t"),
        "v5p:2x2x1": ("v5p-8", 1, 4, 4, "ct5p-hightpu-4t"),
        "v6e:2x4": ("v6e-8", 1, 8, 8, "ct6e-standard-8t"),
        "tpu7x:4x4x4": ("tpu7x-128", 16, 4, 128, "tpu7x-standard-4t"),
    }
    assert set(KINDS) == {"v4", "v5e", "v5p", "v6e", "tpu7x"}


# Ray


def test_the_ray_script_is_python_that_trains(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "ray", "sasrec", "--verb=train", "--tpu=v6e:4x4", "--slices=2", "--gin.SEED=1")
    script = text.partition(".py\n")[2].rpartition("\n\nray job submit")[0]
    names: dict[str, Any] = {}
    made: list[Any] = []
    fake = {"FailureConfig": dict, "RunConfig": dict, "ScalingConfig": dict}

    class Trainer:
        def __init__(self, function: Callable[..., Any], **told: Any) -> None:
            made.append((function.__name__, told))

        def fit(self) -> None:
            made.append("fit")

    code = re.sub(r"^(import ray|from ray.*)$", "", script, flags=re.MULTILINE)
    ray = argparse.Namespace(init=lambda: None)
    exec(compile(code, "ray.py", "exec"), {"__name__": "__main__", "ray": ray, "JaxTrainer": Trainer, **fake}, names)
    (name, told), end = made
    assert (name, end) == ("train", "fit")
    assert told["train_loop_config"] == {"words": ["sasrec", "--gin.SEED=1"]}
    assert told["scaling_config"] == {
        "num_workers": 8,
        "use_tpu": True,
        "topology": "4x4",
        "accelerator_type": "TPU-V6E",
    }
    assert told["run_config"]["failure_config"] == {"max_failures": 100}


def test_a_plan_is_carried_out_in_order_and_stops_where_it_fails(tmp_path: Path, monkeypatch: Any) -> None:
    stand_in(tmp_path, "one", "")
    stand_in(tmp_path, "two", "exit 3")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    plan = Plan(files={"a.yaml": "x: 1\n"}, commands=(("one", "a b"), ("two",), ("one", "never")))
    with pytest.raises(LaunchError, match="two ended with status 3"):
        plan.carry_out(tmp_path / "out")
    assert calls(tmp_path) == [["one", "a b"], ["two"]] and (tmp_path / "out" / "a.yaml").read_text() == "x: 1\n"
    with pytest.raises(LaunchError, match="nosuch is not installed"):
        Plan(commands=(("nosuch",),)).carry_out(tmp_path / "out")


def test_the_mesh_is_counted_before_machines_are_booked() -> None:
    job = job_of("sasrec", "run", ["--gin.MESH=data=-1,model=2"])
    check_mesh(job, 8)
    for mesh, devices in (("data=-1,model=3", 8), ("data=4", 8), ("data=4,model=4", 8)):
        with pytest.raises(ConfigError, match="8 devices are not the mesh"):
            check_mesh(job_of("sasrec", "run", [f"--gin.MESH={mesh}"]), devices)
