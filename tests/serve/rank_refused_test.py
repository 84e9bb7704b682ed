"""Odd questions to a ranker get a reason, and so does a bundle of other features than its weights were trained with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from recjax.core.errors import BundleError, RequestError
from recjax.core.folder import write_manifest
from recjax.serve.app import create_app
from recjax.serve.bundle import Bundle
from recjax.serve.kinds import load_bundle
from recjax.serve.rank_bundle import RankBundle
from recjax.serve.rank_request import MAX_CANDIDATES, RankQuestion, parse_rank

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


@pytest.mark.parametrize(
    ("change", "status", "where"),
    [
        ({"candidates": [{}] * (MAX_CANDIDATES + 1)}, 422, "candidates"),
        ({"context": {"colour": 1}}, 422, "context"),
        ({"context": {"history": [[1]]}}, 422, "context.history"),
        ({"context": {"item_id.count": "many"}}, 422, "context.item_id.count"),
        ({"head": "buy"}, 422, "head"),
        ({"model": "other"}, 404, "model"),
    ],
)
def test_an_odd_question_gets_a_reason(client: TestClient, change: dict[str, Any], status: int, where: str) -> None:
    answer = client.post("/v1/rank", content=json.dumps({**ASKED, **change}))
    assert (answer.status_code, answer.json()["error"]["where"]) == (status, where)
    assert answer.json()["error"]["what"] and answer.json()["error"]["expected"]


@pytest.mark.parametrize("body", [b"", b"{", b'{"candidates": [{"item_id": NaN}]}', b"\xff"])
def test_what_is_no_json_is_400(client: TestClient, body: bytes) -> None:
    assert client.post("/v1/rank", content=body).status_code == 400


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
NAMES = st.sampled_from(["user_id", "item_id", "device", "hour", "history", "item_id.count", "genre"])
ROWS = st.dictionaries(NAMES, VALUES, max_size=4)


@given(context=ROWS, candidates=st.lists(ROWS, min_size=1, max_size=4), head=st.sampled_from(["", "click", "buy"]))
def test_whatever_is_asked_is_answered_or_refused(bundle: RankBundle, context: Any, candidates: Any, head: str) -> None:
    try:
        asked = question({"context": context, "candidates": candidates, "head": head})
        bundle.check(asked)
    except RequestError as error:
        assert 400 <= error.status < 500
    else:
        assert np.isfinite(bundle.logits(bundle.fields([asked]))).all()


def rewritten(path: Path, to: Path, **changes: Any) -> Path:
    copy = shutil.copytree(path, to)
    manifest = json.loads((copy / "manifest.json").read_text())
    left_out = ("files", "recjax_version", "created", "manifest_hash")
    write_manifest(copy, {k: v for k, v in manifest.items() if k not in left_out} | changes)
    return copy


def test_fields_of_other_weights_are_refused(ranked: Any, tmp_path: Path) -> None:
    told = json.loads((ranked.path / "manifest.json").read_text())
    with pytest.raises(BundleError, match="the encoder of the weights"):
        RankBundle(rewritten(ranked.path, tmp_path / "a", encoder_hash="0" * 16))
    with pytest.raises(BundleError, match="made for other"):
        schema = {**told["schema"], "arguments": {"weights": "safetensors by name"}}
        RankBundle(rewritten(ranked.path, tmp_path / "b", schema=schema))
    copy = shutil.copytree(ranked.path, tmp_path / "c")
    text = (copy / "features.json").read_text()
    (copy / "features.json").write_text(text.replace('"phone"', '"phony"', 1))
    with pytest.raises(BundleError, match="altered"):
        RankBundle(copy)


def test_feature_code_that_encodes_otherwise_is_refused(ranked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from recjax.data import fitted_fields

    monkeypatch.setattr(fitted_fields, "mixed", lambda hashes: hashes)
    with pytest.raises(BundleError, match="makes other bytes of field/device_x_genre"):
        RankBundle(ranked.path)


def test_each_kind_of_bundle_is_loaded_as_what_it_is(ranked: Any) -> None:
    assert isinstance(load_bundle(ranked.path), RankBundle)
    with pytest.raises(BundleError, match="'rank'"):
        Bundle(ranked.path)
