"""A real server on loopback: fuzzed from its own OpenAPI, asked too much, given a newer bundle; never a wrong answer.

The short form of `benchmarks/serve_load.py`.
"""

import asyncio
import collections
import contextlib
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from recjax.serve.__main__ import listen
from recjax.serve.app import create_app
from recjax.serve.bundle import Bundle

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@contextlib.contextmanager
def server(app):
    """The port of a server that runs in another thread, told to stop and waited for at the end."""
    with listen("127.0.0.1", 0) as opened:
        running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            while not running.started and thread.is_alive():
                time.sleep(0.02)
            yield opened.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def tools():
    """The modules of the benchmark, which lie beside no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import serve_client
        import serve_fuzz
        import serve_load

        yield serve_client, serve_fuzz, serve_load


async def raw(port, data):
    """What comes back for bytes that need not be HTTP, until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    writer.write_eof()
    found = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return found


def test_under_load_every_answer_is_right_or_a_refusal(searcher, tools, tmp_path):
    client, fuzz, benchmark = tools
    shutil.copytree(searcher.path, tmp_path / "1")
    bundles = [Bundle(tmp_path / "1")]
    benchmark.next_version(tmp_path / "1", tmp_path / ".2")
    bundles.append(Bundle(tmp_path / ".2"))
    app = create_app(bundles[:1], roots={"searcher": tmp_path}, max_batch=2, max_queue=4, watch=0.2, timeout=60.0)
    truth, paths = client.Truth(bundles), client.paths_of(bundles[0])
    fuzzer = fuzz.Fuzzer(app.openapi(), client.known_of(bundles[0]), paths)
    assert paths == ["/v1/recommend", "/v1/search"]
    with server(app) as port:
        load = benchmark.Load(port, fuzzer, truth)
        both = load.pool(paths, 24)

        async def phases():
            fuzzed = await load.ask(fuzzer.any, connections=3, count=250)
            crowd = await load.ask(both, connections=40, count=240)
            moving = await load.reload(both, 15.0, 3.0, lambda: (tmp_path / ".2").rename(tmp_path / "2"), connections=4)
            odd = (b"GET\r\n\r\n", b"\x16\x03\x01", b"POST /v1/search HTTP/1.1\r\ncontent-length: x\r\n\r\n")
            return fuzzed, crowd, moving, [await raw(port, data) for data in odd]

        fuzzed, crowd, moving, odd = asyncio.run(phases())
    assert not truth.wrong and not load.bad
    assert len(fuzzed) == 250 and len({reply.status for reply in fuzzed}) > 4
    assert truth.checked > 60
    statuses = collections.Counter(reply.status for reply in crowd)
    assert set(statuses) == {200, 503} and statuses[503] > 20
    assert all(reply.headers["retry-after"] == "1" for reply in crowd if reply.status == 503)
    assert {reply.status for reply in moving} == {200} and set(truth.by_step) == {0, 1}
    assert all(b" 400 " in found.splitlines()[0] for found in odd if found)


def test_the_openapi_says_what_the_server_sends(searcher):
    told = create_app([Bundle(searcher.path)]).openapi()
    for path in ("/v1/recommend", "/v1/search", "/v1/score"):
        post = told["paths"][path]["post"]
        assert {"200", "400", "404", "408", "413", "422", "503"} <= set(post["responses"])
        assert "Retry-After" in post["responses"]["503"]["description"]
        assert post["requestBody"]["content"]["application/json"]["schema"]["required"]
    assert json.dumps(told)
