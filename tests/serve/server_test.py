"""The server as a process: it starts, answers, finishes what it is doing when told to stop, and refuses clearly."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from recjax import cli
from recjax.core.errors import RecjaxError
from recjax.core.folder import write_manifest
from recjax.serve import __main__ as server


@pytest.fixture
def taken():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        opened.listen()
        yield opened.getsockname()[1]


def test_a_taken_port_is_exit_status_2_with_the_address(exported, taken, capsys):
    status = cli.run(server.main, ["--bundle", str(exported.path), "--port", str(taken)])
    assert status == 2
    message = capsys.readouterr().err
    assert f"127.0.0.1:{taken}" in message and "--port" in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--port", "70000"], "cannot listen"),
        (["--host", "256.1.1.1"], "cannot listen"),
        (["--max_batch", "0"], "max_batch"),
        (["--max_wait_ms", "nan"], "max_wait_ms"),
        (["--port", "0", "--bundle", "/nowhere"], "no bundle here"),
    ],
)
def test_odd_flags_are_refused(exported, flags, match):
    with pytest.raises(RecjaxError, match=match):
        server.main(["--bundle", str(exported.path), *flags])


def test_without_the_extra_it_says_how_to_get_it(exported, monkeypatch):
    real = server.importlib.util.find_spec
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None if name == "fastapi" else real(name))
    with pytest.raises(RecjaxError, match=re.escape("pip install 'recjax[serve]'")):
        server.main(["--bundle", str(exported.path)])


def test_a_process_serves_takes_a_newer_bundle_and_answers_what_it_has_when_told_to_stop(exported, tmp_path):
    root = tmp_path / "versions"
    shutil.copytree(exported.path, root / "1")
    command = [sys.executable, "-m", "recjax.serve", "--bundle", str(root), "--port", "0", "--drain_s", "4"]
    # A long wait for company, so that a lone request is under way when the signal comes.
    command += ["--max_batch", "2", "--max_wait_ms", "500"]
    environment = {**os.environ, "RECJAX_CACHE": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            assert "serving decay on http://127.0.0.1:" in line, process.stderr.read()
            address = line.split()[-1]
            assert json.load(urllib.request.urlopen(f"{address}/healthz")) == {"status": "ok"}
            answers = []

            def ask():
                body = json.dumps({"user_history": exported.vocab.ids[:3]}).encode()
                with urllib.request.urlopen(f"{address}/v1/recommend", body) as answer:
                    answers.append(json.load(answer))

            pair = [threading.Thread(target=ask) for _ in range(2)]
            lone = threading.Thread(target=ask)
            for thread in pair:
                thread.start()
            for thread in pair:
                thread.join()
            shutil.copytree(root / "1", root / ".2.tmp")
            remade = json.loads((root / ".2.tmp" / "manifest.json").read_text())
            made = {"files", "recjax_version", "created", "manifest_hash"}
            write_manifest(root / ".2.tmp", {**{k: v for k, v in remade.items() if k not in made}, "step": 13})
            (root / ".2.tmp").rename(root / "2")
            process.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + 60
            while json.load(urllib.request.urlopen(f"{address}/v1/models"))["models"][0]["version"] != "2":
                assert time.monotonic() < deadline
                time.sleep(0.1)
            lone.start()
            time.sleep(0.2)
            assert len(answers) == 2
            process.send_signal(signal.SIGTERM)
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(f"{address}/healthz")
            lone.join()
            assert [answer["step"] for answer in answers] == [12, 12, 13]
            assert len({tuple(item["item_id"] for item in answer["items"]) for answer in answers}) == 1
            assert process.wait(30) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
