import pytest

from recjax.core.errors import ConfigError
from recjax.tasks.mixtures import Mixture
from recjax.tasks.next_item import NextItem
from recjax.tasks.registry import KINDS
from recjax.tasks.work import Task


def test_no_rates_are_equal_rates() -> None:
    mixture = Mixture(tasks=[NextItem(name="a"), NextItem(name="b")])
    assert mixture.rates == (1.0, 1.0)
    assert Mixture().tasks == (NextItem(),)


def test_a_temperature_draws_by_the_number_of_examples() -> None:
    tasks = [NextItem(name="a"), NextItem(name="b")]
    assert Mixture(tasks=tasks, rates=[3, 1]).resolved([900, 100]) == (3.0, 1.0)
    assert Mixture(tasks=tasks, temperature=1.0).resolved([900, 100]) == pytest.approx((0.9, 0.1))
    assert Mixture(tasks=tasks, temperature=2.0).resolved([900, 100]) == pytest.approx((0.75, 0.25))
    assert Mixture(tasks=tasks, temperature=1e9).resolved([900, 100]) == pytest.approx((0.5, 0.5))
    assert Mixture(tasks=tasks, rates=[1, 9], temperature=1.0).resolved([900, 100]) == pytest.approx((0.5, 0.5))
    assert Mixture(tasks=tasks, temperature=1e-3).resolved([10**9, 10**6]) == pytest.approx((1.0, 0.0))
    with pytest.raises(ConfigError, match="examples of the tasks: 900, 0"):
        Mixture(tasks=tasks, temperature=1.0).resolved([900, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "without tasks"),
        ({"rates": (1.0, 2.0)}, "1 tasks and 2 rates"),
        ({"rates": (0.0,)}, "rates"),
        ({"rates": (float("inf"),)}, "rates"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"tasks": (NextItem(), NextItem(min_events=3))}, "tasks named next_item, next_item"),
    ],
)
def test_mixtures_that_cannot_be_drawn_from_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture(**settings)


def test_every_kind_is_a_task() -> None:
    for name, kind in KINDS.items():
        task = kind()
        assert isinstance(task, Task)
        assert task.name == name
