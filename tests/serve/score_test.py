"""Candidates scored over HTTP are scored as in the process that trained the model; odd questions get a reason."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from fastapi.testclient import TestClient

from recjax.core.errors import BundleError
from recjax.core.module import Functional
from recjax.data.ranking_records import RankingRecords
from recjax.data.record import Column
from recjax.data.vocab import FIRST_ITEM, rows_for
from recjax.export_score import export_scores
from recjax.metrics.calibration import Calibration, probabilities
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.prompts.chat import FORMATS, Chat, Memo
from recjax.prompts.labels import label_tokens
from recjax.prompts.library import LIKE, RELEVANCE
from recjax.prompts.template import Template
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.prompts.writer import Budget, PromptWriter
from recjax.scoring import Scorer
from recjax.serve.app import create_app
from recjax.serve.bundle import Bundle
from recjax.serve.kinds import load_bundle
from recjax.serve.score_bundle import ScoreBundle, ScoreTask
from recjax.serve.score_request import ScoreQuestion

WORDS = ("red", "blue", "quiet", "loud", "film", "story", "night", "river", "member", "rated", "history", "the")
TITLES = [f"The {a} {b}" for a in WORDS for b in WORDS]
CALIBRATED = Calibration(1.7, (0.0, -0.4))
ASKED: dict[str, Any] = {
    "candidates": [{"item": title} for title in TITLES[:5]],
    "history": [{"item": title, "action": "rated 4"} for title in TITLES[20:23]],
    "profile": ["age: 30"],
    "instruction": {"least": "4"},
}


class Exported(NamedTuple):
    path: Path
    model: Functional
    params: dict
    rows: tuple[int, ...]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    tokenizer = TokenizerConfig(size=600).make([*TITLES, *LIKE.words(), *RELEVANCE.words()])
    chat = Chat(FORMATS["turns"], Memo(tokenizer))
    rows = tuple(int(t) + FIRST_ITEM for t in label_tokens(chat, ("No", "Yes")))

    def task(name: str, template: Template, instruction: str, **more: Any) -> ScoreTask:
        prompts = {"name": name, "question": ["item"], "instruction": [instruction]}
        return ScoreTask(
            name=name,
            prompts=PromptWriter(template, chat, Budget(length=160), **prompts).told(),
            label_words=("No", "Yes"),
            label_columns=(0, 1),
            answer_length=2,
            **more,
        )

    calibrated = {"temperature": CALIBRATED.temperature, "bias": CALIBRATED.bias}
    tasks = [
        task("like", LIKE, "least", tells_history=True, **calibrated),
        task("relevance", RELEVANCE, "query", tells_history=False),
    ]
    encoder = TransformerConfig(num_layers=2, width=16, num_heads=2, position="rotary", norm="rms", bias=False)
    model = Functional(partial(Sequence, num_rows=rows_for(tokenizer.size), encoder=encoder))
    rng = np.random.default_rng(0)
    fresh = jax.jit(model.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: np.asarray(x + 0.2 * rng.normal(size=x.shape), np.float32), fresh)
    path = export_scores(
        model,
        params,
        tasks,
        out=tmp_path_factory.mktemp("score") / "bundle",
        tokenizer=tokenizer,
        label_rows=rows,
        suffix_width=48,
        widths=(160,),
        candidates=3,
        name="brew",
        platforms=("cpu",),
    )
    return Exported(path, model, params, rows)


@pytest.fixture(scope="module")
def bundle(exported: Exported) -> ScoreBundle:
    return ScoreBundle(exported.path)


@pytest.fixture(scope="module")
def client(bundle: ScoreBundle):
    with TestClient(create_app([bundle])) as client:
        yield client


def test_exported_equals_in_process(exported: Exported, bundle: ScoreBundle, client: TestClient) -> None:
    """The prompt as in training, every candidate alone, the calibration: over HTTP the same to the fifth digit."""
    answer = client.post("/v1/score", json=ASKED)
    assert answer.status_code == 200
    body = answer.json()
    _, prefix, suffixes = bundle.rows(ScoreQuestion(**ASKED))
    lengths = np.array([len(s) for s in suffixes])
    records = RankingRecords.of(
        {
            "items": Column(prefix, np.array([0, len(prefix)])),
            "suffixes": Column(np.concatenate(suffixes), np.array([0, lengths.sum()])),
            "suffix_lengths": Column(lengths, np.array([0, len(lengths)])),
            "labels": Column(np.zeros(len(lengths), np.int32), np.array([0, len(lengths)])),
            "user_index": Column(np.zeros(1, np.int64)),
        }
    )
    logits = Scorer(exported.model, label_rows=exported.rows, layout="naive")(exported.params, records).logits
    want = probabilities(CALIBRATED(logits))
    np.testing.assert_allclose([s["score"] for s in body["scores"]], want[:, 1], atol=1e-5)
    assert [s["probabilities"]["No"] for s in body["scores"]] == pytest.approx(want[:, 0].tolist(), abs=1e-5)
    assert np.ptp(want[:, 1]) > 1e-4
    assert (body["task"], body["model"], body["events_read"]) == ("like", "brew", 3)
    assert body["tokens"] == len(prefix) + lengths.sum()


def test_candidates_do_not_depend_on_company_and_prompts_are_remembered(
    bundle: ScoreBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, prefix, suffixes = bundle.rows(ScoreQuestion(**ASKED))
    together = bundle.logits(prefix, suffixes)  # in two calls
    programs: dict[tuple[str, int], Any] = dict(bundle._calls)
    prefill, calls = programs["prefill", 160], []
    programs["prefill", 160] = lambda *args: calls.append(1) or prefill(*args)
    monkeypatch.setattr(bundle, "_calls", programs)
    for at in (4, 0, 2):
        np.testing.assert_allclose(bundle.logits(prefix, [suffixes[at]])[0], together[at], rtol=1e-5, atol=1e-6)
    assert not calls
    bundle.logits(prefix[:-1], suffixes[:1])
    assert len(calls) == 1


def test_old_events_are_dropped_and_other_tasks_asked(client: TestClient) -> None:
    many = [{"item": title, "action": "rated 5"} for title in TITLES]
    body = client.post("/v1/score", json={**ASKED, "history": many}).json()
    assert 0 < body["events_read"] < len(many)
    newest = {**ASKED, "history": many[-body["events_read"] :]}
    assert client.post("/v1/score", json=newest).json()["scores"] == body["scores"]
    asked = {"task": "relevance", "instruction": {"query": "red film"}, "candidates": [{"item": "The red film"}]}
    body = client.post("/v1/score", json=asked).json()
    assert body["task"] == "relevance" and len(body["scores"]) == 1


def test_what_is_served_says_what_it_takes(client: TestClient) -> None:
    [model] = client.get("/v1/models").json()["models"]
    assert model["scores"] and model["tasks"]["like"] == {
        "label_words": ["No", "Yes"],
        "instruction": ["least"],
        "candidate": ["item"],
        "history": True,
    }
    assert "recjax_call_seconds" in client.get("/metrics").text


ODD: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "not JSON"),
    "no candidates": ({}, 422, "candidates is missing"),
    "none": ({"candidates": []}, 422, "candidates is a list"),
    "a text": ({"candidates": ["The red film"]}, 422, "candidates[0] is text"),
    "a number": ({"candidates": [{"item": 5}]}, 422, "is a number"),
    "another field": ({**ASKED, "candidates": [{"title": "x"}]}, 422, "item is missing"),
    "too many fields": ({**ASKED, "candidates": [{"item": "x", "year": "1"}]}, 422, "does not have"),
    "no instruction": ({"candidates": ASKED["candidates"]}, 422, "least is missing"),
    "odd event": ({**ASKED, "history": [{"item": "x"}]}, 422, "an event has"),
    "history of a search": (
        {"task": "relevance", "instruction": {"query": "x"}, "candidates": [{"item": "x"}], "history": []},
        422,
        "tells nothing of a user",
    ),
    "another task": ({**ASKED, "task": "love"}, 422, "no such task"),
    "another model": ({**ASKED, "model": "other"}, 404, "no such model"),
    "unknown field": ({**ASKED, "k": 3}, 422, "unknown field"),
    "long candidate": ({**ASKED, "candidates": [{"item": "river " * 60}]}, 422, "tokens"),
    "over budget": ({**ASKED, "instruction": {"least": "river " * 300}}, 422, "tokens, without any history"),
    "half a character": (json.dumps({**ASKED, "profile": ["\ud800"]}).encode(), 422, "profile[0] is text"),
    "half a name": (json.dumps({**ASKED, "instruction": {"\ud800": 1}}).encode(), 422, "is a number"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_questions_get_a_reason(client: TestClient, name: str) -> None:
    asked, status, words = ODD[name]
    body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    answer = client.post("/v1/score", content=body)
    assert (answer.status_code, words in answer.json()["error"]["what"]) == (status, True), answer.json()


def test_other_paths_say_what_this_server_is_for(client: TestClient) -> None:
    answer = client.post("/v1/recommend", json={"user_history": [1]})
    assert answer.status_code == 404 and "recommends" in answer.json()["error"]["what"]


def test_bundles_that_do_not_fit_are_refused(exported: Exported, tmp_path: Path) -> None:
    assert isinstance(load_bundle(exported.path), ScoreBundle)
    with pytest.raises(BundleError, match="of the kind 'score'"):
        Bundle(exported.path)
    with pytest.raises(BundleError, match="different names"):
        create_app([])
    altered = tmp_path / "altered"
    shutil.copytree(exported.path, altered)
    (altered / "text.model").write_bytes(b"x" * (altered / "text.model").stat().st_size)
    with pytest.raises(BundleError, match=r"text.model was altered"):
        ScoreBundle(altered)
    with pytest.raises(BundleError, match="tokenizer"):
        ScoreBundle(altered, verify=False)
    (altered / "branch-160.jaxexport").unlink()
    with pytest.raises(BundleError, match="missing"):
        ScoreBundle(altered)
