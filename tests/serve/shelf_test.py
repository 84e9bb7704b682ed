"""A newer bundle takes the place of an older one without a failed request; what cannot be served is left alone."""

import asyncio
import json
import threading

import httpx
import numpy as np
import pytest

from recjax.core.errors import BundleError, RequestError
from recjax.core.folder import MANIFEST
from recjax.data.vocab import ItemVocab
from recjax.serve import app as served
from recjax.serve.bundle import Bundle
from recjax.serve.facets import Facets
from recjax.serve.item_desk import ItemDesk, Wanted
from recjax.serve.shelf import Shelf, newest, version_of

ASKED = {"user_history": ["a"], "k": 1}


class Stub(Bundle):
    """In place of a loaded bundle: the score of every answer is the step in its manifest."""

    history_length, prompt_length, max_k, times, recommends = 4, 4, 2, "none", True
    vocab, titles, users = ItemVocab(("a", "b", "c")), ["title"] * 128, []
    spelling, texts, facets = None, None, Facets({})

    def __init__(self, path, *, verify=True):
        self.path, self.manifest = path, json.loads((path / MANIFEST).read_text())
        if self.manifest.get("broken"):
            raise BundleError("this one is broken", where=str(path))
        self.name, self.gate = self.manifest["name"], threading.Event()
        self.gate.set()

    def facts(self):
        return {"name": self.name, "step": self.manifest["step"]}

    def recommend(self, history_ids, seen_ids, *times, allowed=None):
        self.gate.wait(10)
        scores = np.full((len(history_ids), 2), self.manifest["step"], np.float32)
        return scores, np.full((len(history_ids), 2), 3)


class OtherKind(ItemDesk):
    """A desk of another kind."""


def write(root, number, **more):
    """A folder that `Stub` loads, as version `number`."""
    folder = root / str(number)
    folder.mkdir(parents=True)
    told = {"name": "stub", "step": number, "manifest_hash": f"hash{number}{sorted(more)}", **more}
    (folder / MANIFEST).write_text(json.dumps(told))
    return folder


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "root", 1)
    return tmp_path / "root"


def test_the_highest_number_counts_and_links_are_followed(root, tmp_path):
    write(root, 9)
    write(root, 10)
    (root / "11").mkdir()  # still without a manifest
    (root / ".12.tmp").mkdir()
    (tmp_path / "link").symlink_to(root / "9")
    assert newest(root) == root / "10"
    assert newest(root / "1") == root / "1"
    assert newest(tmp_path / "link") == root / "9"
    assert version_of(Stub(root / "10")) == "10"
    for nothing in (tmp_path, tmp_path / "nowhere", root / "11"):
        with pytest.raises(BundleError, match="no bundle here"):
            newest(nothing)


def serve(root, work, monkeypatch, **options):
    """`work(client, app)` against an app over the stubs of `root`."""
    monkeypatch.setattr(served, "load_bundle", Stub)

    async def main():
        app = served.create_app([Stub(newest(root))], roots={"stub": root}, max_batch=4, max_wait=0.0, **options)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            return await work(client, app)

    return asyncio.run(main())


def test_no_request_fails_while_versions_come_and_go(root, monkeypatch):
    async def work(client, app):
        answers, stop = [], asyncio.Event()

        async def ask():
            while not stop.is_set():
                reply = await client.post("/v1/recommend", json=ASKED)
                answers.append((reply.status_code, reply.json()["step"], reply.json()["items"][0]["score"]))

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        after = []
        for number in (2, 3):
            await asyncio.sleep(0.05)
            write(root, number)
            assert await app.state.shelf.refresh() == ["stub"]
            after.append((await client.post("/v1/recommend", json=ASKED)).json()["step"])
        assert await app.state.shelf.refresh() == []
        stop.set()
        await asyncio.gather(*asking)
        told, counted = (await client.get("/v1/models")).json(), (await client.get("/metrics")).text
        return answers, after, told["models"], counted

    answers, after, models, counted = serve(root, work, monkeypatch)
    assert {status for status, *_ in answers} == {200} and after == [2, 3]
    assert {step for _, step, _ in answers} == {1, 2, 3}
    assert all(step == score for _, step, score in answers)
    steps = [step for _, step, _ in answers]
    assert steps.index(3) > steps.index(2) > steps.index(1) == 0
    assert models == [{"name": "stub", "step": 3, "version": "3"}]
    assert 'recjax_bundle_loads_total{model="stub",outcome="served"} 3.0' in counted
    assert counted.count('recjax_model_info{hash="') == 1


