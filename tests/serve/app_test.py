"""The HTTP service: right answers, a reason for every refusal, and never a 5xx for whatever is sent."""

import json
import string

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recjax.core.errors import BundleError
from recjax.serve.app import create_app
from recjax.serve.bundle import Bundle

IDS = [1000 + 7 * i for i in (3, 77, 5, 149)]


@pytest.fixture(scope="module")
def bundle(exported):
    return Bundle(exported.path)


@pytest.fixture(scope="module")
def client(bundle):
    with TestClient(create_app([bundle], max_batch=1, max_wait=0.0, max_body=50_000)) as client:
        yield client


def ask(client, **body):
    return client.post("/v1/recommend", content=json.dumps(body))


def test_the_best_items_come_in_order_with_titles(client, exported, bundle):
    answer = ask(client, user_history=IDS, k=7).json()
    user = bundle.encode(IDS)
    expected = exported.oracle(user.history_ids, user.seen_ids)
    best = np.argsort(-expected, kind="stable")[:7]
    assert [i["item_id"] for i in answer["items"]] == exported.vocab.decode(best)
    assert [i["title"] for i in answer["items"]] == [bundle.titles[row] for row in best]
    np.testing.assert_allclose([i["score"] for i in answer["items"]], expected[best], rtol=1e-5)
    assert (answer["model"], answer["step"], answer["unknown_items"]) == ("decay", 12, 0)


def test_seen_items_come_back_only_when_asked_for(client, exported, bundle):
    everything = [int(i) for i in exported.vocab.ids]
    history = everything[:130]
    without = {i["item_id"] for i in ask(client, user_history=history, k=20).json()["items"]}
    assert without == set(everything[130:])
    user = bundle.encode(history)
    best = np.argsort(-exported.oracle(user.history_ids), kind="stable")[:20]
    items = ask(client, user_history=history, k=20, exclude_seen=False).json()["items"]
    assert [i["item_id"] for i in items] == exported.vocab.decode(best)


def test_fewer_than_k_only_when_the_catalogue_has_no_more(client, exported):
    assert len(ask(client, user_history=list(exported.vocab.ids[:145])).json()["items"]) == 5
    assert ask(client, user_history=list(exported.vocab.ids)).json()["items"] == []


def test_ids_may_be_text_or_numbers_and_unknown_ones_keep_their_place(client):
    numbers, text = ask(client, user_history=IDS).json(), ask(client, user_history=[str(i) for i in IDS]).json()
    assert numbers == text
    odd = ask(client, user_history=[*IDS, "nobody", -5, "", "\ud800", 10**30]).json()
    assert odd["unknown_items"] == 5
    assert odd["items"] != numbers["items"]


@pytest.mark.parametrize("history", [[], ["nobody"], [*IDS, "a", "b", "c", "d", "e", "f"]])
def test_a_stranger_is_refused_with_a_reason(client, history):
    answer = ask(client, user_history=history)
    assert answer.status_code == 422
    assert "empty" in answer.text if not history else "known" in answer.text


@pytest.mark.parametrize("k", [0, -1, 21, 10**100])
def test_k_out_of_range(client, k):
    answer = ask(client, user_history=IDS, k=k)
    assert answer.status_code == 422 and answer.json()["error"]["expected"] == "1 to 20"


def test_other_refusals(client):
    assert client.post("/v1/recommend", content=b"{").status_code == 400
    assert client.post("/v1/recommend", content=b'{"user_history": [NaN]}').status_code == 400
    assert client.post("/v1/recommend").status_code == 400
    assert ask(client, user_history=IDS, model="other").status_code == 404
    large = json.dumps({"user_history": ["x" * 60_000]}).encode()
    assert client.post("/v1/recommend", content=large).status_code == 413
    chunks = (large[i : i + 1000] for i in range(0, len(large), 1000))
    assert client.post("/v1/recommend", content=chunks).status_code == 413
    unknown, method = client.get("/v1/recommendations"), client.get("/v1/recommend")
    assert unknown.status_code == 404 and "/v1/recommend" in unknown.json()["error"]["expected"]
    assert method.status_code == 405 and method.headers["allow"] == "POST"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(IDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "user_history": st.lists(st.sampled_from(IDS) | st.integers() | st.text(), max_size=9) | VALUES,
        "k": st.integers(-2, 25) | VALUES,
        "exclude_seen": st.booleans() | VALUES,
        "model": st.just("decay") | VALUES,
        "x": VALUES,
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(body=(BODIES | VALUES).map(lambda v: json.dumps(v).encode()) | st.binary(max_size=40))
def test_no_body_makes_the_server_fail(client, body):
    answer = client.post("/v1/recommend", content=body)
    assert answer.status_code in (200, 400, 404, 422)
    if answer.status_code == 200:
        asked = json.loads(body)
        assert len(answer.json()["items"]) == asked.get("k", 10)
    else:
        assert answer.json()["error"]["what"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(
    method=st.sampled_from(["GET", "PUT", "DELETE", "POST", "PATCH", "HEAD", "OPTIONS", "TRACE"]),
    path=st.text(string.ascii_letters + "/%.1?#", max_size=12),
)
def test_no_path_or_method_makes_the_server_fail(client, method, path):
    assert client.request(method, "http://testserver/v1/" + path).status_code < 500


def test_health_models_and_metrics(client):
    before = client.get("/metrics").text
    assert client.get("/healthz").json() == {"status": "ok"}
    (model,) = client.get("/v1/models").json()["models"]
    assert (model["name"], model["max_k"], model["history_length"], model["num_items"]) == ("decay", 20, 6, 150)
    ask(client, user_history=[*IDS, "nobody"])
    after = client.get("/metrics").text

    def value(text, name):
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)

    for name, step in {
        'recjax_requests_total{path="/v1/recommend",status="200"}': 1,
        'recjax_history_events_total{model="decay"}': 5,
        'recjax_unknown_events_total{model="decay"}': 1,
        'recjax_batch_size_count{model="decay"}': 1,
    }.items():
        assert value(after, name) == value(before, name) + step
    assert 'recjax_model_info{hash="' in after


def test_two_bundles_of_one_name_are_refused(bundle):
    for bundles in ([bundle, bundle], []):
        with pytest.raises(BundleError, match="different names"):
            create_app(bundles)


def test_the_model_named_answers(bundle):
    other = Bundle(bundle.path)
    other.name = "other"
    other.vocab = type(bundle.vocab)(tuple(f"i{i}" for i in range(bundle.vocab.num_items)), "str")
    with TestClient(create_app([bundle, other], max_batch=1)) as client:
        assert ask(client, user_history=IDS).json()["model"] == "decay"
        answer = ask(client, user_history=["i3", "i77", "i5", "i149"], model="other").json()
        assert answer["model"] == "other" and str(answer["items"][0]["item_id"]).startswith("i")


def test_an_error_of_the_model_is_a_500_with_a_reason_and_not_the_end(bundle, monkeypatch):
    broken = Bundle(bundle.path)
    with TestClient(create_app([broken], max_batch=1), raise_server_exceptions=False) as client:
        monkeypatch.setattr(broken, "recommend", lambda *_: 1 / 0)
        answer = ask(client, user_history=IDS)
        assert answer.status_code == 500 and "error" in answer.json()
        monkeypatch.undo()
        assert ask(client, user_history=IDS).status_code == 200
