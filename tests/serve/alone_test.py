"""A bundle is loaded and asked by a process in which jax and numpy are all there is."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from recjax.serve.bundle import Bundle
from recjax.serve.stored import read_weights

# jax itself needs these; flatbuffers to read what it exported.
ALLOWED = ("jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "flatbuffers", "recjax")
ALONE = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def only(name, path=None, target=None):
    first = name.partition(".")[0]
    own = first in sys.stdlib_module_names or first.startswith("_sysconfigdata")
    return find(name, path, target) if own or first in {ALLOWED!r} else None
PathFinder.find_spec = staticmethod(only)
import json
from recjax.serve.bundle import Bundle
bundle = Bundle(sys.argv[1])
user = bundle.encode(json.loads(sys.argv[2]))
scores, rows = bundle.recommend(user.history_ids[None, :], user.seen_ids[None, :])
print(json.dumps([scores.tolist(), rows.tolist()]))
"""


def test_jax_and_numpy_are_enough(exported):
    bundle, ids = Bundle(exported.path), [1000 + 7 * i for i in (3, 77, 5, 149, 0, 9, 11)]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(exported.path), json.dumps(ids)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    scores, rows = json.loads(done.stdout)
    user = bundle.encode(ids)
    expected = exported.oracle(user.history_ids, user.seen_ids)
    assert rows[0] == np.argsort(-expected, kind="stable")[: bundle.max_k].tolist()
    np.testing.assert_allclose(scores[0], expected[rows[0]], rtol=1e-5, atol=1e-5)


def test_weights_are_read_as_safetensors_wrote_them(tmp_path):
    rng = np.random.default_rng(0)
    kinds = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8, np.int32, np.uint16, np.int64, np.bool_)
    arrays = {f"a/{i}": rng.normal(size=(3, i, 2)).astype(kind) for i, kind in enumerate(kinds)}
    arrays["one"] = np.full((), 5, np.float32)
    save_file(arrays, tmp_path / "w", metadata={"by": "a test"})
    found = read_weights(tmp_path / "w")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


HEADER = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x01", b"\xff" * 20, (2).to_bytes(8, "little") + b"[]", (2).to_bytes(8, "little") + b"{x"),
        *(
            (len(text) + extra).to_bytes(8, "little") + text + bytes(8)
            for extra, told in (
                (0, {"shape": [3]}),
                (0, {"dtype": "F31"}),
                (0, {"data_offsets": [4, 12]}),
                (0, {"data_offsets": [-8, 0]}),
                (0, {"data_offsets": "no"}),
                (1000, {}),
            )
            for text in [json.dumps({"x": {**HEADER["x"], **told}}).encode()]
        ),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path, data):
    (tmp_path / "w").write_bytes(data)
    with pytest.raises(ValueError):
        read_weights(tmp_path / "w")
