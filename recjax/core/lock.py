"""Files that one process at a time holds; the system lets go of one when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"


@contextlib.contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a file, which is made with its folder, while the block runs; False where another process holds it.

    With `wait` the other process is waited for. File systems without locks let everybody pass.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = True
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            mine = False
        except OSError:  # some network file systems have none
            pass
        yield mine
