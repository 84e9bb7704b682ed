"""Scoring for a server: each request is a call by itself (a prompt and its candidates), answered in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recjax.serve.desk import Desk
from recjax.serve.score_bundle import ScoreBundle
from recjax.serve.score_request import ScoreQuestion


class ScoreDesk(Desk[ScoreBundle, ScoreQuestion, dict[str, Any]]):
    """The queue in front of one score bundle."""

    def __init__(self, bundle: ScoreBundle, **bounds: Any) -> None:
        """`bounds` are those of `Desk`."""
        super().__init__(bundle, room=1, **bounds)

    def answers(self, asked: Sequence[ScoreQuestion]) -> list[dict[str, Any]]:
        """Probabilities of the label words for each candidate, and with two of them the `score` to rank by."""
        return [self._answer(one) for one in asked]

    def warm_up(self) -> int:
        """As `Desk`."""
        return self.bundle.warm_up()

    def _answer(self, asked: ScoreQuestion) -> dict[str, Any]:
        bundle, task = self.bundle, self.bundle.task(asked.task)
        prompt, prefix, suffixes = bundle.rows(asked)
        probabilities = task.answers(bundle.logits(prefix, suffixes))
        return {
            "scores": [_described(task.label_words, p) for p in probabilities],
            "task": task.name,
            "events_read": prompt.events,
            "tokens": len(prefix) + sum(map(len, suffixes)),
            **bundle.origin,
        }


def _described(words: Sequence[str], probabilities: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {"probabilities": dict(zip(words, probabilities.tolist(), strict=True))}
    return {"score": float(probabilities[1]), **found} if len(words) == 2 else found
