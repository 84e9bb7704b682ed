"""What must come back from the disk after every way in which a run can end."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core import checkpoint, optim, saved, state
from recjax.core.checkpoint import Checkpointer, Checkpoints
from recjax.core.errors import CheckpointError, ConfigError
from recjax.core.sharding import MeshConfig, make_mesh

AXES = {"table": ("items", None), "block": {"up": ("embed", "mlp")}}
OPTIMIZER = optim.Optimizer(kind="adam", ema_decay=0.5)


def params_of(rows=16):
    return {"table": jnp.arange(rows * 4.0).reshape(rows, 4), "block": {"up": jnp.ones((8, 8))}}


def state_at(step, rows=16, optimizer=OPTIMIZER):
    """A state in which every number says which step it is of."""
    made = state.create(params_of(rows), optim.make(optimizer, params_of(rows), 10))
    return jax.tree.map(lambda x: (x + step).astype(x.dtype), made)


def target_on(devices, preset="fsdp", rows=16, optimizer=OPTIMIZER):
    mesh = make_mesh(MeshConfig(preset=preset), devices=jax.devices()[:devices])
    shapes = jax.eval_shape(lambda: state_at(0, rows, optimizer))
    return state.abstract(shapes, state.shardings(mesh, shapes, AXES))


def save(directory, *steps, config=Checkpoints(keep_last=99), metrics=None, **kwargs):  # noqa: B008
    with Checkpointer(directory, config, **kwargs) as checkpointer:
        for i, step in enumerate(steps):
            checkpointer.save(
                state_at(step), iterator={"window": step}, metrics={"recall@10": metrics[i]} if metrics else None
            )


def restore(directory, target=None, **kwargs):
    with Checkpointer(directory, Checkpoints(), **kwargs) as checkpointer:
        return checkpointer.restore(target or target_on(1))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_what_was_saved_comes_back_on_any_number_of_devices(tmp_path):
    wide = jax.device_put(state_at(7), jax.tree.map(lambda t: t.sharding, target_on(8)))
    with Checkpointer(tmp_path, Checkpoints(), recipe="sasrec", vocabulary="abc") as checkpointer:
        checkpointer.save(wide, iterator={"window": 3, "row": 1}, metrics={"loss": 0.1})
    for devices in (4, 1, 8):
        target = target_on(devices)
        restored = restore(tmp_path, target, vocabulary="abc")
        equal(restored.state, wide)
        assert all(
            x.sharding == t.sharding
            for x, t in zip(jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True)
        )
        assert restored.iterator == {"window": 3, "row": 1}
        assert (restored.record.recipe, restored.record.metrics) == ("sasrec", {"loss": 0.1})


def test_arrays_donated_right_after_save_are_saved_as_they_were(tmp_path):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpointer(tmp_path, Checkpoints()) as checkpointer:
        for step in (1, 2):
            current = state_at(step)
            checkpointer.save(current)
            current = overwrite(current)
            jax.block_until_ready(current)
    equal(restore(tmp_path).state, state_at(2))


def test_no_checkpoint_is_not_an_error(tmp_path):
    assert restore(tmp_path / "new") is None


def test_the_newest_and_the_best_are_kept_also_across_a_restart(tmp_path):
    config = Checkpoints(every=10, keep_last=2, keep_best=2, metric="recall@10")
    nan = float("nan")
    save(tmp_path, 1, 2, 3, 4, config=config, metrics=[0.5, 0.9, nan, 0.1])
    assert saved.steps(tmp_path) == [1, 2, 3, 4]
    save(tmp_path, 5, 6, 7, config=config, metrics=[0.6, 0.2, 0.3])
    assert saved.steps(tmp_path) == [2, 5, 6, 7]
    with Checkpointer(tmp_path, config) as checkpointer:
        due = checkpointer.due
        assert due(10) and not due(11) and due(11, is_last=True) and not due(7, is_last=True)
        assert due(11, metrics={"recall@10": 0.7}) and not due(11, metrics={"recall@10": 0.55})
    params, record = checkpoint.restore_params(tmp_path, params_of(), step="max:recall@10")
    assert record.step == 2 and params["table"][0, 0] == 2
    assert checkpoint.restore_params(tmp_path, params_of(), step="min:recall@10")[1].step == 6


@pytest.mark.parametrize("kwargs", [{"every": 0}, {"keep_last": 0}, {"keep_best": -1}, {"mode": "best"}])
def test_a_wrong_config_is_refused(kwargs):
    with pytest.raises(ConfigError):
        Checkpoints(**kwargs)


def test_evaluation_reads_the_average_where_there_is_one_and_only_reads(tmp_path):
    averaged = state_at(3)
    average = jax.tree.map(lambda x: x + 100, averaged.params)
    averaged = state.TrainState(
        step=averaged.step, params=averaged.params, opt_state=averaged.opt_state._replace(average=average)
    )
    with Checkpointer(tmp_path / "a", Checkpoints(), vocabulary="abc") as checkpointer:
        checkpointer.save(averaged)
    files = sorted((tmp_path / "a").rglob("*"))
    equal(checkpoint.restore_params(tmp_path / "a", params_of(), vocabulary="abc")[0], average)
    assert sorted((tmp_path / "a").rglob("*")) == files
    with Checkpointer(tmp_path / "b", Checkpoints()) as checkpointer:
        checkpointer.save(state_at(3, optimizer=optim.Optimizer()))
    equal(checkpoint.restore_params(tmp_path / "b", params_of())[0], state_at(3).params)
    for step in (4, "newest of all", "max:recall@10"):
        with pytest.raises(CheckpointError):
            checkpoint.restore_params(tmp_path / "b", params_of(), step=step)
    with pytest.raises(CheckpointError, match="'abc'.*'abd'"):
        checkpoint.restore_params(tmp_path / "a", params_of(), vocabulary="abd")
    with pytest.raises(CheckpointError, match="params/table"):
        checkpoint.restore_params(tmp_path / "a", params_of(rows=8))


def array_file(path):
    return max((f for f in (path / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def cut(path):
    with open(array_file(path), "r+b") as opened:
        opened.truncate(10)


def flip(path):
    data = bytearray(array_file(path).read_bytes())
    data[len(data) // 2] ^= 1
    array_file(path).write_bytes(data)


def reseal_without_arrays(path):
    """Whole by its list of files, and yet orbax cannot read it."""
    record = saved.read(path)
    array_file(path).write_bytes(b"not an array")
    (path / "files.json").unlink()
    saved.seal(path, record)


DAMAGE = [
    cut,
    flip,
    reseal_without_arrays,
    lambda path: array_file(path).unlink(),
    lambda path: shutil.rmtree(path / "state"),
    lambda path: (path / "files.json").unlink(),
    lambda path: (path / "files.json").write_text("[]"),
    lambda path: (path / "checkpoint.json").write_text('{"format": 1, "st'),
    lambda path: (path / "checkpoint.json").write_text('{"format": 1}'),
    lambda path: (path / "checkpoint.json").write_bytes(b"\x93\xff"),
]


def test_a_damaged_checkpoint_is_passed_over_whatever_the_damage(tmp_path):
    whole = tmp_path / "whole"
    save(whole, 1, 2)
    for i, damage in enumerate(DAMAGE):
        directory = tmp_path / str(i)
        shutil.copytree(whole, directory)
        damage(directory / saved.name_of(2))
        with pytest.warns(RuntimeWarning, match="damaged"):
            restored = restore(directory)
        assert int(restored.state.step) == restored.iterator["window"] == 1
        equal(restored.state, state_at(1))
        # put aside, so that the run goes on and saves the step anew
        save(directory, 2)
        equal(restore(directory).state, state_at(2))


def test_when_all_are_damaged_the_run_stops_and_says_so_of_each(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        cut(tmp_path / saved.name_of(step))
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError, match="(?s)0002: .*0001: "):
        restore(tmp_path)
    assert saved.steps(tmp_path) == [1, 2]  # all are where they were


def test_another_model_optimiser_or_vocabulary_is_refused_with_every_difference(tmp_path):
    save(tmp_path, 1, vocabulary="abc")
    wanted = target_on(1, rows=32)
    other = state.TrainState(
        step=wanted.step,
        params={"table": wanted.params["table"], "block": {"down": wanted.params["block"]["up"]}},
        opt_state=wanted.opt_state,
    )
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, other, vocabulary="abd")
    for part in (
        "'abc'", "'abd'", "missing from the checkpoint: params/block/down float32[8,8]",
        "unexpected in the checkpoint: params/block/up",
        "params/table is float32[16,4] in the checkpoint and float32[32,4] here",
    ):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(CheckpointError, match="another optimiser"):
        restore(tmp_path, target_on(1, optimizer=optim.Optimizer(kind="sgd")), vocabulary="abc")
    equal(restore(tmp_path, vocabulary="abc").state, state_at(1))  # nothing was put aside


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


REFUSED = """
import pathlib, resource, sys
import jax.numpy as jnp
from recjax.core import state
from recjax.core.checkpoint import Checkpointer, Checkpoints
from recjax.core.errors import CheckpointError

