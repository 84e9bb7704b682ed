"""`recjax launch local`: a verb as several processes on this machine, started again when they are told to stop.

Each process is told who it is by our variables, and on CPU gets `--devices` simulated ones. When one of them ends, the
others cannot go on: they are told to stop, and all are started again when the end says so (`core.errors`): told to
stop, missing others, or a death by a signal. Told to stop itself, this process passes it on and waits.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recjax.core.errors import INTERRUPTED, TRY_AGAIN
from recjax.launch.plan import Job, Plan, check_mesh, whole

GRACE = 60.0  # seconds that processes have to save once one of them has been told to stop
ALONE = 10.0  # seconds that they have once one of them is gone, and they can only end
_PAUSE = 0.05


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this launcher."""
    parser.add_argument("--processes", type=whole, default=1, metavar="N", help="processes on this machine (default 1)")
    parser.add_argument("--devices", type=whole, metavar="N", help="simulated CPU devices of each process")


def plan(job: Job, args: argparse.Namespace) -> Plan:
    """The command lines, with the variables in front of them."""
    if args.devices:
        check_mesh(job, args.processes * args.devices)
    commands = []
    for number in range(args.processes):
        told = variables(args, number, "localhost:PORT")
        commands.append(("env", *(f"{name}={value}" for name, value in told.items()), "recjax", *job.words))
    notes = [f"{args.processes} processes at the same time; PORT is a free one"] if args.processes > 1 else []
    notes += [f"all again, up to {job.restarts} times, when one ends with {INTERRUPTED}, {TRY_AGAIN} or by a signal"]
    return Plan(commands=tuple(commands), notes=tuple(notes))


def variables(args: argparse.Namespace, number: int, coordinator: str) -> dict[str, str]:
    """What process `number` finds in its environment."""
    told = {}
    if args.devices:
        told = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={args.devices}"}
    if args.processes > 1:
        told["RECJAX_COORDINATOR"] = coordinator
        told |= {"RECJAX_NUM_PROCESSES": str(args.processes), "RECJAX_PROCESS_ID": str(number)}
    return told


def run(job: Job, args: argparse.Namespace) -> int:
    """Start, watch and start again; the exit status of the last round."""
    if args.devices:
        check_mesh(job, args.processes * args.devices)

    def told() -> list[dict[str, str]]:
        address = f"localhost:{_free_port()}"
        return [variables(args, number, address) for number in range(args.processes)]

    print(f"recjax: {job.command} ({args.processes} processes)", file=sys.stderr, flush=True)
    return again([sys.executable, "-m", "recjax", *job.words], told, job.restarts)


def again(words: Sequence[str], told: Callable[[], Sequence[Mapping[str, str]]], restarts: int) -> int:
    """Run `words` once for each of the environments `told`, all anew while that makes sense; the last status."""
    status = 0
    for restart in range(restarts + 1):
        with _Gang(words, told()) as gang:
            status = gang.wait()
        if gang.is_told or not goes_on(status) or restart == restarts:
            break
        print(f"recjax: status {status}, restart {restart + 1} of {restarts}", file=sys.stderr, flush=True)
    return status if status >= 0 else 128 - status


def goes_on(status: int) -> bool:
    """Whether a process that ended like this is to be started again; negative is the number of a signal."""
    return status in (INTERRUPTED, TRY_AGAIN) or (status < 0 and status != -signal.SIGINT)


class _Gang:
    """The processes of one round."""

    def __init__(self, words: Sequence[str], told: Sequence[Mapping[str, str]]) -> None:
        self.is_told = False
        self._before: list[tuple[int, Any]] = []
        self._running = [subprocess.Popen(words, env={**os.environ, **mine}, process_group=0) for mine in told]

    def __enter__(self) -> _Gang:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before.append((number, signal.signal(number, self._told)))
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def wait(self) -> int:
        """Until all have ended: 0, or what the first to fail ended with.

        One that ends well has ended training, as have the others then; they are waited for.
        """
        first, until = 0, float("inf")
        while any([process.poll() is None for process in self._running]):  # each is asked
            time.sleep(_PAUSE)
            ended = [process.returncode for process in self._running if process.returncode]
            if ended and not first:
                # Whoever was taken away, not who fell because of that.
                first = next((status for status in ended if goes_on(status)), ended[0])
                until = time.monotonic() + (GRACE if first == INTERRUPTED else ALONE)
                self._send(signal.SIGTERM)
            if time.monotonic() > until:
                self._send(signal.SIGKILL)
        return first or max((p.returncode for p in self._running), key=abs)

    def _told(self, number: int, frame: Any) -> None:
        self.is_told = True
        self._send(number)

    def _send(self, number: int) -> None:
        for process in self._running:
            if process.poll() is None:
                process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
