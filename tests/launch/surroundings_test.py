"""Which of several voices says how many processes there are, and what it is understood to say."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from recjax.core.errors import ConfigError
from recjax.core.flags import take_cluster
from recjax.launch import surroundings
from recjax.launch.surroundings import Cluster, decide, expand_nodes, expand_tasks

OURS = {"RECJAX_COORDINATOR": "a:1", "RECJAX_NUM_PROCESSES": "2", "RECJAX_PROCESS_ID": "1"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
SLURM |= {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
JOBSET = {"JOBSET_COORDINATOR": "x-workers-0-0.x", "JOBSET_JOBS": "2", "JOBSET_PODS": "3"}
JOBSET |= {"JOBSET_JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "2"}
TPU = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3"}


def place(cluster: Cluster) -> tuple[str, str, int, int]:
    return cluster.source, cluster.coordinator, cluster.processes, cluster.process


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, ("nothing", "", 1, 0)),
        (OURS, ("environment", "a:1", 2, 1)),
        (SLURM, ("SLURM", "n1:61447", 4, 3)),
        (JOBSET, ("JobSet", "x-workers-0-0.x:8482", 6, 5)),
        (TPU, ("TPU", "t0:8482", 4, 2)),
        ({**TPU, "JAX_PLATFORMS": "cpu"}, ("nothing", "", 1, 0)),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, ("TPU", "localhost:8482", 1, 0)),
        (
            {**TPU, "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s0:1"},
            ("TPU", "s0:8482", 8, 6),
        ),
        ({**TPU, "TPU_PROCESS_ADDRESSES": "p0:8476,p1:8476,p2:8476"}, ("TPU", "p0:8482", 3, 2)),
        # What is nearer to the run is heard first.
        ({**JOBSET, **SLURM, **TPU, **OURS}, ("environment", "a:1", 2, 1)),
        ({**JOBSET, **SLURM, **TPU}, ("TPU", "t0:8482", 4, 2)),
        ({**SLURM, "JAX_PLATFORMS": "proxy"}, ("Pathways", "", 1, 0)),
        # A batch script is no step; an interactive shell of an allocation is none either.
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, ("nothing", "", 1, 0)),
        ({"OMPI_MCA_orte_hnp_uri": "1.tcp://a:1", "OMPI_COMM_WORLD_SIZE": "4"}, ("jax", "", 1, 0)),
    ],
)
def test_who_this_is(env: dict[str, str], found: tuple[str, str, int, int]) -> None:
    cluster = decide(env)
    assert place(cluster) == found
    assert cluster.is_single == (found[2] == 1 and found[0] != "jax")
    assert cluster.why and found[0] in str(cluster)


def test_flags_go_before_the_environment() -> None:
    words, told = take_cluster(["train", "x", "--coordinator=b:2", "--processes=3", "--process=2", "--gin.SEED=1"])
    assert words == ["train", "x", "--gin.SEED=1"]
    cluster = decide({**OURS, **SLURM, **told})
    assert place(cluster) == ("flags", "b:2", 3, 2) and "--processes='3'" in cluster.why
    assert take_cluster(["launch", "local", "--processes=2"]) == (["launch", "local", "--processes=2"], {})
    with pytest.raises(ConfigError, match="flags describe several processes incompletely"):
        decide({**OURS, **take_cluster(["train", "--coordinator=b:2"])[1]})


@pytest.mark.parametrize(
    "env",
    [
        {**OURS, "RECJAX_PROCESS_ID": "2"},
        {**OURS, "RECJAX_NUM_PROCESSES": ""},
        {**OURS, "RECJAX_COORDINATOR": "nowhere"},
        {**SLURM, "SLURM_PROCID": "4"},
        {**SLURM, "SLURM_NTASKS": "many"},
        {**JOBSET, "JOB_COMPLETION_INDEX": "3", "JOBSET_JOB_INDEX": "1"},
        {**TPU, "MEGASCALE_NUM_SLICES": "2"},
    ],
)
def test_half_a_description_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        decide(env)


def test_every_process_of_a_job_is_a_different_one_and_has_a_name() -> None:
    for base, vary in (
        (SLURM, [{"SLURM_PROCID": str(k)} for k in range(4)]),
        (JOBSET, [{"JOBSET_JOB_INDEX": str(j), "JOB_COMPLETION_INDEX": str(p)} for j in range(2) for p in range(3)]),
    ):
        found = [decide({**base, **changed}) for changed in vary]
        assert [c.process for c in found] == list(range(found[0].processes))
        assert len({c.coordinator for c in found}) == 1
        assert len({found[0].name_of(k) for k in range(len(found))}) == len(found)
    assert decide(SLURM).hosts == ("n1", "n1", "n2", "n2") and decide(SLURM).name_of(2) == "process 2 on n2"


def test_tasks_that_share_a_node_take_one_accelerator_each() -> None:
    assert decide(SLURM).device == 1
    assert decide({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1"}).device == 1
    assert decide({**SLURM, "CUDA_VISIBLE_DEVICES": "0"}).device is None  # srun has given each its own
    alone = {**SLURM, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert decide(alone).device is None


@pytest.mark.parametrize(
    ("listed", "nodes"),
    [
        ("a", ["a"]),
        ("a,b2", ["a", "b2"]),
        ("n[08-11,20],m", ["n08", "n09", "n10", "n11", "n20", "m"]),
        ("r[1-2]-n[1,3]", ["r1-n1", "r1-n3", "r2-n1", "r2-n3"]),
        ("gpu-1.site", ["gpu-1.site"]),
    ],
)
def test_node_lists(listed: str, nodes: list[str]) -> None:
    assert expand_nodes(listed) == nodes


def test_tasks_of_nodes() -> None:
    assert expand_tasks("2(x3),1") == [2, 2, 2, 1] and expand_tasks("") == []


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A metadata server on this machine, and a file that says there is a TPU."""
    told = {"agent-worker-number": "1", "worker-network-endpoints": "u:0:10.0.0.1,u:1:10.0.0.2", "tpu-env": "A: 'b'\n"}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = told.get(self.path.rpartition("/")[2])
            self.send_response(200 if value is not None and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *args: object) -> None:
            pass

    (tmp_path / "accel0").touch()
    monkeypatch.setattr(surroundings, "_TPU_FILES", (str(tmp_path / "accel0"),))
    monkeypatch.setattr(surroundings.importlib.util, "find_spec", lambda name: object())
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}", **{f"told:{k}": v for k, v in told.items()}}
        server.shutdown()
        thread.join()


def test_a_tpu_vm_asks_its_metadata(metadata: dict[str, str]) -> None:
    env = {"GCE_METADATA_IP": metadata["GCE_METADATA_IP"]}
    found = decide(env)
    assert place(found) == ("TPU", "10.0.0.1:8482", 2, 1) and found.hosts == ("10.0.0.1", "10.0.0.2")
    assert decide({**env, "TPU_SKIP_MDS_QUERY": "1"}).source == "nothing"
    assert place(decide({**env, **OURS})) == ("environment", "a:1", 2, 1)