checkpointer = Checkpointer(sys.argv[1], Checkpoints(keep_last=1))
make = lambda step: state.TrainState(step=jnp.int32(step), params={"table": jnp.ones((64, 64))}, opt_state=())
checkpointer.save(make(1))
checkpointer.wait()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # no file may grow past 64 bytes
try:
    checkpointer.save(make(2))
    checkpointer.wait()
except CheckpointError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    print(error, sorted(p.name for p in pathlib.Path(sys.argv[1]).iterdir()), flush=True)
checkpointer.save(make(3))
checkpointer.close()
"""


def test_a_disk_that_refuses_the_arrays_leaves_the_older_checkpoints_and_an_error(tmp_path):
    done = run(REFUSED, tmp_path)
    assert "could not save the checkpoint of step 2" in done.stdout and "goes on from step 1" in done.stdout
    assert "too large" in done.stdout and saved.name_of(1) in done.stdout
    assert "_SignalingThread" not in done.stderr
    assert saved.steps(tmp_path) == [3] and saved.check(tmp_path / saved.name_of(3)).step == 3


def test_a_disk_that_is_full_at_the_end_of_a_save_is_reported_and_the_next_save_can_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Checkpointer(tmp_path, Checkpoints(keep_last=1)) as checkpointer:
        checkpointer.save(state_at(1))
        checkpointer.wait()
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
            patch.setattr(saved, "seal", full)
            checkpointer.save(state_at(2))
            while True:  # as training does, at every step
                checkpointer.check()
        assert saved.steps(tmp_path) == [1] and checkpointer.due(2, is_last=True)
        checkpointer.save(state_at(2))
    equal(restore(tmp_path).state, state_at(2))


LOOP = """
import os, random, signal, sys, time
import jax
from recjax.core import state
from recjax.core.checkpoint import Checkpointer, Checkpoints