def test_the_old_version_finishes_what_it_has_taken(root, monkeypatch):
    async def work(client, app):
        old = app.state.shelf.of(ItemDesk)["stub"].bundle
        old.gate.clear()
        early = [asyncio.create_task(client.post("/v1/recommend", json=ASKED)) for _ in range(6)]
        await asyncio.sleep(0.05)
        write(root, 2)
        refreshing = asyncio.create_task(app.state.shelf.refresh())
        while app.state.shelf.of(ItemDesk)["stub"].bundle is old:
            await asyncio.sleep(0.005)
        late = await client.post("/v1/recommend", json=ASKED)
        assert not refreshing.done() and not any(task.done() for task in early)
        old.gate.set()
        assert await refreshing == ["stub"]
        return [(await task).json()["step"] for task in early], late.json()["step"]

    assert serve(root, work, monkeypatch) == ([1] * 6, 2)


@pytest.mark.parametrize("how", ["broken", "another name", "no JSON", "another kind", "gone"])
def test_what_cannot_be_served_is_refused_once_and_the_old_one_stays(root, how, caplog):
    def load(path):
        bundle = Stub(path)
        return (OtherKind if bundle.manifest.get("other") else ItemDesk)(bundle)

    refused = []
    shelf = Shelf([load(root / "1")], load=load, roots={"stub": root}, on_refused=refused.append)
    if how == "no JSON":
        write(root, 2)
        (root / "2" / MANIFEST).write_text("{")
    elif how == "gone":
        root.rename(root.with_name("elsewhere"))
    else:
        write(root, 2, **{"broken": {"broken": 1}, "another name": {"name": "x"}}.get(how, {"other": 1}))

    async def work():
        await shelf.open()
        for _ in range(3):
            assert await shelf.refresh() == []
        assert shelf.of(ItemDesk)["stub"].bundle.manifest["step"] == 1 and refused == ["stub"]
        if how != "gone":
            write(root, 3)
            assert await shelf.refresh() == ["stub"]
            assert shelf.of(ItemDesk)["stub"].bundle.manifest["step"] == 3
        await shelf.close()

    asyncio.run(work())
    said = {"broken": "is broken", "another name": "'x'", "gone": "no bundle here"}
    assert "stub stays as it is" in caplog.text and said.get(how, "") in caplog.text


def test_an_answer_that_does_not_come_in_time_is_put_off(root, monkeypatch):
    async def work(client, app):
        desk = app.state.shelf.of(ItemDesk)["stub"]
        desk.bundle.gate.clear()
        late = await client.post("/v1/recommend", json=ASKED)
        desk.bundle.gate.set()
        return late, await client.post("/v1/recommend", json=ASKED)

    late, next_one = serve(root, work, monkeypatch, timeout=0.1)
    assert late.status_code == 503 and late.headers["retry-after"] == "1" and "0.1 s" in late.text
    assert next_one.status_code == 200


def test_who_would_wait_too_long_is_turned_away_at_once(root):
    async def work():
        bundle = Stub(root / "1")
        desk = ItemDesk(bundle, max_batch=1, max_wait=0.0, timeout=30.0)
        await desk.start()
        desk._call_seconds = 10.0  # of late
        bundle.gate.clear()
        waiting = [asyncio.create_task(desk.ask(Wanted(bundle.encode(["a"]))))]
        while not desk._thread._work_queue.qsize() and not desk._thread._threads:
            await asyncio.sleep(0.01)  # until it is with the model
        waiting += [asyncio.create_task(desk.ask(Wanted(bundle.encode(["a"])))) for _ in range(4)]
        await asyncio.sleep(0.05)
        assert len(desk._queue) == 4
        with pytest.raises(RequestError, match="too many") as refused:
            await desk.ask(Wanted(bundle.encode(["a"])))
        bundle.gate.set()
        answers = await asyncio.gather(*waiting)
        await desk.stop()
        return refused.value.status, len(answers)

    assert asyncio.run(work()) == (503, 5)


def test_a_server_that_is_about_to_stop_says_so_and_still_answers(root, monkeypatch):
    async def work(client, app):
        healthy = await client.get("/healthz")
        app.state.draining = True
        return healthy, await client.get("/healthz"), await client.post("/v1/recommend", json=ASKED)

    healthy, draining, answer = serve(root, work, monkeypatch)
    assert (healthy.status_code, draining.status_code, answer.status_code) == (200, 503, 200)
