"""What the environment of a process says about the others: how many, which one this is, where the first one listens.

Read are the variables that launchers set: ours (`RECJAX_*`, which command-line flags become as well), those of GKE and
Cloud TPU, of SLURM and of a Kubernetes JobSet, and on a Cloud TPU VM its metadata server. Only variables are read, no
process is spoken to, and jax is not needed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from recjax.core.errors import ConfigError

PORT = 8482  # of the coordinator, where nothing says another; the one that Cloud TPU uses
VARIABLES = ("RECJAX_COORDINATOR", "RECJAX_NUM_PROCESSES", "RECJAX_PROCESS_ID")
FLAGS = ("--coordinator", "--processes", "--process")
FROM_FLAGS = "RECJAX_CLUSTER_FROM_FLAGS"
JOBSET = ("JOBSET_COORDINATOR", "JOBSET_JOBS", "JOBSET_PODS", "JOBSET_JOB_INDEX", "JOB_COMPLETION_INDEX")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
_TPU_FILES = ("/dev/accel0", "/dev/vfio/0")
_METADATA_SECONDS = 5.0
# The same range as jax takes, so that a job of both finds itself.
_SLURM_PORTS = range(65535 - 2**12 + 1, 65536)

Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """This process among `processes`; process 0 is the coordinator and listens at `coordinator` (host:port).

    `source` and `why` say what decided it. `hosts` names the machine of every process, where it is known; `device` is
    the number of the one local accelerator that is this process's own, where several processes share a machine. With
    `ask_jax` there are others, and only jax can tell which.
    """

    source: str
    why: str
    coordinator: str = ""
    processes: int = 1
    process: int = 0
    hosts: tuple[str, ...] = ()
    device: int | None = None
    ask_jax: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.process < self.processes:
            raise ConfigError(
                f"process {self.process} of {self.processes} is none of them", where=f"{self.source}: {self.why}"
            )

    @property
    def is_single(self) -> bool:
        """Whether there is nobody to join."""
        return self.processes == 1 and not self.ask_jax

    def name_of(self, process: int) -> str:
        """A process as messages call it."""
        host = self.hosts[process] if process < len(self.hosts) else ""
        return f"process {process} on {host}" if host else f"process {process}"

    def __str__(self) -> str:
        if self.ask_jax:
            return f"as jax finds it ({self.source}: {self.why})"
        if self.is_single:
            return f"one process ({self.source}: {self.why})"
        at = f"coordinator {self.coordinator}"
        return f"{self.name_of(self.process)}, one of {self.processes}, {at} ({self.source}: {self.why})"


def decide(env: Environment | None = None) -> Cluster:
    """What this process is to be: by flags, our variables, those of a scheduler, what jax detects; or else alone.

    Raises `ConfigError` where a source says half of it, instead of going on to the next.
    """
    env = os.environ if env is None else env
    if env.get("JAX_PLATFORMS") == "proxy":
        return Cluster(source="Pathways", why="JAX_PLATFORMS=proxy: one controller sees all devices")
    for found in (_ours(env), _tpu_variables(env), _jobset(env), _slurm(env), _metadata(env), _detected(env)):
        if found is not None:
            return found
    return Cluster(source="nothing", why="no flags, no variables of a launcher, no cluster that jax knows")


def _ours(env: Environment) -> Cluster | None:
    values = [env.get(name, "") for name in VARIABLES]
    if not any(values):
        return None
    source, names = ("flags", FLAGS) if env.get(FROM_FLAGS) else ("environment", VARIABLES)
    why = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
    numbers = all(value.isdigit() for value in values[1:])
    if not all(values) or not numbers or not _is_address(values[0]) or int(values[2]) >= int(values[1]):
        raise ConfigError(
            f"the {source} {'describe' if names is FLAGS else 'describes'} several processes incompletely",
            where=why,
            expected="host:port, a number of processes, and this process's number below it",
        )
    hosts = tuple(filter(None, env.get("RECJAX_HOSTS", "").split(",")))
    count, me = int(values[1]), int(values[2])
    return Cluster(source=source, why=why, coordinator=values[0], processes=count, process=me, hosts=hosts)


def _tpu_variables(env: Environment) -> Cluster | None:
    """The hosts of this slice, as GKE sets them; MEGASCALE_* where there are several slices."""
    listed = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
    if not listed or "TPU_WORKER_ID" not in env or not _may_be_tpu(env):
        return None
    why = f"TPU_WORKER_ID={env['TPU_WORKER_ID']} of {listed}"
    return _slice(env, [host.rpartition(":")[0] or host for host in listed.split(",")], env["TPU_WORKER_ID"], why)


def _slice(env: Environment, hosts: list[str], number: str, why: str) -> Cluster:
    """A process of a slice, in the order of slices, then of hosts: process 0 is on host 0 of slice 0."""
    slices, me = _number(env, "MEGASCALE_NUM_SLICES", 1), _number(env, "MEGASCALE_SLICE_ID", 0)
    if slices > 1:
        why += f", slice {me} of {slices}"
        if "MEGASCALE_COORDINATOR_ADDRESS" not in env:
            needed = "MEGASCALE_COORDINATOR_ADDRESS"
            raise ConfigError("there are several slices, and no word of the first", where=why, expected=needed)
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).partition(":")[0]
    known = {me * len(hosts) + k: host for k, host in enumerate(hosts)} | {0: first}
    count = len(hosts) * slices
    return Cluster(
        source="TPU",
        why=why,
        coordinator=f"{first}:{PORT}",
        processes=count,
        process=me * len(hosts) + _whole(number, "TPU_WORKER_ID"),
        hosts=tuple(known.get(k, f"host {k % len(hosts)} of slice {k // len(hosts)}") for k in range(count)),
    )


def _jobset(env: Environment) -> Cluster | None:
    """The variables that our JobSets set (`launch/gke.py`): pods of jobs, process 0 in pod 0 of job 0."""
    if not all(name in env for name in JOBSET):
        return None
    coordinator, *rest = (env[name] for name in JOBSET)
    jobs, pods, job, pod = (_whole(value, name) for value, name in zip(rest, JOBSET[1:], strict=True))
    return Cluster(
        source="JobSet",
        why=f"pod {pod} of {pods} in job {job} of {jobs}",
        coordinator=coordinator if _is_address(coordinator) else f"{coordinator}:{PORT}",
        processes=jobs * pods,
        process=job * pods + pod,
        hosts=tuple(f"pod {k % pods} of job {k // pods}" for k in range(jobs * pods)),
    )


def _slurm(env: Environment) -> Cluster | None:
    """A step of `srun`; a batch script by itself is no step, and runs alone."""
    if not all(name in env for name in _SLURM):
        return None
    job, count, me = (_whole(env[name], name) for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID"))
    nodes = expand_nodes(env["SLURM_STEP_NODELIST"])
    tasks = expand_tasks(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    hosts = [node for node, here in zip(nodes, tasks, strict=False) for _ in range(here)]
    if len(hosts) != count:  # tasks may be dealt out in other ways; the first node has task 0 in all of them
        hosts = nodes if len(nodes) == count else []
    mine = hosts.count(hosts[me]) if me < len(hosts) else 1
    shared = mine > 1 and not _sees_one(env)
    return Cluster(
        source="SLURM",
        why=f"task {me} of {count} in job {job} on {env['SLURM_STEP_NODELIST']}",
        coordinator=f"{nodes[0]}:{_SLURM_PORTS[job % len(_SLURM_PORTS)]}",
        processes=count,
        process=me,
        hosts=tuple(hosts),
        device=_number(env, "SLURM_LOCALID", 0) if shared else None,
    )


def _metadata(env: Environment) -> Cluster | None:
    """A Cloud TPU VM knows its slice from the metadata server alone."""
    if env.get("TPU_SKIP_MDS_QUERY") or not _may_be_tpu(env) or not any(Path(f).exists() for f in _TPU_FILES):
        return None
    if importlib.util.find_spec("libtpu") is None:
        return None
    server = f"http://{env.get('GCE_METADATA_IP', 'metadata.google.internal')}/computeMetadata/v1/instance/attributes/"

    def attribute(key: str) -> str:
        request = urllib.request.Request(server + key, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode()

    try:
        number, workers = attribute("agent-worker-number"), attribute("worker-network-endpoints")
        lines = (line.partition(":") for line in attribute("tpu-env").splitlines())
    except OSError:
        return None
    told = {name.strip(): value.strip().strip("'") for name, _, value in lines}
    # A host, or name:id:address as it once was.
    hosts = [worker.split(":")[-1] if worker.count(":") == 2 else worker for worker in workers.split(",")]
    return _slice({**told, **env}, hosts, number.strip(), f"metadata: worker {number.strip()} of {len(hosts)}")


def _detected(env: Environment) -> Cluster | None:
    """Clusters that are left to jax: Open MPI, and a Kubernetes job of somebody else's making."""
    if "OMPI_MCA_orte_hnp_uri" in env and "OMPI_COMM_WORLD_SIZE" in env:
        return Cluster(source="jax", why="Open MPI", ask_jax=int(env["OMPI_COMM_WORLD_SIZE"]) > 1)
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        if importlib.util.find_spec("kubernetes") is None:
            why = "an indexed Kubernetes job; to look for its other pods: pip install 'jax[k8s]'"
            return Cluster(source="nothing", why=why)
        return Cluster(source="jax", why="an indexed Kubernetes job", ask_jax=True)
    return None


