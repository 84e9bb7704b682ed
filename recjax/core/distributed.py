"""How processes find each other.

One process needs nothing. Several are started with the same command each, plus the environment variables
`RECJAX_COORDINATOR` (host:port of process 0), `RECJAX_NUM_PROCESSES` and `RECJAX_PROCESS_ID`; on CPU they talk over
Gloo. Must run before the first use of a device.
"""

from __future__ import annotations

import os

import jax

from recjax.core.errors import ConfigError

_VARIABLES = ("RECJAX_COORDINATOR", "RECJAX_NUM_PROCESSES", "RECJAX_PROCESS_ID")


def initialize() -> None:
    """Join the other processes when the environment says there are any; raises `ConfigError` when it says half."""
    values = [os.environ.get(name, "") for name in _VARIABLES]
    if not any(values):
        return
    if not all(values) or not (values[1].isdigit() and values[2].isdigit()) or int(values[2]) >= int(values[1]):
        raise ConfigError(
            "the environment describes several processes incompletely",
            where=", ".join(f"{n}={v!r}" for n, v in zip(_VARIABLES, values, strict=True)),
            expected="host:port, a number of processes, and this process's number below it",
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(values[0], int(values[1]), int(values[2]))


def is_lead() -> bool:
    """Whether this process writes logs and files that only one may write."""
    return jax.process_index() == 0
