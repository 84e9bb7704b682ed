"""From a trained run to an artifact and a bundle by command, and what is refused on the way."""

import json

import numpy as np
import pytest

from recjax import cli, command, export, infer
from recjax.core.artifact import read_artifact
from recjax.core.checkpoint import Checkpointer
from recjax.core.flags import Flags
from recjax.data.examples import Examples, write_examples
from recjax.recipe import Assembly
from recjax.serve import features
from recjax.serve.bundle import Bundle
from recjax.tasks.cache import place_of
from recjax.tasks.work import columns_of, examples_of


def prepare(task, cache):
    """The examples of a task without TensorFlow."""
    work, place = task.work(), place_of(task, cache)
    facts = {"task": task.name, "content_hash": place.content_hash, **work.facts}
    with write_examples(place.path, vocab=work.vocab, items=work.items, users=work.users, facts=facts) as writer:
        for split, schema in work.schemas.items():
            writer.add(split, schema, columns_of(list(examples_of(work, split)), schema))
    return Examples.open(place.path)


@pytest.fixture(scope="module")
def examples(tiny_gin, tmp_path_factory):
    recipe, _ = command.load(Flags(gin_files=(str(tiny_gin),)))
    return prepare(recipe.mixture.tasks[0], tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def run(tiny_gin, examples, tmp_path_factory):
    """The workdir of a run that ended at its first step: a checkpoint and the recipe's text."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    recipe, snapshot = command.load(Flags(gin_files=(str(tiny_gin),)))
    assembly = Assembly(recipe, [examples])
    facts = {"recipe": recipe.name, "vocabulary": assembly.vocab.hash}
    with Checkpointer(workdir / "checkpoints", recipe.checkpoints, **facts) as checkpoints:
        checkpoints.save(assembly.init_state(), metrics={"ndcg@10": 0.1})
    (workdir / command.CONFIG).write_text(snapshot.config)
    return workdir


@pytest.fixture(scope="module")
def bundle(run, examples):
    out = run.parent / "bundle"
    words = [f"--workdir={run}", f"--cache={examples.path.parent}", f"--out={out}", "--max_k=30", "--name=world"]
    words.append("--sample_users=3")
    assert cli.run(export.main, words) == 0
    return Bundle(out)


def test_the_bundle_is_the_checkpoint(run, bundle):
    manifest = bundle.manifest
    assert (bundle.name, bundle.max_k, manifest["recipe"], manifest["step"]) == ("world", 30, "sasrec", 0)
    assert manifest["checkpoint"] == str(run / "checkpoints" / "000000000")
    record = json.loads((run / "checkpoints" / "000000000" / "checkpoint.json").read_text())
    assert record["vocabulary"] == manifest["vocabulary_hash"]
    saved = {p.removeprefix("params/"): v for p, v in record["signature"].items() if p.startswith("params/")}
    assert {name: f"{dtype} {shape}" for name, (dtype, shape) in saved.items()} == manifest["weights"]


def test_the_bundle_shows_as_many_users_as_asked_for(examples, bundle):
    assert len(bundle.users) == 3 and bundle.recommends and not bundle.searches
    source = examples.source("test")
    held = [bundle.vocab.decode(source[i]["items"]) for i in range(len(source))]
    assert all(user["history"] in [items[-200:] for items in held] for user in bundle.users)


def test_the_bundle_answers_as_infer_did(run, examples, bundle):
    out = run.parent / "recommendations"
    words = [f"--workdir={run}", f"--cache={examples.path.parent}", f"--out={out}", "--k=30", "--step=0"]
    assert cli.run(infer.main, words) == 0
    found = read_artifact(out, kind="recommendations", vocabulary_hash=bundle.vocab.hash)
    assert found.manifest["recipe"] == "sasrec" and found.manifest["step"] == 0
    source = examples.source("test")
    histories = {int(e["user_index"]): e["items"] for e in (source[i] for i in range(len(source)))}
    assert set(histories) == set(found["user_index"].tolist())
    some = slice(None, None, 20)
    users = [bundle.encode(bundle.vocab.decode(histories[int(i)])) for i in found["user_index"][some]]
    history = features.pad([u.history_ids for u in users], count=len(users), width=bundle.history_length)
    seen = features.pad([u.seen_ids for u in users], count=len(users), width=512)
    scores, rows = bundle.recommend(history, seen)
    np.testing.assert_allclose(scores, found["scores"][some], rtol=1e-5, atol=1e-5)
    # Items whose scores differ by rounding alone may change places.
    assert np.mean(rows == found["rows"][some]) > 0.98


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (export.main, ["--out=OUT"], "whose checkpoint"),
        (export.main, ["--workdir=RUN"], "--out"),
        (export.main, ["--workdir=RUN", "--out=OUT", "--step=7"], "no checkpoint"),
        (export.main, ["--workdir=RUN", "--out=OUT", "--step=soon"], "cannot choose"),
        (export.main, ["--workdir=RUN", "--out=RUN"], "overwrite"),
        (export.main, ["--workdir=RUN", "--out=OUT", "--max_k=0"], "max_k is 0"),
        (export.main, ["--workdir=RUN/nowhere", "--out=OUT"], "no recipe"),
        (infer.main, ["--workdir=RUN", "--out=OUT", "--task=chess"], "no task 'chess'"),
        (infer.main, ["--workdir=RUN", "--out=OUT", "--kind=poems"], "poems"),
        (infer.main, ["--workdir=RUN", "--out=RUN"], "overwrite"),
    ],
)
def test_mistakes_are_one_message_and_status_2(run, examples, tiny_gin, tmp_path, capsys, main, flags, message):
    words = [flag.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for flag in flags]
    if not any(word.startswith("--workdir") for word in words):
        words.append(f"--gin_file={tiny_gin}")
    words.append(f"--cache={examples.path.parent}")
    before = sorted(p.name for p in run.iterdir())
    assert cli.run(main, words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and sorted(p.name for p in run.iterdir()) == before
