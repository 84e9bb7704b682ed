"""A warm start takes what it says it takes, and lists whatever it cannot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core import optim, state
from recjax.core.checkpoint import Checkpointer, Checkpoints
from recjax.core.errors import CheckpointError, ConfigError
from recjax.core.sharding import MeshConfig, make_mesh
from recjax.core.warm_start import WarmStart, warm_start


def source_params():
    return {
        "encoder": {"table": jnp.arange(64.0).reshape(16, 4), "layer": {"up": jnp.full((4, 8), 2.0)}},
        "head": {"bias": jnp.full(16, 3.0)},
    }


@pytest.fixture
def run(tmp_path):
    made = state.create(source_params(), optim.make(optim.Optimizer(), source_params(), 1))
    with Checkpointer(tmp_path, Checkpoints()) as checkpointer:
        checkpointer.save(made, metrics={"loss": 1.0})
    return str(tmp_path)


def test_renamed_parameters_arrive_in_the_layout_and_dtype_of_the_model(run):
    mesh = make_mesh(MeshConfig(preset="fsdp"))
    params = {
        "item": {"table": jax.device_put(jnp.zeros((16, 4), jnp.bfloat16), mesh.sharding(("items", None)))},
        "block": {"up": jnp.zeros((4, 8)), "new": jnp.full(2, 7.0)},
    }
    config = WarmStart(
        checkpoints=run, rename=(("^encoder/", ""), ("^table", "item/table"), (r"layer/(\w+)", r"block/\1")),
        allow=("^head/", "new$"), step="min:loss",
    )  # fmt: skip
    got, taken = warm_start(config, params)
    assert (
        taken.fresh == ["block/new"] and taken.left == ["head/bias"] and set(taken.copied) == {"item/table", "block/up"}
    )
    assert got["block"]["new"] is params["block"]["new"]
    np.testing.assert_array_equal(got["block"]["up"], np.full((4, 8), 2.0))
    table = got["item"]["table"]
    assert table.dtype == jnp.bfloat16 and table.sharding == params["item"]["table"].sharding
    np.testing.assert_array_equal(np.asarray(table, np.float32), source_params()["encoder"]["table"])


def test_every_mismatch_is_listed_and_only_the_allowed_are_excused(run):
    params = {
        "encoder": {"table": jnp.zeros((20, 4)), "layer": {"down": jnp.zeros((8, 4))}},
        "head": {"bias": jnp.zeros(16), "scale": jnp.zeros(16)},
    }
    lines = (
        "different: encoder/table is float32[16,4] in the checkpoint and float32[20,4] here",
        "missing from the checkpoint: encoder/layer/down float32[8,4]",
        "missing from the checkpoint: head/scale float32[16]",
        "unexpected in the checkpoint: encoder/layer/up float32[4,8]",
    )
    with pytest.raises(CheckpointError) as error:
        warm_start(WarmStart(checkpoints=run), params)
    assert all(line in str(error.value) for line in lines) and "head/bias" not in str(error.value)
    with pytest.raises(CheckpointError) as error:
        warm_start(WarmStart(checkpoints=run, allow=("layer", "table")), params)
    assert [line in str(error.value) for line in lines] == [False, False, True, False]
    got, taken = warm_start(WarmStart(checkpoints=run, allow=("layer", "table", "scale")), params)
    assert taken.fresh == ["encoder/layer/down", "encoder/table", "head/scale"]
    assert got["encoder"]["table"] is params["encoder"]["table"]
    np.testing.assert_array_equal(got["head"]["bias"], np.full(16, 3.0))


def test_rules_that_rename_nothing_or_two_to_one_are_refused(run):
    config = WarmStart(checkpoints=run, rename=(("encodr/", ""), (".*/", "")), allow=(".*",))
    with pytest.raises(CheckpointError, match="'encodr/'"):
        warm_start(config, source_params())
    config = WarmStart(checkpoints=run, rename=(("encoder/table|head/bias", "same"),), allow=(".*",))
    with pytest.raises(CheckpointError, match="both encoder/table and head/bias would be named same"):
        warm_start(config, source_params())
    with pytest.raises(ConfigError):
        WarmStart(checkpoints=run, rename=(("(", ""),))
    with pytest.raises(ConfigError):
        WarmStart(checkpoints=run, rename=(("a", r"\1"),))


def test_what_is_to_be_fresh_is_not_taken_though_both_have_it(run):
    params = jax.tree.map(jnp.zeros_like, source_params())
    got, taken = warm_start(WarmStart(checkpoints=run, fresh=("^head/",)), params)
    assert taken.fresh == ["head/bias"] and got["head"]["bias"] is params["head"]["bias"]
    np.testing.assert_array_equal(got["encoder"]["table"], source_params()["encoder"]["table"])
    other = {**params, "head": {"bias": jnp.zeros(3)}}  # of another shape: there is no need to allow it as well
    assert warm_start(WarmStart(checkpoints=run, fresh=("^head/",)), other)[1].fresh == ["head/bias"]
    with pytest.raises(CheckpointError, match="'haed' names nothing"):
        warm_start(WarmStart(checkpoints=run, fresh=("haed",)), params)


def test_what_grows_begins_with_what_was_there(run):
    source = source_params()
    table = jnp.full((20, 4), 9.0)
    params = {**jax.tree.map(jnp.zeros_like, source), "encoder": {**source["encoder"], "table": table}}
    got, taken = warm_start(WarmStart(checkpoints=run, grow=("table$",)), params)
    assert not taken.fresh and not taken.left
    np.testing.assert_array_equal(got["encoder"]["table"][:16], source["encoder"]["table"])
    np.testing.assert_array_equal(got["encoder"]["table"][16:], table[16:])
    for shape in ((12, 4), (20, 5)):  # fewer, or of another kind
        other = {**params, "encoder": {**source["encoder"], "table": jnp.zeros(shape)}}
        with pytest.raises(CheckpointError, match="different: encoder/table"):
            warm_start(WarmStart(checkpoints=run, grow=("table$",)), other)
    with pytest.raises(CheckpointError, match="grow = 'tabel' names nothing"):
        warm_start(WarmStart(checkpoints=run, grow=("tabel",)), params)


def test_a_folder_without_checkpoints_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint 'newest'"):
        warm_start(WarmStart(checkpoints=str(tmp_path / "no")), source_params())
