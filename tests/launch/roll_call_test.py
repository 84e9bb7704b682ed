"""Everybody is called before jax is told: who is missing is named, and strangers do not count."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from recjax.core.errors import ClusterError
from recjax.launch.roll_call import meet
from recjax.launch.surroundings import Cluster


def cluster(process: int, processes: int, port: int) -> Cluster:
    hosts = tuple(f"host-{chr(97 + k)}" for k in range(processes))
    return Cluster(
        source="test",
        why="told so",
        coordinator=f"localhost:{port}",
        processes=processes,
        process=process,
        hosts=hosts,
    )


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def call(port: int, who: list[int], processes: int, *, seconds: float = 20.0, facts: Any = lambda k: {}) -> list[str]:
    """The outcome for each of `who`, all at the same time; "" for those who meet."""
    found = dict.fromkeys(who, "nothing")

    def one(k: int) -> None:
        try:
            meet(cluster(k, processes, port), seconds=seconds, facts=facts(k), say=lambda text: None)
            found[k] = ""
        except ClusterError as error:
            found[k] = error.message

    threads = [threading.Thread(target=one, args=(k,)) for k in who]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(found.values())


def test_all_meet_in_any_order_and_leave_the_port_free(port: int) -> None:
    assert call(port, [2, 0, 3, 1], 4) == [""] * 4
    with socket.create_server(("", port)):
        pass
    assert call(port, [0, 1], 2) == ["", ""]


def test_the_missing_are_named_to_everybody_who_came(port: int) -> None:
    for said in call(port, [0, 1, 3], 5, seconds=1.0):
        assert "process 2 on host-c, process 4 on host-e did not come\n" in said and "5 processes within 1 s" in said


def test_without_process_0_the_others_say_where_it_should_have_been(port: int) -> None:
    (said,) = call(port, [1], 2, seconds=0.5)
    assert f"process 0 on host-a cannot be reached at localhost:{port}" in said and "refused" in said


def test_two_kinds_of_processes_do_not_meet(port: int) -> None:
    for said in call(port, [0, 1], 2, facts=lambda k: {"jax": f"0.1{k}"}):
        assert "process 1 on host-b has jax 0.11, process 0 0.10" in said


def test_a_stranger_is_let_go(port: int) -> None:
    def disturb() -> None:
        for text in (b"GET / HTTP/1.1\r\n\r\n", b'{"process": 1}\n', b"", b"[]\n"):
            for _ in range(100):
                try:
                    with socket.create_connection(("localhost", port), timeout=5) as line:
                        line.sendall(text)
                    break
                except OSError:
                    time.sleep(0.02)

    stranger = threading.Thread(target=disturb)
    stranger.start()
    outcome: list[str] = []
    first = threading.Thread(target=lambda: outcome.extend(call(port, [0], 2)))
    first.start()
    stranger.join()
    assert call(port, [1], 2) == [""]
    first.join()
    assert outcome == [""]
