"""An artifact comes back as it was written, appears whole or not at all, and every kind of damage is refused."""

import json

import numpy as np
import pytest

from recjax.core.artifact import open_artifact, read_artifact, write_artifact
from recjax.core.errors import ArtifactError

ARRAYS = {
    "vectors": np.arange(24, dtype=np.float32).reshape(6, 4),
    "user_index": np.arange(6, dtype=np.int64)[::-1],
    "item_id": np.array(["a", "bc", "", "dä", "e", "f"]),
    "none": np.zeros((0, 3), np.int32),
}


@pytest.fixture
def path(tmp_path):
    facts = {"recipe": "r", "step": 7, "vocabulary_hash": "abc", "about": {"split": "test"}}
    write_artifact(tmp_path / "deep" / "er", ARRAYS, kind="user_vectors", **facts)
    return tmp_path / "deep" / "er"


def test_comes_back_bit_by_bit(path):
    artifact = read_artifact(path, kind="user_vectors", vocabulary_hash="abc")
    assert list(artifact) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert artifact[name].dtype == array.dtype
        np.testing.assert_array_equal(artifact[name], array)
    assert isinstance(artifact["vectors"], np.memmap) and not artifact["vectors"].flags.writeable
    assert artifact.manifest["step"] == 7 and artifact.manifest["about"] == {"split": "test"}


def test_rows_appended_in_any_cut_give_the_same_files(path, tmp_path):
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(10_007, 3)).astype(np.float32)
    for i, cuts in enumerate(([], [1, 5000], sorted(rng.integers(0, len(whole), 40)))):
        with open_artifact(tmp_path / str(i), kind="k") as writer:
            for part in np.split(whole, cuts):
                writer.append("x", part)
    files = {(tmp_path / str(i) / "x.npy").read_bytes() for i in range(3)}
    assert len(files) == 1
    np.testing.assert_array_equal(np.load(tmp_path / "0" / "x.npy"), whole)


def test_failure_leaves_nothing_and_nothing_is_overwritten(path, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), open_artifact(tmp_path / "new", kind="k") as writer:
        writer.append("x", np.zeros(3))
        _ = 1 / 0
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(ArtifactError, match="overwrite"):
        write_artifact(path, {"x": np.ones(2)}, kind="k")
    assert read_artifact(path).manifest["kind"] == "user_vectors"


def test_it_is_not_there_before_the_block_ends(tmp_path):
    with open_artifact(tmp_path / "a", kind="k") as writer:
        writer.append("x", np.zeros(3))
        assert not (tmp_path / "a").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (np.zeros((1, 5), np.float32), "added to an array"),
        (np.zeros((1, 4), np.float64), "added to an array"),
        (np.array(1.0), "cannot store"),
        (np.array([{}]), "cannot store"),
    ],
)
def test_odd_rows_are_refused(tmp_path, rows, match):
    with pytest.raises(ValueError, match=match), open_artifact(tmp_path / "a", kind="k") as writer:
        writer.append("x", np.zeros((2, 4), np.float32))
        writer.append("x", rows)


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def edit(path, **changes):
    file = path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda p: (p / "vectors.npy").unlink(), "vectors.npy is missing"),
        (lambda p: (p / "vectors.npy").write_bytes((p / "vectors.npy").read_bytes()[:-3]), "bytes"),
        (lambda p: flip(p / "vectors.npy"), "vectors.npy was altered"),
        (lambda p: (p / "manifest.json").unlink(), "no artifact here"),
        (lambda p: (p / "manifest.json").write_text('{"format": 1'), "cannot read the manifest"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\xff"), "cannot read the manifest"),
        (lambda p: (p / "manifest.json").write_text("[]"), "format"),
        (lambda p: edit(p, format=99), "format 99"),
        (lambda p: edit(p, vocabulary_hash="xyz"), "manifest of this artifact was altered"),
    ],
)
def test_damage_is_refused(path, damage, match):
    damage(path)
    with pytest.raises(ArtifactError, match=match):
        read_artifact(path)


def test_what_was_not_asked_for_is_refused(path, tmp_path):
    with pytest.raises(ArtifactError, match="kind"):
        read_artifact(path, kind="codes")
    with pytest.raises(ArtifactError, match="vocabulary_hash"):
        read_artifact(path, vocabulary_hash="other")
    with pytest.raises(ArtifactError, match="no array"):
        read_artifact(path)["scores"]
    with pytest.raises(ArtifactError, match="no artifact here"):
        read_artifact(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="cannot write|overwrite"):
        write_artifact(tmp_path / "file" / "below", {"x": np.ones(1)}, kind="k")


def test_hash_follows_the_bytes(tmp_path):
    write_artifact(tmp_path / "a", {"x": np.zeros(3)}, kind="k")
    write_artifact(tmp_path / "b", {"x": np.ones(3)}, kind="k")
    assert read_artifact(tmp_path / "a").hash != read_artifact(tmp_path / "b").hash
