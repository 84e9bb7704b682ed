"""How processes find each other: the one place where jax is told that there are several.

`decide` (`launch.surroundings`) looks at explicit flags, then the environment, then what can be detected, and else
stays alone; the decision and its reason are shown. Then everybody is called by name (`launch.roll_call`), jax is
started, the devices of all are counted, and one sum over all of them must come back right before anything is trained.
Must run before the first use of a device. On CPU the processes talk over Gloo.

Under Pathways there is one controller: jax shows it all devices as its own, and it is the lead.
"""

from __future__ import annotations

import collections
import contextlib
import os
import platform
import sys
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import recjax
from recjax.core.errors import TRY_AGAIN, ClusterError
from recjax.launch.roll_call import meet
from recjax.launch.surroundings import Cluster, decide

_SECONDS = 300.0  # to come together; RECJAX_START_TIMEOUT


def initialize() -> Cluster:
    """Join the other processes, if there are any; a second call does nothing.

    Raises `ConfigError` when flags or variables say half, and `ClusterError` when processes are missing or differ.
    """
    if jax.distributed.is_initialized():  # by us, or by a launcher such as Ray
        here, count = jax.process_index(), jax.process_count()
        return Cluster(source="jax", why="the processes are joined already", processes=count, process=here)
    cluster = decide()
    if os.environ.get("JAX_PLATFORMS") == "proxy":
        import pathwaysutils  # pyright: ignore[reportMissingImports]

        pathwaysutils.initialize()
    if cluster.is_single:
        return cluster
    _say(str(cluster))
    seconds = float(os.environ.get("RECJAX_START_TIMEOUT", _SECONDS))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax's own service would swallow SIGTERM, which `core.interruption` heeds.
    jax.config.update("jax_enable_preemption_service", False)
    if cluster.ask_jax:
        jax.distributed.initialize(initialization_timeout=int(seconds))
    else:
        facts = {"recjax": recjax.__version__, "jax": jax.__version__, "Python": platform.python_version()[:4]}
        meet(cluster, seconds=seconds, facts=facts, say=_say)
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            local_device_ids=None if cluster.device is None else [cluster.device],
            initialization_timeout=int(seconds),
        )
    check_devices(cluster)
    with _no_longer_than(seconds, cluster):
        check_sum(cluster)
    if is_lead():
        each = f"{jax.process_count()} processes x {jax.local_device_count()} devices"
        _say(f"{each} = {jax.device_count()}; a sum over all of them is right")
    return cluster


def is_lead() -> bool:
    """Whether this process writes logs and files that only one may write."""
    return jax.process_index() == 0


def check_devices(cluster: Cluster) -> None:
    """Raise `ClusterError` unless every process has brought as many devices as the others."""
    count = collections.Counter(device.process_index for device in jax.devices())
    usual = count.most_common(1)[0][1]
    odd = [f"{cluster.name_of(k)} has {count[k]}" for k in range(jax.process_count()) if count[k] != usual]
    if odd or (cluster.processes != jax.process_count() and not cluster.ask_jax):
        raise ClusterError(
            f"{jax.process_count()} processes do not have the same number of devices: {', '.join(odd)}",
            where=str(cluster),
            expected=f"{cluster.processes} processes with {usual} devices each",
        )


def check_sum(cluster: Cluster) -> None:
    """One sum over all devices, to which each adds the number of its process; raises `ClusterError` if it is wrong."""
    devices = jax.devices()
    mesh = Mesh(np.asarray(devices), ("all",))
    here = np.full(1, jax.process_index() + 1, np.int32)
    places = NamedSharding(mesh, PartitionSpec("all"))
    numbers = jax.make_array_from_callback((len(devices),), places, lambda index: here)
    add = jax.shard_map(
        lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec()
    )
    found = int(np.asarray(jax.jit(add)(numbers).addressable_data(0))[0])
    if found != (wanted := sum(device.process_index + 1 for device in devices)):
        raise ClusterError(f"a sum over all devices is {found}", where=str(cluster), expected=str(wanted))


@contextlib.contextmanager
def _no_longer_than(seconds: float, cluster: Cluster) -> Iterator[None]:
    """End this process with a word where the block hangs, which no exception could do."""

    def give_up() -> None:
        _say(f"{cluster}: a sum over all devices has not come back in {seconds:g} s; see the network between them")
        os._exit(TRY_AGAIN)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(text: str) -> None:
    print(f"recjax: {text}", file=sys.stderr, flush=True)
