"""`recjax launch ray`: a script for Ray Train's `JaxTrainer` (alpha in Ray 2.5x), and how it is submitted.

Ray starts the workers, joins them through jax by itself and starts them again after a failure; recjax finds itself
joined and goes on from its checkpoint. One worker is one TPU host, or one GPU.
"""

from __future__ import annotations

import argparse

from recjax.core.errors import ConfigError
from recjax.launch.plan import Job, Plan, check_mesh, whole
from recjax.launch.tpu import Slice, slice_of

_LABELS = {"v4": "TPU-V4", "v5e": "TPU-V5E", "v5p": "TPU-V5P", "v6e": "TPU-V6E", "tpu7x": "TPU-V7X"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this launcher."""
    parser.add_argument("--tpu", default="", metavar="SLICE", help="such as v6e:4x4; without it workers of GPUs")
    parser.add_argument("--slices", type=whole, default=1, metavar="N", help="TPU slices (default 1)")
    parser.add_argument("--workers", type=whole, default=1, metavar="N", help="workers of one GPU each, without --tpu")
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="of the Ray cluster's dashboard")
    parser.add_argument("--storage", default="", help="a path that all nodes share, for Ray's own records")


def plan(job: Job, args: argparse.Namespace) -> Plan:
    """The script, and `ray job submit`."""
    if job.words[0] != "train":
        raise ConfigError("Ray Train trains", where=f"--verb={job.words[0]}", expected="--verb=train")
    tpu = slice_of(args.tpu) if args.tpu else None
    check_mesh(job, tpu.devices * args.slices if tpu else args.workers)
    submit = ("ray", "job", "submit", f"--address={args.address}", f"--working-dir={args.folder}")
    submit = (*submit, "--", "python", f"{job.name}.py")
    return Plan(files={f"{job.name}.py": script(job, args, tpu)}, commands=(submit,))


def script(job: Job, args: argparse.Namespace, tpu: Slice | None) -> str:
    """The driver."""
    if tpu is not None:
        kind = _LABELS[tpu.name.partition(":")[0]]
        scale = f'num_workers={tpu.hosts * args.slices}, use_tpu=True, topology="{tpu.shape}", '
        scale += f'accelerator_type="{kind}"'
    else:
        scale = f"num_workers={args.workers}, use_gpu=True"
    storage = f", storage_path={args.storage!r}" if args.storage else ""
    return f'''\
"""Trains by Ray; written by `recjax launch ray`."""

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.jax import JaxTrainer

WORDS = {list(job.words[1:])!r}


def train(config):
    from recjax import cli
    from recjax.train import main

    status = cli.run(main, config["words"])
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    ray.init()
    JaxTrainer(
        train,
        train_loop_config={{"words": WORDS}},
        scaling_config=ScalingConfig({scale}),
        run_config=RunConfig(name={job.name!r}{storage}, failure_config=FailureConfig(max_failures={job.restarts})),
    ).fit()
'''
