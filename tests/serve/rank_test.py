"""Candidates ranked over HTTP are ranked as in the process that trained the model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from recjax.core.errors import RequestError
from recjax.data.counters import DAY
from recjax.data.rows_feed import RowReader
from recjax.models.ranker import Head
from recjax.nn.dense import DomainAdapters
from recjax.nn.tower import TowerConfig
from recjax.serve.app import create_app
from recjax.serve.rank_bundle import RankBundle
from recjax.serve.rank_desk import RankDesk
from recjax.serve.rank_request import RankQuestion, parse_rank

PRIOR = 10.0
CONTEXT = {"user_id": 3, "device": "phone", "hour": 7}
ASKED: dict[str, Any] = {"context": CONTEXT, "candidates": [{"item_id": item} for item in (5, 2, 29, 11, 999)]}


@pytest.fixture(scope="module")
def bundle(ranked: Any) -> RankBundle:
    return RankBundle(ranked.path)


@pytest.fixture(scope="module")
def client(bundle: RankBundle) -> Iterator[TestClient]:
    with TestClient(create_app([bundle])) as client:
        yield client


def question(body: Any) -> RankQuestion:
    return parse_rank(json.dumps(body).encode())


def world_of(ranked: Any) -> Any:
    return ranked.assembly.recipe.mixture.tasks[0].data.simulate


def test_exported_logits_are_those_of_evaluation(ranked: Any, bundle: RankBundle) -> None:
    """For every row of the test split, whatever the size of a call."""
    evaluator: Any = ranked.assembly.evaluator("test")
    wanted = evaluator.scores(ranked.params, correct=False)
    reader = evaluator.reader
    batch = reader.read(np.arange(len(reader)))
    fields = {name: x for name, x in batch.items() if name.startswith("field/")}
    found = bundle.logits(fields)
    some = bundle.logits({name: x[3:8] for name, x in fields.items()})
    for column, head in enumerate(("click", "like")):
        np.testing.assert_allclose(found[:, column], wanted[head], atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(some[:, column], wanted[head][3:8], atol=1e-6, rtol=1e-6)
    assert np.ptp(found) > 0.1


def logged(world: Any) -> list[dict[str, Any]]:
    """What a server would have been given for each row of the log: its columns, and counters and a history made by
    looking at every earlier row of the training split."""
    tables = world.tables()
    assert tables.items is not None
    rows = tables.interactions.sort("timestamp", maintain_order=True).join(
        tables.items.select("item_id", "genre"), on="item_id", how="left", maintain_order="left"
    )
    times, clicks = rows["timestamp"].to_numpy(), rows["click"].to_numpy().astype(np.float64)
    train = times < np.sort(times)[int(len(times) * 0.8)]
    item, user, genre = rows["item_id"].to_numpy(), rows["user_id"].to_numpy(), rows["genre"].to_numpy()
    found = []
    for at, row in enumerate(rows.select("user_id", "item_id", "device", "hour").to_dicts()):
        before = train & (times < times[at])
        lately = before & (times >= times[at] - 2 * DAY)
        of_item, of_pair = before & (item == item[at]), lately & (user == user[at]) & (genre == genre[at])
        clicked = before & (user == user[at]) & (clicks > 0)

        def rate(mine: np.ndarray, all_rows: np.ndarray) -> float:
            overall = (clicks[all_rows].sum() + 1) / (all_rows.sum() + 2)
            return float((clicks[mine].sum() + PRIOR * overall) / (mine.sum() + PRIOR))

        found.append(
            {
                **row,
                "item_id.count": int(of_item.sum()),
                "item_id.click": rate(of_item, before),
                "user_id_x_genre.2d.click": rate(of_pair, lately),
                "history": item[clicked][-4:].tolist(),
            }
        )
    return found


def test_a_thousand_logged_requests_have_the_bytes_of_their_rows(ranked: Any, bundle: RankBundle) -> None:
    """Over JSON, one at a time and many in one call: no skew between training and serving."""
    reader = RowReader(ranked.assembly.examples[0], "train")
    rows = reader.read(np.arange(1000))
    bodies = [
        {"context": {k: v for k, v in row.items() if not k.startswith("item_id")},
         "candidates": [{k: v for k, v in row.items() if k.startswith("item_id")}]}
        for row in logged(world_of(ranked))[:1000]
    ]  # fmt: skip
    asked = [question(body) for body in bodies]
    together = bundle.fields(asked)
    for name, values in together.items():
        assert values.tobytes() == rows[name].tobytes(), name
    for at, one in enumerate(asked):
        bundle.check(one)
        for name, values in bundle.fields([one]).items():
            assert values.tobytes() == rows[name][at : at + 1].tobytes(), (at, name)


def test_candidates_come_best_first_with_calibrated_probabilities(
    ranked: Any, bundle: RankBundle, client: TestClient
) -> None:
    logits = bundle.logits(bundle.features.request(CONTEXT, [c["item_id"] for c in ASKED["candidates"]]))
    heads = {head["name"]: head for head in bundle.manifest["heads"]}
    for column, head in enumerate(("click", "like")):
        body = client.post("/v1/rank", json={**ASKED, "head": head}).json()
        z = logits[:, column] / heads[head]["temperature"] + heads[head]["bias"]
        order = [ranked["candidate"] for ranked in body["ranked"]]
        assert order == np.argsort(-logits[:, column], kind="stable").tolist() and body["head"] == head
        found = [ranked["scores"][head] for ranked in body["ranked"]]
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-z[order])), atol=1e-6)
    few = client.post("/v1/rank", json={**ASKED, "k": 2}).json()
    assert few["head"] == "click" and len(few["ranked"]) == 2 and (few["model"], few["step"]) == ("ranks", 7)


def test_a_calibrated_head_says_what_happens(ranked: Any, bundle: RankBundle) -> None:
    """On the split it was calibrated on, by maximum likelihood: mean prediction = rate, logits not too far apart."""
    reader = RowReader(ranked.assembly.examples[0], "valid")
    batch, labels = reader.read(np.arange(len(reader))), reader.column("labels")
    p = bundle.scores(bundle.logits({k: v for k, v in batch.items() if k.startswith("field/")}))
    for column in range(2):
        known = labels[:, column] >= 0
        np.testing.assert_allclose(p[known, column].mean(), labels[known, column].mean(), atol=1e-4)


def test_counters_come_from_the_log_unless_the_request_brings_them(ranked: Any, client: TestClient) -> None:
    names = ["item_id.count", "item_id.click", "user_id_x_genre.2d.click", "history"]
    plain = client.post("/v1/rank", json=ASKED).json()
    assert set(plain["from_log"]) == {*names, "user_id_x_genre.2d.count", "item_id.like", "user_id_x_genre.2d.like"}
    brought = {"history": [1, 2], "user_id_x_genre.2d.click": 0.5}
    some = client.post("/v1/rank", json={**ASKED, "context": {**CONTEXT, **brought}}).json()
    assert set(plain["from_log"]) - set(some["from_log"]) == set(brought)
    [told] = client.get("/v1/models").json()["models"]
    assert told["ranks"] and told["remembered"]["history"] == ["user_id"]
    assert told["remembered"]["user_id_x_genre.2d.click"] == ["user_id", "genre"]
    assert told["columns"]["history"] == "list" and told["columns"]["item_id.count"] == "number"
    times = world_of(ranked).tables().interactions["timestamp"].sort().to_numpy()
    assert told["log"] == {"end": int(times[int(len(times) * 0.8) - 1]), "events": "train"}
    assert told["heads"]["like"]["rule"] == "rating >= 4"


@pytest.mark.parametrize("slot", ["user_id", "device", "hour", "item_id"])
def test_every_slot_may_be_missing(bundle: RankBundle, slot: str) -> None:
    row = {**CONTEXT, "item_id": 5}
    del row[slot]
    for body in ({"candidates": [row]}, {"context": {slot: None}, "candidates": [row, {}]}):
        assert np.isfinite(bundle.logits(bundle.fields([question(body)]))).all()


def test_requests_that_wait_go_together_and_do_not_notice(bundle: RankBundle) -> None:
    rng, sizes = np.random.default_rng(0), []
    asked = [
        RankQuestion(
            context={"user_id": int(user), "history": [1, 2][: user % 3]} if user % 2 else {"user_id": f"u{user}"},
            candidates=[{"item_id": int(item)} for item in rng.integers(1, 40, 1 + user % 7)],
        )
        for user in range(60)
    ]

    async def all_at_once() -> list[dict[str, Any]]:
        desk = RankDesk(bundle, on_batch=lambda size, seconds: sizes.append(size))
        await desk.start()
        answers = await asyncio.gather(*(desk.ask(one) for one in asked))
        await desk.stop()
        return answers

    together = asyncio.run(all_at_once())
    assert sum(sizes) == len(asked) and len(sizes) < len(asked)
    for one, answer in zip(asked, together, strict=True):
        [alone] = RankDesk(bundle).answers([one])
        assert {k: v for k, v in alone.items() if k != "ranked"} == {k: v for k, v in answer.items() if k != "ranked"}
        ours, theirs = ({r["candidate"]: r["scores"]["click"] for r in x["ranked"]} for x in (alone, answer))
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_what_candidates_have_alike_is_computed_once_and_nothing_else_changes(
    bundle: RankBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    asked = [
        RankQuestion(context=context, candidates=[{"item_id": int(item)} for item in rng.integers(1, 40, count)])
        for context, count in (({**CONTEXT, "history": [1, 2]}, 40), ({"user_id": "stranger"}, 3), ({}, 17))
    ]
    rows = bundle.logits(bundle.fields(asked))
    assert {"field/user_id", "field/history"} < {*bundle.alike} and "field/item_id" not in bundle.alike
    brought = [{**row, "device": "tv"} for row in asked[0].candidates]  # no longer alike
    other = RankQuestion(context=CONTEXT, candidates=brought)
    want = bundle.logits(bundle.fields([other]))
    np.testing.assert_allclose(bundle.answer([other]), want, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(bundle, "logits", lambda fields: pytest.fail("all rows were computed whole"))
    np.testing.assert_allclose(bundle.answer(asked), rows, rtol=1e-5, atol=1e-6)
    with pytest.raises(pytest.fail.Exception):
        bundle.answer([other])


def test_when_too_many_wait_the_next_is_turned_away(bundle: RankBundle) -> None:
    async def crowd() -> list[Any]:
        desk = RankDesk(bundle, max_queue=3)
        await desk.start()
        one = RankQuestion(candidates=[{"item_id": 1}])
        found = await asyncio.gather(*(desk.ask(one) for _ in range(200)), return_exceptions=True)
        await desk.stop()
        return found

    found = asyncio.run(crowd())
    refused = [x for x in found if isinstance(x, RequestError)]
    assert refused and {x.status for x in refused} == {503}
    assert all(isinstance(x, RequestError) or x["ranked"] for x in found)


def test_heads_that_were_taught_are_left_out(export_ranks: Callable[..., Any], tmp_path: Path) -> None:
    heads = (Head(name="click"), Head(name="like"), Head(name="soft", beside="click", tower=TowerConfig(widths=(4,))))
    made = export_ranks(tmp_path / "bundle", heads=heads)
    assert any("head_soft" in path for path in made.params) or "head_soft" in made.params
    bundle = RankBundle(made.path)
    assert list(bundle.heads) == ["click", "like"] and not any("soft" in name for name in bundle.manifest["weights"])
    evaluator: Any = made.assembly.evaluator("test")
    batch = evaluator.reader.read(np.arange(20))
    found = bundle.logits({k: v for k, v in batch.items() if k.startswith("field/")})
    wanted = evaluator.scores(made.params, correct=False)["click"][:20]
    np.testing.assert_allclose(found[:, 0], wanted, atol=1e-6, rtol=1e-6)


def test_a_model_of_domains_is_told_the_domain(export_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """Rows of a domain that training did not have are left to the backbone."""
    made = export_ranks(tmp_path / "bundle", adapters=DomainAdapters(domains=3, rank=2))
    bundle = RankBundle(made.path)
    assert bundle.domains == {"column": "domain", "names": ["site0", "site1", "site2"]}
    assert bundle.columns.kinds["domain"] == "value"
    sites = ["site2", "site0", None, "elsewhere"]
    asked = question({"candidates": [{"item_id": 5, "domain": site} for site in sites]})
    assert bundle.fields([asked])["domain"].tolist() == [2, 0, 3, 3]
    assert bundle.manifest["schema"]["arguments"]["domain"] == "int32 [b]"


def test_the_route_is_described(client: TestClient) -> None:
    told = client.get("/openapi.json").json()["paths"]["/v1/rank"]["post"]
    schema = told["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["candidates"] and set(schema["properties"]) == {
        *("context", "candidates", "k", "head", "model")
    }
    assert {"200", "422", "503"} <= set(told["responses"])
