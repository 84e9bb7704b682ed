"""What a model of sequences answers to the questions of a ranking task in words: as one user after the other would."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recjax.data.answers import Answers
from recjax.data.examples import Examples
from recjax.data.simulate import World
from recjax.data.sources import DataDir
from recjax.data.vocab import FIRST_ITEM
from recjax.infer import infer
from recjax.prompts.tokenizer import TokenizerConfig
from recjax.recipe import Assembly
from recjax.tasks.asked_next import AskedNext
from recjax.tasks.cache import place_of
from recjax.tasks.mixtures import Mixture
from recjax.tasks.prompted import Told, Wording
from recjax.tasks.prompted_ranking import WatchNext
from recjax.tasks.work import examples_of


def test_answers_are_log_probabilities_of_the_candidates(
    tiny_recipe: Any, prepare_here: Callable[..., None], tmp_path: Path
) -> None:
    data = DataDir(simulate=World(num_events=3000, ratings=True))
    words = WatchNext(told=Told(data=data, wording=Wording(tokenizer=TokenizerConfig(size=600))), candidates=5)
    task = AskedNext(asked=words)
    prepare_here(task)
    examples = Examples.open(place_of(task).path)
    assembly = Assembly(dataclasses.replace(tiny_recipe, mixture=Mixture(tasks=[task])), [examples])
    params = assembly.model.init(jax.random.key(0))
    out = infer(assembly.model, params, examples, kind="answers", out=tmp_path / "answers", history_length=16)

    work = words.work()
    ids = {str(user): e for e in examples_of(work, "test") for user in [work.users["user_id"][int(e["user_index"])]]}
    users = [user for user, e in ids.items() for _ in e["labels"]]
    label = np.concatenate([e["labels"] for e in ids.values()])
    found = Answers(name="SASRec", path=str(out), tasks={"next": "next"}).read("next", "test", users, label)
    assert found is not None and len(ids) > 5

    last = FIRST_ITEM + examples.vocab.num_items
    names, source, expected = examples.user_ids(), examples.source("test"), {}
    for at in range(len(source)):
        one = source[at]
        prompt = jnp.asarray(one["items"][-16:])[None]
        batch = {"history_ids": prompt, "segment_ids": prompt * 0 + 1, "positions": jnp.arange(prompt.size)[None]}
        given = assembly.model.apply(params, batch, train=False, key=None)
        scores = given["table"] @ given["hidden"][0, -1]
        expected[str(names[int(one["user_index"])])] = jax.nn.log_softmax(scores[FIRST_ITEM:last])[one["asked"] - 2]
    np.testing.assert_allclose(found[:, 1], np.concatenate([expected[user] for user in ids]), atol=1e-5)
    assert (found[:, 1] < 0).all() and (found[:, 0] == 0).all()
