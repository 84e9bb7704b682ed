"""`recjax launch tpu_vm`: TPU VMs without Kubernetes, as queued resources or as a managed instance group.

Queued resources are the old Cloud TPU API (v4 to v6e); a script asks for the slices, waits, copies the code to all
hosts and runs the same command on each, and asks again when Spot slices were taken away. A managed instance group is
the way of Compute Engine (v5p, v6e, TPU7x), one slice each; its hosts start the run by themselves, and again after a
repair. The hosts find each other by their metadata.
"""

from __future__ import annotations

import argparse
import shlex

from recjax.core.errors import ConfigError
from recjax.launch.plan import Job, Plan, check_mesh, restarting, whole
from recjax.launch.tpu import Slice, slice_of

_WAIT = 30  # seconds between two looks at the queue
_SETUP = "cd recjax && make setup VENV=$HOME/recjax-venv && $HOME/recjax-venv/bin/pip install --quiet 'jax[tpu]'"
_PATH = "export PATH=$HOME/recjax-venv/bin:$PATH"
_IMAGES = {
    "v5p": "ubuntu-accelerator-2204-amd64-tpu-v5e-v5p-v6e",
    "v6e": "ubuntu-accelerator-2204-amd64-tpu-v5e-v5p-v6e",
}
_IMAGES["tpu7x"] = "ubuntu-accelerator-2204-amd64-tpu-tpu7x"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this launcher."""
    parser.add_argument("--tpu", default="", metavar="SLICE", help="such as v6e:4x4")
    parser.add_argument("--slices", type=whole, default=1, metavar="N", help="TPU slices (default 1)")
    parser.add_argument("--project", default="", help="Google Cloud project")
    parser.add_argument("--zone", default="", help="such as us-east5-b")
    parser.add_argument("--spot", action="store_true", help="Spot VMs, which may be taken away")
    parser.add_argument("--valid", default="", metavar="DURATION", help="how long to queue, such as 6h")
    parser.add_argument("--runtime", default="", help="runtime version, instead of the usual one of this TPU")
    parser.add_argument("--group", action="store_true", help="a managed instance group instead of queued resources")
    parser.add_argument("--image", default="", help="container image with recjax in it, for --group")


def plan(job: Job, args: argparse.Namespace) -> Plan:
    """A script around gcloud; raises `ConfigError` for what the two ways cannot do."""
    for flag in ("tpu", "project", "zone"):
        if not getattr(args, flag):
            raise ConfigError(f"which {flag}?", expected=f"--{flag}=...")
    tpu = slice_of(args.tpu)
    check_mesh(job, tpu.devices * args.slices)
    made = _group(job, args, tpu) if args.group else _queued(job, args, tpu)
    what = f"{args.slices} x {tpu.name} ({tpu.accelerator}): {tpu.hosts * args.slices} hosts, {tpu.machine}"
    return Plan(files=made.files, commands=made.commands, notes=(what, *made.notes))


def _queued(job: Job, args: argparse.Namespace, tpu: Slice) -> Plan:
    runtime = args.runtime or tpu.kind.runtime
    if not runtime:
        kind = tpu.name.partition(":")[0]
        raise ConfigError(f"queued resources have no {kind}", where="--tpu", mend="--group, or recjax launch gke")
    at = ("--project", args.project, "--zone", args.zone)
    nodes = [job.name] if args.slices == 1 else [f"{job.name}-{k}" for k in range(args.slices)]
    create = ["gcloud", "compute", "tpus", "queued-resources", "create", job.name, *at]
    create += ["--accelerator-type", tpu.accelerator, "--runtime-version", runtime]
    many = ["--node-count", str(args.slices), "--node-prefix", job.name]
    create += many if args.slices > 1 else ["--node-id", job.name]
    create += ["--spot"] if args.spot else []
    create += ["--valid-until-duration", args.valid] if args.valid else []
    queue = ("gcloud", "compute", "tpus", "queued-resources")
    state = shlex.join((*queue, "describe", job.name, *at, "--format=value(state.state)"))
    delete = shlex.join((*queue, "delete", job.name, *at, "--force", "--quiet"))
    vm = ("gcloud", "compute", "tpus", "tpu-vm")
    copies = "".join(
        shlex.join((*vm, "scp", "--recurse", ".", f"{node}:recjax", "--worker=all", *at)) + " || return 1\n  "
        for node in nodes
    )
    remote = f"{_PATH}; cd recjax\n{restarting(job.command, job.restarts)}"

    def on_all(command: str) -> str:
        starts = [shlex.join((*vm, "ssh", node, "--worker=all", *at, f"--command={command}")) for node in nodes]
        return "\n  ".join(f'{start} &\n  running="$running $!"' for start in starts)

    text = f"""\
