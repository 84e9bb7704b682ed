"""Search and filters over HTTP: the model's own answers, one queue for all kinds of question, a reason for refusals."""

import asyncio
import json

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recjax.data.vocab import FIRST_ITEM
from recjax.serve.app import PATHS, create_app
from recjax.serve.bundle import Bundle
from recjax.serve.features import pad
from recjax.serve.item_desk import ItemDesk, Wanted


@pytest.fixture(scope="module")
def bundle(searcher):
    return Bundle(searcher.path)


@pytest.fixture(scope="module")
def client(bundle, exported):
    with TestClient(create_app([Bundle(exported.path), bundle], max_batch=1)) as client:
        yield client


def ask(client, path, **body):
    return client.post(path, content=json.dumps(body))


def expected(searcher, bundle, encoded, allowed=None, seen=True):
    """Ids, titles and scores of the model itself."""
    history = pad([encoded.history_ids], count=1, width=bundle.prompt_length)
    had = pad([encoded.seen_ids if seen else encoded.seen_ids[:0]], count=1, width=64)
    everything = np.ones(searcher.vocab.num_rows, bool)
    scores, rows = searcher.answer(history, had, (everything if allowed is None else allowed)[None])
    there = np.isfinite(scores[0])
    rows = np.asarray(rows[0])[there]
    return searcher.vocab.decode(rows), [searcher.titles[r] for r in rows], np.asarray(scores[0])[there]


def compare(answer, wanted, k=10):
    items = answer.json()["items"]
    ids, titles, scores = (list(part[:k]) for part in wanted)
    assert [i["item_id"] for i in items] == ids
    assert [i["title"] for i in items] == titles
    np.testing.assert_allclose([i["score"] for i in items], scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("query", ["red lamp", "  RED   lamp ", "x", "what nobody ever called anything " * 20])
def test_a_query_is_answered_as_the_model_does(client, searcher, bundle, query):
    answer = ask(client, "/v1/search", query=query, k=20)
    assert answer.status_code == 200 and answer.json()["model"] == "searcher"
    compare(answer, expected(searcher, bundle, bundle.encode_query(query)), k=20)


def test_a_history_of_items_of_several_tokens(client, searcher, bundle):
    history = ["item3", "item8", "?", "item44", "item9", "item10"]
    answer = ask(client, "/v1/recommend", user_history=history, model="searcher")
    compare(answer, expected(searcher, bundle, bundle.encode(history)))
    assert answer.json()["unknown_items"] == 1
    again = ask(client, "/v1/recommend", user_history=history, model="searcher", exclude_seen=False)
    compare(again, expected(searcher, bundle, bundle.encode(history), seen=False))


@pytest.mark.parametrize("wanted", ["red", ["red"], ["green", "grey"]])
def test_a_filter_leaves_only_what_has_one_of_its_values(client, searcher, bundle, wanted):
    values = [wanted] if isinstance(wanted, str) else wanted
    mask = np.array([domain in values for domain in searcher.domains])
    for path, body, encoded in (
        ("/v1/search", {"query": "lamp"}, bundle.encode_query("lamp")),
        ("/v1/recommend", {"user_history": ["item1"], "model": "searcher"}, bundle.encode(["item1"])),
    ):
        answer = ask(client, path, **body, k=20, filter={"domain": wanted})
        compare(answer, expected(searcher, bundle, encoded, mask), k=20)
        assert {item["title"].split()[0] for item in answer.json()["items"]} <= set(values)
    items = ask(client, "/v1/search", query="lamp", k=20, filter={"domain": wanted}).json()["items"]
    assert len(items) == min(mask.sum(), 20)


def test_questions_of_all_kinds_share_a_call_and_get_their_own_answers(client, bundle):
    asked = [({"query": q}, bundle.encode_query(q), None) for q in ("red lamp", "red clock", "blue shelf")]
    asked += [({"user_history": [i], "model": "searcher"}, bundle.encode([i]), None) for i in ("item1", "item2")]
    blue = bundle.allowed({"domain": ["blue"]})
    asked += [({**body, "filter": {"domain": "blue"}}, encoded, blue) for body, encoded, _ in asked[1:4]]

    async def together():
        sizes = []
        desk = ItemDesk(bundle, max_batch=8, max_wait=5.0, on_batch=lambda size, _: sizes.append(size))
        await desk.start()
        answers = await asyncio.gather(*(desk.ask(Wanted(one, allowed=allowed)) for _, one, allowed in asked))
        await desk.stop()
        return answers, sizes

    answers, sizes = asyncio.run(together())
    assert sizes == [8]
    for (body, *_), answer in zip(asked, answers, strict=True):
        alone = ask(client, "/v1/search" if "query" in body else "/v1/recommend", **body).json()["items"]
        assert [item["item_id"] for item in alone] == bundle.vocab.decode(answer.rows[:10])
        np.testing.assert_allclose([item["score"] for item in alone], answer.scores[:10], rtol=1e-4, atol=1e-5)
    assert len({answer.rows.tobytes() for answer in answers}) == 8


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/search", {"query": ""}, 422, "the query is empty"),
        ("/v1/search", {"query": " \t\n "}, 422, "the query is empty"),
        ("/v1/search", {}, 422, "query is missing"),
        ("/v1/search", {"query": "lamp", "model": "decay"}, 422, "decay does not search"),
        ("/v1/search", {"query": "lamp", "model": "other"}, 404, "one of: decay, searcher"),
        ("/v1/search", {"query": "lamp", "k": 21}, 422, "1 to 20"),
        ("/v1/search", {"query": "lamp", "filter": {"colour": "red"}}, 422, "there is no facet colour"),
        ("/v1/search", {"query": "lamp", "filter": {"colour": "red"}}, 422, "one of: domain"),
        ("/v1/search", {"query": "lamp", "filter": {"domain": "pink"}}, 422, "one of: blue, green, grey, red"),
        ("/v1/search", {"query": "lamp", "filter": {"domain": ["red", "pink"]}}, 422, "no item has pink"),
        ("/v1/search", {"query": "lamp", "filter": {"\ud800": "\ud800"}}, 422, "there is no facet"),
        ("/v1/recommend", {"user_history": [1000], "filter": {"domain": "red"}}, 422, "the model has none"),
        ("/v1/recommend", {"user_history": ["nobody"], "model": "searcher"}, 422, "no item of user_history is known"),
    ],
)
def test_refusals_say_why(client, path, body, status, says):
    answer = ask(client, path, **body)
    assert answer.status_code == status and says in answer.text and answer.json()["error"]["what"]