def train(directory):
    import jax.numpy as jnp
    from recjax.core.sharding import MeshConfig, make_mesh
    make = lambda step: state.TrainState(
        step=jnp.int32(step), params={"table": jnp.full((64, 64), step, jnp.float32)}, opt_state=()
    )
    shapes = jax.eval_shape(lambda: make(0))
    target = state.abstract(shapes, jax.tree.map(lambda _: make_mesh(MeshConfig()).sharding(), shapes))
    with Checkpointer(directory, Checkpoints(keep_last=2)) as checkpointer:
        restored = checkpointer.restore(target)
        step = 0 if restored is None else int(restored.state.step)
        if restored is not None:
            assert float(restored.state.params["table"].min()) == step == restored.iterator["window"]
        print(step, flush=True)
        for step in range(step + 1, 10**9):
            checkpointer.save(make(step), iterator={"window": step})  # waits for the save before it
            os.write(started, b".")

random.seed(0)
for _ in range(int(sys.argv[2])):
    saving, started = os.pipe()
    child = os.fork()
    if not child:
        try:
            train(sys.argv[1])
        finally:
            os._exit(1)
    os.close(started)
    os.read(saving, 1)
    os.read(saving, 1)  # a save is done, and another under way
    time.sleep(random.uniform(0.0, 0.5))
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def test_a_process_killed_while_saving_leaves_a_run_that_goes_on(tmp_path):
    done = run(LOOP, tmp_path, "6")
    starts = [int(line) for line in done.stdout.split()]
    assert starts[0] == 0 and all(a < b for a, b in itertools.pairwise(starts)), starts
    assert "damaged" not in done.stderr


PROCESSES = """
import pathlib, sys, warnings
import numpy as np
from recjax.launch import cluster
cluster.initialize()
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from recjax.core import checkpoint, saved, state
from recjax.core.checkpoint import Checkpointer, Checkpoints
from recjax.core.sharding import MeshConfig, make_mesh

mesh = make_mesh(MeshConfig(preset="fsdp"))
make = lambda step: state.TrainState(
    step=jnp.int32(step), params={"table": jnp.arange(64.0).reshape(16, 4) + step}, opt_state=()
)
shapes = jax.eval_shape(lambda: make(0))
places = state.shardings(mesh, shapes, {"table": ("items", None)})
target = state.abstract(shapes, places)

def check(table, step):
    for part in table.addressable_shards:
        np.testing.assert_array_equal(part.data, (np.arange(64.0).reshape(16, 4) + step)[part.index])

with Checkpointer(sys.argv[1], Checkpoints()) as checkpointer:
    assert checkpointer.restore(target) is None
    for step in (1, 2):
        checkpointer.save(jax.jit(make, static_argnums=0, out_shardings=places)(step), iterator=step)
if jax.process_index() == 0:
    (pathlib.Path(sys.argv[1]) / saved.name_of(2) / "files.json").write_text("{")
multihost_utils.sync_global_devices("damaged")
warnings.simplefilter("ignore", RuntimeWarning)
params, record = checkpoint.restore_params(sys.argv[1], target.params)
check(params["table"], record.step)
with Checkpointer(sys.argv[1], Checkpoints()) as checkpointer:
    restored = checkpointer.restore(target)
    check(restored.state.params["table"], 1)
    is_due = checkpointer.due(2, is_last=True)
    print(jax.device_count(), int(restored.state.step), restored.iterator, record.step, is_due)
"""


def test_two_processes_save_together_and_agree_on_what_is_whole(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={
                **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RECJAX_COORDINATOR": address,
                "RECJAX_NUM_PROCESSES": "2", "RECJAX_PROCESS_ID": str(i),
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            },
        )
        for i in range(2)
    ]  # fmt: skip
    for process in running:
        out, errors = process.communicate(timeout=120)
        assert out.splitlines()[-1:] == ["4 1 1 1 True"], errors
    assert saved.steps(tmp_path) == [1]


def test_the_manifest_of_a_checkpoint_is_readable_json(tmp_path):
    save(tmp_path, 5, recipe="sasrec", vocabulary="abc")
    path = tmp_path / saved.name_of(5)
    record = json.loads((path / "checkpoint.json").read_text())
    assert record["signature"]["params/table"] == ["float32", [16, 4]]
    listed = json.loads((path / "files.json").read_text())
    assert set(listed) == {f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()} - {"files.json"}
