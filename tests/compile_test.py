"""`recjax compile`: what it says of a program can be worked out, and a program that does not fit is a status."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from recjax import cli, compile
from recjax.compile import Compiled, compile_recipe, refused, render, summary
from recjax.core import state
from recjax.core.errors import MeshError
from recjax.core.sharding import MeshConfig
from recjax.launch.chips import CHIPS
from recjax.launch.estimate import Memory
from recjax.launch.topology import Topology, describe
from recjax.launch.traffic import BETWEEN
from recjax.prepare import ensure_prepared
from recjax.recipe import Assembly, Recipe


@pytest.fixture(scope="module")
def small(tiny_recipe: Any) -> Recipe:
    """One layer without dropout, whose bits take long to compile."""
    encoder = dataclasses.replace(tiny_recipe.model.keywords["encoder"], num_layers=1, dropout=0.0)
    return dataclasses.replace(tiny_recipe, model=tiny_recipe.model.with_(encoder, 0.0))


@pytest.fixture(scope="module")
def here() -> Topology:
    """Two devices of this process, as if they were chips."""
    return Topology(name="here", chip=CHIPS["v5e"], slices=1, devices=tuple(jax.devices()[:2]))


@pytest.fixture(scope="module")
def whole(small: Recipe, here: Topology) -> Compiled:
    """With the whole state on each device."""
    return compile_recipe(small, examples(small), here)


def examples(recipe: Recipe) -> Any:
    return ensure_prepared(recipe.mixture)


def test_a_step_is_weighed(small: Recipe, whole: Compiled) -> None:
    found = whole
    assembly = Assembly(small, examples(small))
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in state.by_path(assembly.abstract_state()).values()]
    assert found.memory.fits and found.memory.state == sum(sizes)  # replicated: all of it on each device
    assert found.memory.arguments > found.memory.state
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(assembly.abstract_params()))
    assert found.tokens == 8 * 16
    assert found.cost is not None and found.cost.flops * 2 == pytest.approx(found.model_flops, rel=0.25)
    # every parameter's gradient, once
    gradients = found.parameters * 4
    assert gradients <= found.cost.sent["all-reduce"] <= 1.1 * gradients
    text = render(found)
    assert "**Fits**" in text and "all-reduce" in text and "here" in text
    json.dumps(found.row())
    assert f"{found.parameters:,}" in summary([found.row()])


def test_a_split_state_and_another_number_of_rows(small: Recipe, here: Topology, whole: Compiled) -> None:
    split = dataclasses.replace(small, mesh=MeshConfig(preset="fsdp"))
    found = compile_recipe(split, examples(small), here, rows=4096)
    table = Assembly(small, examples(small)).num_rows
    assert found.parameters - whole.parameters == (4096 - table) * 16
    assert found.model_flops > whole.model_flops
    assert found.memory.state < 0.6 * 3 * 4 * found.parameters
    assert found.cost is not None and found.cost.sent["all-gather"] > 0


def test_two_slices_share_gradients_and_nothing_else(small: Recipe) -> None:
    """Parameters are gathered and gradients scattered within a slice; between slices each part of a gradient is summed
    once, that of the table for each of its two uses."""
    encoder = dataclasses.replace(small.model.keywords["encoder"], width=64)
    mesh = MeshConfig(shape="replica=2,data=4", preset="fsdp")
    two = Topology(name="two", chip=CHIPS["v5e"], slices=2, devices=tuple(jax.devices()[:8]))
    found = compile_recipe(
        dataclasses.replace(small, model=small.model.with_(encoder, 0.0), mesh=mesh), examples(small), two
    )
    assert found.cost is not None
    between = {kind: sent for kind, sent in found.cost.sent.items() if kind.endswith(BETWEEN)}
    assert set(between) == {"all-reduce" + BETWEEN}
    assert found.cost.sent["all-gather"] > 0 and found.cost.sent["reduce-scatter"] > 0
    whole = Assembly(small, examples(small)).num_rows * 64
    gradients = (found.parameters + whole) * 4 / 4  # of which each device of a slice holds a fourth
    assert gradients <= found.cost.sent_between() <= 1.2 * gradients  # vectors are whole on every device


def test_a_mesh_that_does_not_divide(small: Recipe, here: Topology) -> None:
    with pytest.raises(MeshError, match="does not match"):
        compile_recipe(dataclasses.replace(small, mesh=MeshConfig(shape="data=3")), examples(small), here)


OOM = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (32.00G) exceeds available HBM (15.75G). HLO module: jit_step."
)
OLD_OOM = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 190.5G of 95.74G hbm. Exceeded hbm capacity by "
    "94.8G."
)


@pytest.mark.parametrize("message, needed, room", [(OOM, 32.0, 15.75), (OLD_OOM, 190.5, 95.74)])
def test_what_a_compiler_says_that_gave_up(message: str, needed: float, room: float) -> None:
    found = refused(message, state=1, arguments=2)
    assert found == Memory(state=1, arguments=2, needed=needed * 2**30, room=room * 2**30)
    assert found is not None and not found.fits


def test_a_program_that_cannot_be_read_still_has_a_size(whole: Compiled) -> None:
    class Foreign:
        def as_text(self) -> str:
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update instruction")

    assert compile.text_of(Foreign()) == ""
    found = dataclasses.replace(whole, cost=None, text="")
    assert "**Fits**" in render(found) and compile.UNREADABLE in render(found)
    assert found.row()["fits"] and "yes" in summary([found.row()])


def test_other_errors_are_not_about_memory() -> None:
    assert refused("INVALID_ARGUMENT: something of 3G and 4G", state=1, arguments=2) is None


def test_the_flag_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(compile.main, ["sasrec"]) == 2
    assert "--topology" in capsys.readouterr().err


PLAIN = """from __gin__ import dynamic_registration
from recjax.models import sequence
from recjax.nn import transformer
include '{tiny}'
transformer.TransformerConfig.num_layers = 1
transformer.TransformerConfig.dropout = 0.0
sequence.Sequence.embedding_dropout = 0.0
"""


@pytest.mark.libtpu
class TestForTpus:
    def test_two_slices_reduce_gradients_once(self, small: Recipe) -> None:
        encoder = dataclasses.replace(small.model.keywords["encoder"], width=128)  # small arrays are padded to 4 KiB
        model = small.model.with_(encoder, 0.0)
        mesh = MeshConfig(shape="replica=2,data=-1", preset="fsdp")
        recipe = dataclasses.replace(small, model=model, mesh=mesh)
        found = compile_recipe(recipe, examples(small), describe("v5e:2x2", 2))
        assert found.memory.fits and found.cost is not None
        gradients = found.parameters * 4 / 4  # of which each chip of a slice holds a fourth
        between = found.cost.sent_between()
        assert found.times is not None and found.times.network > 0
        assert gradients <= between < 2 * gradients  # the compiler leaves a matrix or two whole

    def test_the_verb(self, tiny_gin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        plain = tmp_path / "plain.gin"
        plain.write_text(PLAIN.format(tiny=tiny_gin))
        flags = [f"--gin_file={plain}", "--topology=v5e:1x1", f"--out={tmp_path / 'row.json'}"]
        assert cli.run(compile.main, flags) == 0
        assert "**Fits**" in capsys.readouterr().out
        row = json.loads((tmp_path / "row.json").read_text())
        assert row["fits"] and row["chips"] == 1 and row["seconds"]["bound"] > 0
        # a table of 8 GiB, and two more of its size in the optimiser
        assert cli.run(compile.main, [*flags, f"--rows={2**27}"]) == 1
        assert "Does not fit" in capsys.readouterr().out
