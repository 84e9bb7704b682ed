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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "without tasks"),
        ({"rates": (1.0, 2.0)}, "1 tasks and 2 rates"),
        ({"rates": (0.0,)}, "rates"),
        ({"rates": (float("inf"),)}, "rates"),
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