VALUES = st.none() | st.integers() | st.text(max_size=8) | st.lists(st.text(max_size=5), max_size=3)
FILTERS = st.dictionaries(st.sampled_from(["domain", "x"]), st.sampled_from(["red", "blue"]) | VALUES, max_size=2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(query=st.text() | VALUES, wanted=FILTERS | VALUES, k=st.integers(0, 22))
def test_no_query_or_filter_makes_the_server_fail(client, query, wanted, k):
    answer = ask(client, "/v1/search", query=query, filter=wanted, k=k)
    assert answer.status_code in (200, 422)
    if answer.status_code == 200:
        assert len(answer.json()["items"]) == min(k, 15 if len(wanted.get("domain", "")) == 1 else 60) or wanted


def test_models_say_what_they_answer_and_users_what_they_had(client, searcher):
    decay, told = client.get("/v1/models").json()["models"]
    assert (decay["recommends"], decay["searches"], decay["facets"], decay["sample_users"]) == (True, False, {}, 0)
    assert (told["recommends"], told["searches"], told["sample_users"]) == (True, True, 2)
    assert sorted(told["facets"]["domain"]) == ["blue", "green", "grey", "red"]
    assert client.get("/v1/users?model=decay").json() == {"model": "decay", "users": []}
    assert client.get("/v1/users?model=nobody").status_code == 404
    users = client.get("/v1/users").json()  # of the first model that has some
    assert users["model"] == "searcher" and len(users["users"]) == 2
    row = FIRST_ITEM + 8
    assert users["users"][0]["history"][1] == {"item_id": "item8", "title": searcher.titles[row]}


def test_a_model_trained_on_queries_alone_recommends_nothing(searcher, bundle, monkeypatch):
    monkeypatch.setattr(bundle, "recommends", False)
    with TestClient(create_app([bundle], max_batch=1)) as client:
        answer = ask(client, "/v1/recommend", user_history=["item3"])
        assert answer.status_code == 422 and "/v1/search" in answer.text


def test_the_description_of_the_api_has_every_path_and_its_body(client):
    told = client.get("/openapi.json").json()["paths"]
    assert set(told) == set(PATHS) - {"/"}
    for path, field in (("/v1/recommend", "user_history"), ("/v1/search", "query")):
        schema = told[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["required"] == [field] and {"k", "filter", "model"} < set(schema["properties"])
    assert client.get("/docs").status_code == 200
    for path in ("/v1/search", "/v1/users", "/"):
        client.request("POST" if path == "/v1/search" else "GET", path)
        assert f'recjax_requests_total{{path="{path}"' in client.get("/metrics").text
