"""`recjax launch gke`: a JobSet for a cluster of GKE (or any Kubernetes with JobSet), or the command of xpk.

One pod is one process. A pod that was told to stop, or died, fails its job at once, and the JobSet starts all of them
again up to `--restarts` times; a mistake of the user (status 2) is not tried again. The pods of a slice are those of
one job. Process 0 is the coordinator of the JobSet, whose address the controller writes into every pod.
"""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from recjax.core.errors import ConfigError
from recjax.launch.plan import Job, Plan, check_mesh, whole
from recjax.launch.surroundings import PORT
from recjax.launch.tpu import Slice, slice_of

GRACE = 120  # seconds to save in
_KEY = "jobset.sigs.k8s.io/"
_WORKERS, _CONTAINER, _MOUNT = "workers", "recjax", "/bucket"
_MISTAKE = 2


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this launcher."""
    parser.add_argument("--image", default="", help="container image with recjax in it")
    parser.add_argument("--tpu", default="", metavar="SLICE", help="such as v6e:4x4; without it pods of GPUs or CPUs")
    parser.add_argument("--slices", type=whole, default=1, metavar="N", help="TPU slices (default 1)")
    parser.add_argument("--pods", type=whole, default=1, metavar="N", help="pods without --tpu (default 1)")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs of each pod")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--queue", default="", help="Kueue's local queue")
    parser.add_argument("--bucket", default="", help=f"Cloud Storage bucket, mounted at {_MOUNT} (GCS FUSE)")
    parser.add_argument("--service_account", default="", help="Kubernetes service account of the pods")
    parser.add_argument("--spot", action="store_true", help="on Spot machines")
    parser.add_argument("--xpk", default="", metavar="CLUSTER", help="through xpk on this cluster, instead of a JobSet")
    parser.add_argument("--project", default="", help="Google Cloud project, for xpk")
    parser.add_argument("--zone", default="", help="its zone, for xpk")


def plan(job: Job, args: argparse.Namespace) -> Plan:
    """The JobSet and how it is applied, or what xpk is called with."""
    if not args.image:
        raise ConfigError("which container image?", expected="--image=IMAGE", mend="one in which `recjax --help` works")
    tpu = slice_of(args.tpu) if args.tpu else None
    if tpu is not None:
        check_mesh(job, tpu.devices * args.slices)
    elif args.gpus:
        check_mesh(job, args.gpus * args.pods)
    if args.xpk:
        return Plan(commands=(xpk(job, args, tpu),), notes=("xpk makes a JobSet of its own from this",))
    file = f"{job.name}.yaml"
    return Plan(
        files={file: text_of(jobset(job, args, tpu))},
        commands=(("kubectl", "apply", "--namespace", args.namespace, "--filename", str(args.folder / file)),),
        notes=(_told(args, tpu), f"watch: kubectl get jobset {job.name} --namespace {args.namespace} --watch"),
    )


def xpk(job: Job, args: argparse.Namespace, tpu: Slice | None) -> tuple[str, ...]:
    """`xpk workload create`; raises `ConfigError` without a TPU."""
    if tpu is None:
        raise ConfigError("xpk is told of TPUs here", expected="--tpu=SLICE", mend="or a JobSet, without --xpk")
    out = ["xpk", "workload", "create", f"--workload={job.name}", f"--cluster={args.xpk}"]
    out += [f"--tpu-type={tpu.accelerator}", f"--num-slices={args.slices}", f"--docker-image={args.image}"]
    out += [f"--max-restarts={job.restarts}", f"--command={job.command}"]
    out += [f"--{name}={value}" for name, value in (("project", args.project), ("zone", args.zone)) if value]
    return tuple(out)


def jobset(job: Job, args: argparse.Namespace, tpu: Slice | None) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2) as plain values."""
    jobs, pods = (args.slices, tpu.hosts) if tpu else (1, args.pods)
    metadata: dict[str, Any] = {"name": job.name, "namespace": args.namespace}
    if args.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": args.queue}
    if tpu is not None:  # a slice is a node pool, and all of it is for one job
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    failed = {"action": "FailJob", "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": [_MISTAKE]}}
    spec = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [failed]},
        "template": _pod(job, args, tpu, jobs, pods),
    }
    rule = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "coordinator": {"replicatedJob": _WORKERS, "jobIndex": 0, "podIndex": 0},
            "failurePolicy": {"maxRestarts": job.restarts, "rules": [rule]},
            "replicatedJobs": [{"name": _WORKERS, "replicas": jobs, "template": {"spec": spec}}],
        },
    }


def _pod(job: Job, args: argparse.Namespace, tpu: Slice | None, jobs: int, pods: int) -> dict[str, Any]:
    chips = {"google.com/tpu": tpu.chips_per_host} if tpu else {"nvidia.com/gpu": args.gpus} if args.gpus else {}
    container: dict[str, Any] = {
        "name": _CONTAINER,
        "image": args.image,
        "command": shlex.split(job.command),
        "ports": [{"containerPort": PORT}],
        "env": [
            {"name": "JOBSET_COORDINATOR", **_annotation("coordinator")},
            {"name": "JOBSET_JOBS", "value": str(jobs)},
            {"name": "JOBSET_PODS", "value": str(pods)},
            {"name": "JOBSET_JOB_INDEX", **_annotation("job-index")},
        ],
    }
    if chips:
        container["resources"] = {"limits": dict(chips), "requests": dict(chips)}
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "containers": [container],
    }
    selector = {}
    if tpu is not None:
        selector["cloud.google.com/gke-tpu-accelerator"] = tpu.kind.label
        selector["cloud.google.com/gke-tpu-topology"] = tpu.shape
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    if selector:
        spec["nodeSelector"] = selector
    if args.service_account:
        spec["serviceAccountName"] = args.service_account
    out: dict[str, Any] = {"spec": spec}
    if args.bucket:
        out["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
        container["volumeMounts"] = [{"name": "bucket", "mountPath": _MOUNT}]
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": {"bucketName": args.bucket}}
        spec["volumes"] = [{"name": "bucket", "csi": driver}]
    return out


def _annotation(key: str) -> dict[str, Any]:
    return {"valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{_KEY}{key}']"}}}


def text_of(value: dict[str, Any]) -> str:
    """YAML."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, width=120)


def _told(args: argparse.Namespace, tpu: Slice | None) -> str:
    if tpu is None:
        return f"{args.pods} pods" + (f" with {args.gpus} GPUs each" if args.gpus else " on CPU")
    pods = f"{tpu.hosts * args.slices} pods on {tpu.machine}"
    return f"{args.slices} x {tpu.name}: {pods}, {tpu.chips_per_host} chips each"
