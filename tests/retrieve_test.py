"""Every catalogue against all items scored one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recjax.core.errors import DataError
from recjax.core.module import Functional, with_facts
from recjax.data.tokens import Tokens
from recjax.data.vocab import FIRST_ITEM, OOV
from recjax.models.sequence import Sequence
from recjax.nn.config import TransformerConfig
from recjax.retrieve import Answers, Rows, spelled

ITEMS, B, L = 40, 3, 12
SIZES = (4, 5, 3)


def tokens_of(levels: int) -> Tokens:
    rng = np.random.default_rng(1)
    sizes = SIZES if levels > 1 else (ITEMS,)
    codes = np.stack(np.unravel_index(rng.permutation(np.prod(sizes))[:ITEMS], sizes), axis=1)
    spelling = np.zeros((128, levels), np.int32)
    spelling[OOV] = OOV
    start = FIRST_ITEM + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    spelling[FIRST_ITEM : FIRST_ITEM + ITEMS] = codes + start
    return Tokens(spelling, sizes)


def model_of(num_rows: int) -> tuple[Functional, dict]:
    encoder = TransformerConfig(num_layers=2, width=16, num_heads=2)
    model = Functional(partial(Sequence, num_rows=num_rows, encoder=encoder, max_length=L + 3))
    return model, jax.tree.map(lambda x: 3 * x + 0.02, jax.jit(model.init)(jax.random.key(0)))


def batch_of(prompts: list[list[int]]) -> dict[str, np.ndarray]:
    batch = {name: np.zeros((len(prompts), L), np.int32) for name in ("history_ids", "positions", "segment_ids")}
    for row, prompt in enumerate(prompts):
        batch["history_ids"][row, : len(prompt)] = prompt
        batch["positions"][row, : len(prompt)] = np.arange(len(prompt))
        batch["segment_ids"][row, : len(prompt)] = 1
    batch["query_at"] = np.array([[len(prompt) - 1] for prompt in prompts], np.int32)
    return batch


def hidden_of(model: Functional, params: dict, batch: dict) -> jax.Array:
    """The outputs at all slots."""
    whole = {name: jnp.asarray(array) for name, array in batch.items() if name != "query_at"}
    return model.apply(params, whole, train=False, key=None)["hidden"]


def one_by_one(tokens: Tokens, model: Functional, params: dict, prompt: list[int], alive: set[int]) -> dict[int, float]:
    """Log-probability of every item: the softmax of each level is over what begins an item that is alive."""
    out = {}
    table = np.asarray(params["table"])
    apply = jax.jit(lambda p, b: hidden_of(model, p, b))
    for item in alive:
        spelling = tokens.spelling[item].tolist()
        hidden = np.asarray(apply(params, batch_of([[*prompt, *spelling[:-1]]])))[0]
        total = 0.0
        for level in range(tokens.levels):
            logits = table @ hidden[len(prompt) - 1 + level]
            next_rows = sorted(
                {
                    int(tokens.spelling[i, level])
                    for i in alive
                    if tokens.spelling[i, :level].tolist() == spelling[:level]
                }
            )
            total += float(logits[spelling[level]] - np.log(np.exp(logits[next_rows]).sum()))
        out[item] = total
    return out


def check(answers: Answers, row: int, expected: dict[int, float]) -> None:
    order = sorted(expected, key=lambda item: -expected[item])[: answers.rows.shape[1]]
    count = len(order)
    np.testing.assert_array_equal(answers.rows[row, :count], order)
    np.testing.assert_allclose(answers.scores[row, :count], [expected[item] for item in order], rtol=1e-4, atol=1e-5)
    assert not answers.rows[row, count:].any() and (answers.scores[row, count:] == -np.inf).all()


@pytest.mark.parametrize("filtered", ["none", "all alike", "each its own"])
def test_a_search_for_codes_is_a_ranking_of_all_items(filtered: str) -> None:
    tokens, rng = tokens_of(3), np.random.default_rng(2)
    model, params = model_of(tokens.num_rows)
    catalogue, facts = spelled(tokens, beams=ITEMS)
    prompts = [tokens.spelling[rng.integers(FIRST_ITEM, FIRST_ITEM + ITEMS, n)].reshape(-1).tolist() for n in (1, 3, 2)]
    exclude = np.zeros((B, 4), np.int32)
    exclude[0, :2], exclude[1, :4] = [5, 9], [2, 3, 4, 41]
    allowed = None if filtered == "none" else rng.random((B, 128)) < 0.4
    if filtered == "all alike" and allowed is not None:
        allowed = allowed[0]
    run = jax.jit(lambda p, b, e, a: catalogue(model, p, b, 25, exclude=e, allowed=a))
    answers = run(with_facts(params, facts), batch_of(prompts), exclude, allowed)
    answers = Answers(*map(np.asarray, answers))
    for row, prompt in enumerate(prompts):
        alive = set(range(FIRST_ITEM, FIRST_ITEM + ITEMS)) - set(exclude[row].tolist())
        if allowed is not None:
            mine = allowed if allowed.ndim == 1 else allowed[row]
            alive &= set(np.flatnonzero(mine).tolist())
        check(answers, row, one_by_one(tokens, model, params, prompt, alive))


def test_rows_are_ranked_among_those_allowed() -> None:
    tokens, rng = tokens_of(1), np.random.default_rng(3)
    model, params = model_of(tokens.num_rows)
    prompts = [rng.integers(FIRST_ITEM, FIRST_ITEM + ITEMS, n).tolist() for n in (4, 1, 12)]
    exclude = np.array([[3, 0], [7, 8], [0, 0]], np.int32)
    allowed = rng.random((B, 128)) < 0.5
    catalogue = Rows(ITEMS)
    run = jax.jit(lambda p, b, e, a: catalogue(model, p, b, 30, exclude=e, allowed=a))
    answers = Answers(*map(np.asarray, run(params, batch_of(prompts), exclude, allowed)))
    hidden = np.asarray(hidden_of(model, params, batch_of(prompts)))
    for row, prompt in enumerate(prompts):
        scores = np.asarray(params["table"]) @ hidden[row, len(prompt) - 1]
        alive = [i for i in range(FIRST_ITEM, FIRST_ITEM + ITEMS) if allowed[row, i] and i not in exclude[row]]
        check(answers, row, {item: float(scores[item]) for item in alive})


def test_items_spelled_alike_are_refused() -> None:
    tokens = tokens_of(3)
    tokens.spelling[FIRST_ITEM] = tokens.spelling[FIRST_ITEM + 1]
    with pytest.raises(DataError):
        spelled(tokens, beams=4)


def test_narrow_beams_only_ever_name_items() -> None:
    tokens = tokens_of(3)
    model, params = model_of(tokens.num_rows)
    catalogue, facts = spelled(tokens, beams=2)
    prompts = [[int(r) for r in tokens.spelling[FIRST_ITEM + i]] for i in range(B)]
    run = jax.jit(lambda p, b: catalogue(model, p, b, 5, exclude=jnp.zeros((B, 1), jnp.int32)))
    answers = run(with_facts(params, facts), batch_of(prompts))
    for rows in np.asarray(answers.rows):
        named = rows[rows > 0].tolist()
        assert len(named) == len(set(named)) > 0
        assert all(FIRST_ITEM <= row < FIRST_ITEM + ITEMS for row in named)
