"""Bundles of earlier versions are served as they were; `write_release.py` makes them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from recjax.serve.bundle import Bundle

RELEASES = Path(__file__).with_name("releases")
FOUND = sorted(path.relative_to(RELEASES).as_posix() for path in RELEASES.glob("*/*") if path.is_dir())


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("write_release", Path(__file__).with_name("write_release.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_releases_and_they_are_small():
    assert "0.1.0.dev0/items" in FOUND
    assert all(sum(f.stat().st_size for f in path.rglob("*")) < 120_000 for path in RELEASES.iterdir())


@pytest.mark.parametrize("name", FOUND)
def test_a_bundle_of_an_earlier_version_gives_the_answers_it_gave(name, script):
    bundle = Bundle(RELEASES / name)
    told = json.loads((RELEASES / name).with_name(script.ANSWERS).read_text())[Path(name).name]
    assert len(told) >= 9
    for one in told:
        found = script.answer(bundle, one)
        assert found["items"] == one["items"]
        np.testing.assert_allclose(found["scores"], one["scores"], rtol=1e-4, atol=1e-5)


def test_the_questions_tell_versions_apart(tmp_path, script):
    """What is written today answers the same questions otherwise than a bundle with other weights would."""
    script.write(tmp_path / "now")
    told = json.loads((tmp_path / "now" / script.ANSWERS).read_text())
    assert [one["history"] for one in told["items"]] == [one["history"] for one in script.questions()]
    assert len({tuple(one["items"]) for name in told for one in told[name]}) > 6