#!/bin/bash
# WAITING_FOR_RESOURCES -> PROVISIONING -> ACTIVE | FAILED; SUSPENDED when Spot slices were taken away
acquire() {{
  {shlex.join(create)} || return 1
  while :; do
    state=$({state})
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED|SUSPENDING|SUSPENDED) echo "queued resource {job.name}: $state" >&2; return 1 ;;
    esac
    sleep {_WAIT}
  done
}}
on_all() {{
  local status=0
  for one in $running; do wait "$one" || status=$?; done
  return "$status"
}}
set_up() {{
  {copies}running=""
  {on_all(_SETUP)}
  on_all
}}
train() {{
  running=""
  {on_all(remote)}
  on_all
}}
for attempt in $(seq 0 {job.restarts}); do
  if acquire && set_up; then
    train && exit 0
    status=$?
    # 255: the connection was lost, as it is when slices are taken away
    [ "$({state})" != ACTIVE ] || [ "$status" -eq 255 ] || exit "$status"
  fi
  {delete}
done
exit 1
"""
    file = f"{job.name}.sh"
    return Plan(files={file: text}, commands=(("bash", str(args.folder / file)),), notes=(f"when done: {delete}",))


def _group(job: Job, args: argparse.Namespace, tpu: Slice) -> Plan:
    kind = tpu.name.partition(":")[0]
    if kind not in _IMAGES or args.slices > 1:
        what = f"managed instance groups have no {kind}" if kind not in _IMAGES else "a group is one slice"
        raise ConfigError(
            what, where="--group", expected=f"one slice of {', '.join(_IMAGES)}", mend="recjax launch gke"
        )
    if not args.image:
        raise ConfigError("which container image?", where="--group", expected="--image=IMAGE")
    region, at = args.zone.rpartition("-")[0], ("--project", args.project)
    run = shlex.join(("docker", "run", "--rm", "--privileged", "--net=host", args.image, *shlex.split(job.command)))
    start = f"{job.name}-startup.sh"
    policy = f"{job.name}-policy"
    commands = []
    if tpu.hosts > 1:
        create = ("gcloud", "compute", "resource-policies", "create", "workload-policy", policy, *at)
        commands.append((*create, "--region", region, "--type=HIGH_THROUGHPUT", f"--accelerator-topology={tpu.shape}"))
    template = ["gcloud", "compute", "instance-templates", "create", f"{job.name}-template", *at]
    template += ["--machine-type", tpu.machine, "--maintenance-policy=TERMINATE", "--scopes=cloud-platform"]
    template += [f"--image-family={_IMAGES[kind]}", "--image-project=ubuntu-os-accelerator-images"]
    template += ["--provisioning-model=SPOT", "--instance-termination-action=DELETE"] if args.spot else []
    commands.append((*template, f"--metadata-from-file=startup-script={args.folder / start}"))
    group = ["gcloud", "compute", "instance-groups", "managed", "create", job.name, *at, "--zone", args.zone]
    group += ["--template", f"{job.name}-template", "--size", str(tpu.hosts), "--target-size-policy-mode=bulk"]
    if tpu.hosts > 1:
        name = f"projects/{args.project}/regions/{region}/resourcePolicies/{policy}"
        group += [f"--workload-policy={name}", "--default-action-on-vm-failure=do-nothing"]
    commands.append(tuple(group))
    delete = ("gcloud", "compute", "instance-groups", "managed", "delete", job.name, *at, "--zone", args.zone)
    notes = (
        "for quota, versions of images and limits: Compute Engine, TPUs in MIGs",
        f"when done: {shlex.join(delete)}",
    )
    text = "#!/bin/bash\n" + restarting(run, job.restarts)
    return Plan(files={start: text}, commands=tuple(commands), notes=notes)
