"""Answers come back question by question, and never for other questions."""

from pathlib import Path

import numpy as np
import pytest

from recjax.core.errors import ArtifactError, ConfigError
from recjax.data.answers import Answers, write_answers

USERS = [7, 3, 7, 11, 3, 7]
LABEL = np.array([1, 0, 0, 1, 1, 1])
LOGIT = np.array([0.5, -1.0, 2.0, 3.5, -0.25, 0.125])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = {"test": USERS}, {"test": {"like": LABEL}}, {"test": {"like": LOGIT}}
    write_answers(tmp_path / "1_ids" / "artifacts" / "answers", *found)
    return tmp_path


def answers(path: Path) -> Answers:
    return Answers(name="MF", path=str(path), stage="1_ids", tasks={"like": "like", "love": "love"})


def test_each_question_gets_its_answer_whatever_the_order_of_users(path: Path) -> None:
    order = np.array([1, 4, 3, 0, 2, 5])  # users in another order, the questions of a user in the same
    found = answers(path).read("like", "test", [str(USERS[k]) for k in order], LABEL[order])
    assert found is not None
    np.testing.assert_array_equal(found, np.stack([np.zeros(6), LOGIT[order]], axis=1))


def test_a_sample_of_the_users(path: Path) -> None:
    found = answers(path).read("like", "test", [3, 3], LABEL[[1, 4]])
    assert found is not None
    np.testing.assert_array_equal(found[:, 1], LOGIT[[1, 4]])


def test_a_task_that_it_does_not_answer(path: Path) -> None:
    assert answers(path).read("stars", "test", USERS, LABEL) is None


def test_other_questions_are_refused(path: Path) -> None:
    one = answers(path)
    with pytest.raises(ArtifactError, match="other questions"):
        one.read("like", "test", [*USERS, 11], np.append(LABEL, 1))
    with pytest.raises(ArtifactError, match="other questions"):
        one.read("like", "test", USERS, 1 - LABEL)
    with pytest.raises(ArtifactError, match="other questions"):
        one.read("like", "test", [7, 3, 7, 12, 3, 7], LABEL)
    with pytest.raises(ArtifactError, match="no answers 'love'"):
        one.read("love", "test", USERS, LABEL)
    with pytest.raises(ArtifactError, match="no answers 'like' of the split valid"):
        one.read("like", "valid", USERS, LABEL)


def test_answers_of_nobody_to_nothing() -> None:
    with pytest.raises(ConfigError, match="without a name"):
        Answers(name="", path="x", tasks={"like": "like"})
