"""`recjax serve`: a server over exported bundles. Needs the extra `serve`, and nothing of the training code."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType

from recjax import cli
from recjax.core.errors import RecjaxError
from recjax.core.remote import local_cache

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def parser() -> cli.ArgumentParser:
    """The flags of `recjax serve`."""
    flags = cli.ArgumentParser("serve")
    flags.add_argument(
        "--bundle",
        action="append",
        required=True,
        metavar="DIR",
        help="a bundle, or a folder of versions 1, 2, ... (the last is served); may be repeated; first is default",
    )
    flags.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    flags.add_argument("--port", type=int, default=8080, help="0 takes a free one (default 8080)")
    flags.add_argument("--max_batch", type=int, default=32, help="requests in one call of the model (default 32)")
    flags.add_argument("--max_wait_ms", type=float, default=2.0, help="wait for company at most so long (default 2)")
    flags.add_argument("--max_queue", type=int, default=1024, help="requests that may wait before 503 (default 1024)")
    flags.add_argument("--timeout_ms", type=float, default=10_000.0, help="longest wait before 503 (default 10000)")
    flags.add_argument(
        "--watch_s", type=float, default=0.0, help="look for newer versions so often (default 0: on SIGHUP alone)"
    )
    flags.add_argument(
        "--drain_s", type=float, default=0.0, help="told to stop, answer so long with /healthz at 503 (default 0)"
    )
    return flags


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises `RecjaxError` when the port is taken or the address is not one of this machine."""
    where = f"{host}:{port}"
    try:
        if not 0 <= port < 1 << 16:  # getaddrinfo would take its lower 16 bits
            raise OverflowError(f"no port {port}")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen(2048)
        except OSError:
            opened.close()
            raise
    except (OSError, OverflowError) as error:
        raise RecjaxError(
            f"cannot listen there: {error}",
            where=where,
            expected="a free port (1 to 65535, or 0 for any) on an address of this machine",
            mend="choose another --port or --host, or stop the program that uses it",
        ) from error
    return opened


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; running requests are answered before the end. SIGHUP looks for newer bundles."""
    options = parser().parse_args(argv)
    least_of = {"max_batch": 1, "max_queue": 1, "max_wait_ms": 0, "timeout_ms": 1, "watch_s": 0, "drain_s": 0}
    for flag, least in least_of.items():
        if not getattr(options, flag) >= least:
            raise RecjaxError(f"--{flag} {getattr(options, flag)} cannot be used", expected=f"at least {least}")
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise RecjaxError(
            f"serving needs {', '.join(absent)}",
            where=sys.executable,
            mend="pip install 'recjax[serve]'",
        )
    # Before anything slow, so that a taken port is reported at once.
    with listen(options.host, options.port) as opened:
        return _serve(opened, options)


def _serve(opened: socket.socket, options: argparse.Namespace) -> int:
    import uvicorn

    from recjax.serve.app import create_app
    from recjax.serve.kinds import load_bundle
    from recjax.serve.shelf import newest

    # uvicorn raises the signal again when it has finished; for a server that is told to stop this is no failure.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        loaded = {root: load_bundle(newest(root)) for root in options.bundle}
        _keep_compiled()
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        app = create_app(
            list(loaded.values()),
            max_batch=options.max_batch,
            max_wait=options.max_wait_ms / 1e3,
            max_queue=options.max_queue,
            timeout=options.timeout_ms / 1e3,
            roots={bundle.name: root for root, bundle in loaded.items()},
            watch=options.watch_s,
        )
        host, port = opened.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    self._loop, self._refreshing = asyncio.get_running_loop(), None
                    if hasattr(signal, "SIGHUP"):
                        self._loop.add_signal_handler(signal.SIGHUP, self._refresh)
                    print(f"serving {', '.join(b.name for b in loaded.values())} on {address}", flush=True)

            def _refresh(self) -> None:
                self._refreshing = asyncio.ensure_future(app.state.shelf.refresh())

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                if app.state.draining or not (self.started and options.drain_s):
                    super().handle_exit(sig, frame)  # the second signal does not wait
                    return
                app.state.draining = True
                end = super().handle_exit
                self._loop.call_soon_threadsafe(self._loop.call_later, options.drain_s, end, sig, frame)

        server = Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_patience(options.timeout_ms))
        )
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[opened])
        return 0 if server.started else 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _patience(timeout_ms: float) -> int:
    """How many seconds running requests are waited for: as long as one of them may take."""
    return math.ceil(min(timeout_ms, 600_000.0) / 1e3) + 1


def _keep_compiled() -> None:
    """Keep compiled programs, so that the next start with the same bundle is quick."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(local_cache() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


if __name__ == "__main__":
    sys.exit(cli.run(main))
