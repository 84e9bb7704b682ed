"""Answers do not depend on who else asks; few shapes are compiled; a full queue and a failing model are survived."""

import asyncio
import threading

import numpy as np
import pytest

from recjax.core.errors import RequestError
from recjax.data.vocab import FIRST_ITEM, ItemVocab
from recjax.serve.bundle import Bundle
from recjax.serve.facets import Facets
from recjax.serve.features import Encoded
from recjax.serve.item_desk import SEEN, ItemDesk, Wanted, power_of_two
from recjax.serve.request import MAX_HISTORY


class Stub(Bundle):
    """In place of a loaded bundle: row i of the answer is the sum of history i and the number of its seen items.

    The time of the question less that of the first event is added to the sum, and so are ten thousand times the items
    that a filter left out.
    """

    name, history_length, prompt_length, max_k, times = "stub", 4, 4, 2, "target"
    vocab = ItemVocab(("a", "b", "c"))

    def __init__(self, facets=()):
        self.shapes, self.gate, self.facets = [], threading.Event(), Facets(dict(facets))
        self.gate.set()

    def recommend(self, history_ids, seen_ids, history_time, query_time, *, allowed=None):
        self.gate.wait(10)
        self.shapes.append((len(history_ids), seen_ids.shape[1], allowed is not None))
        if (history_ids == 666).any():
            raise FloatingPointError("broken")
        total = history_ids.sum(1) + query_time - history_time[:, 0]
        if allowed is not None:
            assert allowed.shape == (len(history_ids), self.vocab.num_rows)
            total = total + 10_000 * (~allowed).sum(1)
        scores = np.repeat(total[:, None], 2, 1).astype(np.float32)
        return scores, np.repeat((seen_ids > 0).sum(1, keepdims=True), 2, 1)


def encoded(history, seen=()):
    history, seen = (np.array(ids, np.int32) for ids in (history, seen))
    asked = np.asarray(history[0] + 5, np.int32)
    return Encoded(history_ids=history, seen_ids=seen, history_time=history + 5, query_time=asked, unknown=0)


def run(stub, work, **options):
    async def main():
        desk = ItemDesk(stub, **options)
        await desk.start()
        try:
            return await work(desk)
        finally:
            await desk.stop()

    return asyncio.run(main())


def test_everyone_gets_their_own_answer_and_shapes_are_few():
    stub = Stub()

    async def ask(desk):
        async def one(i):
            await asyncio.sleep((i * 7 % 5) / 1000)
            return await desk.ask(Wanted(encoded([i, 1], range(1, i % 400 + 2)), exclude_seen=i % 2 == 0))

        return await asyncio.gather(*(one(i) for i in range(1000, 1300)))

    answers = run(stub, ask, max_batch=8)
    for i, answer in enumerate(answers, 1000):
        assert answer.scores[0] == i + 1
        assert answer.rows[0] == (i % 400 + 1 if i % 2 == 0 else 0)
    assert set(stub.shapes) <= shapes(8, False)
    assert len(stub.shapes) < 300  # they did travel together


def shapes(largest, filtered):
    """Every shape that requests can have: rows, width of the seen items, whether someone filters."""
    plain = {(1 << power, SEEN, False) for power in range(largest.bit_length())}
    plain |= {(1, MAX_HISTORY, False), (largest, MAX_HISTORY, False)}
    return plain | {(b, w, True) for b in (1, largest) for w in (SEEN, MAX_HISTORY) if filtered}


def test_requests_with_and_without_filters_travel_together_and_keep_their_own():
    stub = Stub({"colour": ["red"] + [None] * (Stub.vocab.num_rows - 1)})

    async def ask(desk):
        async def one(i):
            await asyncio.sleep((i * 7 % 5) / 1000)
            allowed = None if i % 17 else np.arange(stub.vocab.num_rows) >= i % 4
            return await desk.ask(Wanted(encoded([i, 1], range(1, i % 400 + 2)), allowed=allowed))

        return await asyncio.gather(*(one(i) for i in range(1000, 1200)))

    answers = run(stub, ask, max_batch=8)
    for i, answer in enumerate(answers, 1000):
        assert answer.scores[0] == i + 1 + (0 if i % 17 else 10_000 * (i % 4))
    assert set(stub.shapes) <= shapes(8, True) and len(stub.shapes) < 200
    assert {filtered for *_, filtered in stub.shapes} == {True, False}


