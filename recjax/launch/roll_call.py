"""Whether all processes of a run are there, before jax is told about them.

jax aborts when a process is missing, and does not say which. So process 0 first listens where the coordinator of jax
will, every other process says there who it is, and all wait until the last has come. When the time is up everybody is
told who did not. What is said is one line of JSON each way; strangers who say anything else are let go.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any

from recjax.core.errors import ClusterError
from recjax.launch.surroundings import Cluster

_PAUSE = 0.2
_LINE = 4096
_REMIND = 30.0  # seconds between two words about whom is being waited for


def meet(cluster: Cluster, *, seconds: float, facts: Mapping[str, str], say: Any = print) -> None:
    """Return when every process of `cluster` has called this; `facts`, such as versions, must be equal for all.

    Raises `ClusterError` naming those who have not come within `seconds`, or whose facts differ.
    """
    mine = {"recjax": "roll call", "process": cluster.process, "processes": cluster.processes, "facts": dict(facts)}
    until = time.monotonic() + seconds
    answer = _preside(cluster, mine, until, say) if cluster.process == 0 else _report(cluster, mine, until)
    if answer:
        raise ClusterError(
            answer,
            where=f"{cluster}",
            expected=f"{cluster.processes} processes within {seconds:g} s",
            mend="see their logs and the network between them; RECJAX_START_TIMEOUT sets the seconds",
        )


def _preside(cluster: Cluster, mine: dict[str, Any], until: float, say: Any) -> str:
    """Process 0: hear the others, then tell them all the outcome, which is "" when all is well."""
    there: dict[int, socket.socket] = {}
    problem, reminded = "", time.monotonic()
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as waiting:
        listener = stack.enter_context(_listen(cluster, until))
        waiting.register(listener, selectors.EVENT_READ)
        while len(there) < cluster.processes - 1 and not problem:
            if time.monotonic() > until:
                problem = _missing(cluster, there)
                break
            if time.monotonic() - reminded > _REMIND:
                reminded = time.monotonic()
                say(_missing(cluster, there).replace("did not come", "is still awaited"))
            for key, _ in waiting.select(_PAUSE):
                if key.fileobj is listener:
                    caller = stack.enter_context(listener.accept()[0])
                    caller.settimeout(_PAUSE)
                    waiting.register(caller, selectors.EVENT_READ)
                    continue
                caller: Any = key.fileobj
                waiting.unregister(caller)
                told = _heard(caller)
                if told is not None:
                    there[told["process"]] = caller
                    problem = problem or _differs(cluster, mine, told)
        for caller in there.values():
            with contextlib.suppress(OSError):
                caller.sendall(json.dumps({"problem": problem}).encode() + b"\n")
        for caller in there.values():  # they hang up first, so that the port is free for the coordinator
            with contextlib.suppress(OSError):
                caller.settimeout(1.0)
                caller.recv(1)
    return problem


def _report(cluster: Cluster, mine: dict[str, Any], until: float) -> str:
    """Another process: reach process 0, say who this is and wait for the outcome."""
    host, _, port = cluster.coordinator.rpartition(":")
    reason = "nobody answers"
    while time.monotonic() < until:
        try:
            with socket.create_connection((host, int(port)), timeout=max(until - time.monotonic(), _PAUSE)) as line:
                line.sendall(json.dumps(mine).encode() + b"\n")
                line.settimeout(max(until - time.monotonic(), _PAUSE) + 5.0)  # process 0 is the one to give up
                return json.loads(_read_line(line))["problem"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error) or type(error).__name__
            time.sleep(_PAUSE)
    return f"{cluster.name_of(0)} cannot be reached at {cluster.coordinator}: {reason}"


def _listen(cluster: Cluster, until: float) -> socket.socket:
    """A socket where the coordinator will be; that of a run just ended may take a moment to go."""
    port = int(cluster.coordinator.rpartition(":")[2])
    while True:
        try:
            if socket.has_dualstack_ipv6():
                with contextlib.suppress(OSError):
                    return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", port))
        except OSError as error:
            if time.monotonic() > until:
                raise ClusterError(
                    f"cannot listen on port {port}: {error.strerror}", where=str(cluster), mend="take another port"
                ) from error
            time.sleep(_PAUSE)


def _heard(caller: socket.socket) -> dict[str, Any] | None:
    """What a caller says of itself; None for a stranger."""
    try:
        told = json.loads(_read_line(caller))
        return told if told["recjax"] == "roll call" and isinstance(told["process"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_line(line: socket.socket) -> bytes:
    out = b""
    while not out.endswith(b"\n"):
        part = line.recv(_LINE)
        if not part or len(out) > _LINE:
            raise OSError("the connection was closed")
        out += part
    return out


def _missing(cluster: Cluster, there: Mapping[int, Any]) -> str:
    absent = [cluster.name_of(k) for k in range(1, cluster.processes) if k not in there]
    shown = ", ".join(absent[:20]) + (f" and {len(absent) - 20} more" if len(absent) > 20 else "")
    return f"{shown} did not come" if len(absent) < cluster.processes - 1 else f"{shown} did not come: nobody did"


def _differs(cluster: Cluster, mine: dict[str, Any], told: dict[str, Any]) -> str:
    """What a process says that does not go together with what this one knows."""
    who = cluster.name_of(told["process"])
    if told["processes"] != mine["processes"] or not 0 < told["process"] < mine["processes"]:
        return f"{who} counts {told['processes']} processes, process 0 {mine['processes']}"
    for name, value in mine["facts"].items():
        if told["facts"].get(name) != value:
            return f"{who} has {name} {told['facts'].get(name)}, process 0 {value}"
    return ""