def expand_nodes(listed: str) -> list[str]:
    """The hosts of a SLURM node list: "a[1-2,07],b" is a1, a2, a07, b."""
    out: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", listed):
        names = [""]
        for text, numbers in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", part):
            names = [name + text + number for name in names for number in (_numbers(numbers) if numbers else [""])]
        out += names
    if not out:
        raise ConfigError(f"cannot read the node list {listed!r}", where="SLURM_STEP_NODELIST")
    return out


def expand_tasks(listed: str) -> list[int]:
    """Tasks of each node: "2(x3),1" is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", listed)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _numbers(listed: str) -> list[str]:
    out = []
    for part in listed.split(","):
        first, _, last = part.partition("-")
        out += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return out


def _sees_one(env: Environment) -> bool:
    """Whether the scheduler has already given each process one accelerator."""
    seen = env.get("CUDA_VISIBLE_DEVICES", env.get("ROCR_VISIBLE_DEVICES"))
    return seen is not None and "," not in seen


def _may_be_tpu(env: Environment) -> bool:
    platforms = env.get("JAX_PLATFORMS", "")
    return not platforms or "tpu" in platforms.split(",")


def _is_address(text: str) -> bool:
    return re.fullmatch(r".+:\d+", text) is not None


def _number(env: Environment, name: str, default: int) -> int:
    return _whole(env[name], name) if env.get(name) else default


def _whole(text: str, name: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"{name}={text!r} is no whole number", where="the environment of this process")
    return int(text)