def test_a_lone_request_does_not_wait_for_company_longer_than_asked():
    stub = Stub()

    async def ask(desk):
        start = asyncio.get_running_loop().time()
        await desk.ask(Wanted(encoded([1])))
        return asyncio.get_running_loop().time() - start

    assert run(stub, ask, max_wait=0.3) >= 0.3
    assert run(stub, ask, max_wait=0.0) < 0.3


def test_a_full_queue_is_refused_at_once_and_what_waits_is_answered():
    stub = Stub()
    stub.gate.clear()

    async def ask(desk):
        tasks = []
        for i in range(1, 9):  # one is taken by the model, then two wait, then the queue of three is full
            tasks.append(asyncio.create_task(desk.ask(Wanted(encoded([i])))))
            await asyncio.sleep(0.02)
        stub.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = run(stub, ask, max_batch=1, max_queue=3)
    refused = [a for a in answers if isinstance(a, RequestError)]
    assert len(refused) == 4 and {r.status for r in refused} == {503}
    assert [a.scores[0] for a in answers[:4]] == [1, 2, 3, 4]


def test_a_failing_call_fails_its_own_requests_only():
    stub = Stub()

    async def ask(desk):
        with pytest.raises(FloatingPointError):
            await desk.ask(Wanted(encoded([666])))
        return await desk.ask(Wanted(encoded([5])))

    assert run(stub, ask).scores[0] == 5


def test_a_caller_who_leaves_harms_nobody():
    stub = Stub()
    stub.gate.clear()

    async def ask(desk):
        gone = [asyncio.create_task(desk.ask(Wanted(encoded([i])))) for i in (1, 2)]
        stays = asyncio.create_task(desk.ask(Wanted(encoded([3]))))
        await asyncio.sleep(0.02)
        for task in gone:
            task.cancel()
        stub.gate.set()
        return await stays

    assert run(stub, ask, max_batch=2).scores[0] == 3


def test_stopping_answers_what_waits():
    stub = Stub()
    stub.gate.clear()

    async def ask(desk):
        tasks = [asyncio.create_task(desk.ask(Wanted(encoded([i])))) for i in range(5)]
        await asyncio.sleep(0.02)
        stub.gate.set()
        return tasks

    assert [t.result().scores[0] for t in run(stub, ask, max_batch=2)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("filtered", [False, True])
def test_warm_up_compiles_every_shape_there_can_be(filtered):
    stub = Stub({"colour": ["red"] * Stub.vocab.num_rows} if filtered else {})
    assert ItemDesk(stub, max_batch=5).warm_up() == len(stub.shapes) == len(set(stub.shapes))
    assert set(stub.shapes) == shapes(8, filtered)


def test_rows_of_a_real_batch_do_not_touch_each_other(exported):
    bundle = Bundle(exported.path)
    rng = np.random.default_rng(0)
    users = [bundle.encode([1000 + 7 * int(i) for i in rng.integers(0, 150, n)]) for n in (1, 3, 9, 20)]

    def ask(desk, chosen):
        return asyncio.gather(*(desk.ask(Wanted(u)) for u in chosen))

    together = run(bundle, lambda b: ask(b, users), max_wait=0.2)
    for user, answer in zip(users, together, strict=True):
        (alone,) = run(bundle, lambda b, user=user: ask(b, [user]), max_wait=0.0)
        np.testing.assert_array_equal(alone.rows, answer.rows)
        np.testing.assert_allclose(alone.scores, answer.scores, rtol=1e-5)
        assert not set(answer.rows) & set(user.seen_ids) and (answer.rows >= FIRST_ITEM).all()


@pytest.mark.parametrize(("count", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (32, 32), (33, 64)])
def test_power_of_two(count, power):
    assert power_of_two(count) == power
