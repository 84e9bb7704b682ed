"""`recjax launch slurm`: a batch script with one task for each node, which sees all its GPUs.

Before its time is up, and when it is preempted, SLURM sends SIGTERM to the step: the run saves and ends with a status
that the script answers with `scontrol requeue`. `srun` ends the step when one of its tasks fails. Processes find each
other by the variables of the step.
"""

from __future__ import annotations

import argparse

from recjax.core.errors import INTERRUPTED, TRY_AGAIN
from recjax.launch.plan import Job, Plan, check_mesh, whole

NOTICE = 120  # seconds before the end at which SIGTERM comes


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this launcher."""
    parser.add_argument("--nodes", type=whole, default=1, metavar="N", help="nodes, with one process each (default 1)")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs of each node")
    parser.add_argument("--cpus", type=int, default=0, metavar="N", help="CPU cores of each process")
    parser.add_argument("--time", default="", help="limit, such as 24:00:00")
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument("--setup", default="", help="a line before the run, such as 'source .venv/bin/activate'")


def plan(job: Job, args: argparse.Namespace) -> Plan:
    """The script, and `sbatch`."""
    if args.gpus:
        check_mesh(job, args.nodes * args.gpus)
    file = f"{job.name}.sbatch"
    each = f"{args.gpus} GPUs" if args.gpus else "its CPUs"
    note = f"{args.nodes} nodes, one process each with {each}"
    return Plan(files={file: script(job, args)}, commands=(("sbatch", str(args.folder / file)),), notes=(note,))


def script(job: Job, args: argparse.Namespace) -> str:
    """The batch script."""
    options = [f"--job-name={job.name}", f"--nodes={args.nodes}", "--ntasks-per-node=1"]
    options += [f"--gpus-per-node={args.gpus}"] if args.gpus else []
    options += [f"--cpus-per-task={args.cpus}"] if args.cpus else []
    options += [f"--{name}={value}" for name in ("time", "partition", "account") if (value := getattr(args, name))]
    options += [f"--signal=TERM@{NOTICE}", "--requeue", "--open-mode=append", "--output=%x-%j.log"]
    head = "\n".join(f"#SBATCH {option}" for option in options)
    return f"""\
#!/bin/bash
{head}
{args.setup + chr(10) if args.setup else ""}
srun --kill-on-bad-exit=1 --label {job.command} &
step=$!
trap 'kill -TERM "$step"' TERM
wait "$step"  # until the step ends, or until SIGTERM comes and is passed on
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
status=$?
# {INTERRUPTED}: told to stop and saved; {TRY_AGAIN}: others were missing; above 128: ended by a signal
if [ "$status" -eq {TRY_AGAIN} ] || [ "$status" -gt 128 ]; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.restarts} ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
"""
