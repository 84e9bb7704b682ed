"""Bundles of earlier versions are served as they were; `write_release.py` makes them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from recjax.serve.kinds import load_bundle

RELEASES = Path(__file__).with_name("releases")
FOUND = sorted(path.relative_to(RELEASES).as_posix() for path in RELEASES.glob("*/*") if path.is_dir())


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("write_release", Path(__file__).with_name("write_release.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_releases_of_all_kinds_and_they_are_small(script):
    assert {f"0.1.0.dev0/{name}" for name in script.KINDS} <= {*FOUND}
    assert all(sum(f.stat().st_size for f in (RELEASES / name).iterdir()) < 150_000 for name in FOUND)


@pytest.mark.parametrize("name", FOUND)
def test_a_bundle_of_an_earlier_version_gives_the_answers_it_gave(name, script):
    bundle = load_bundle(RELEASES / name)
    told = json.loads((RELEASES / name).with_name(script.ANSWERS).read_text())[Path(name).name]
    assert len(told) >= 3
    for one in told:
        found = script.answer(bundle, {key: value for key, value in one.items() if key not in ("items", "scores")})
        np.testing.assert_allclose(found["scores"], one["scores"], rtol=1e-4, atol=1e-5)
        assert {**found, "scores": one["scores"]} == one


@pytest.mark.parametrize("name", ["items", "codes", "rank", "score"])
def test_the_questions_tell_versions_apart(name, script):
    """A bundle with other weights would answer otherwise: what is asked leads to different answers."""
    told = json.loads((RELEASES / "0.1.0.dev0" / script.ANSWERS).read_text())[name]
    asked = [{key: value for key, value in one.items() if key not in ("items", "scores")} for one in told]
    assert asked == script.questions(name)
    if name in ("items", "codes"):
        assert len({tuple(one["items"]) for one in told}) > 6
    else:
        scores = np.concatenate([one["scores"] for one in told])
        assert len(np.unique(scores.round(3))) > 6
