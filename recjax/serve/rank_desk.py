"""Ranking for a server: the candidates of all requests that wait are encoded and go through the model together.

A lone request waits for nobody. Rows do not influence one another, so an answer does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recjax.serve.desk import Desk
from recjax.serve.rank_bundle import SIZES, RankBundle
from recjax.serve.rank_request import RankQuestion


class RankDesk(Desk[RankBundle, RankQuestion, dict[str, Any]]):
    """The queue in front of one rank bundle."""

    def __init__(self, bundle: RankBundle, **bounds: Any) -> None:
        """`bounds` are those of `Desk`."""
        super().__init__(bundle, room=SIZES[-1], **bounds)

    async def ask(self, asked: RankQuestion) -> dict[str, Any]:
        """As `Desk`; raises `RequestError` also for what the model does not read."""
        self.bundle.check(asked)
        return await super().ask(asked)

    def size_of(self, asked: RankQuestion) -> int:
        """Its rows."""
        return len(asked.candidates)

    def answers(self, asked: Sequence[RankQuestion]) -> list[dict[str, Any]]:
        """Candidates in order, best first by the head that a question names, with what every head says of each."""
        logits = self.bundle.answer(asked)
        scores = self.bundle.scores(logits)
        ends = np.cumsum([len(one.candidates) for one in asked])[:-1]
        return [
            self._described(*each) for each in zip(asked, np.split(logits, ends), np.split(scores, ends), strict=True)
        ]

    def warm_up(self) -> int:
        """As `Desk`."""
        return self.bundle.warm_up()

    def _described(self, asked: RankQuestion, logits: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        heads = list(self.bundle.heads)
        head = asked.head or heads[0]
        order = np.argsort(-logits[:, heads.index(head)], kind="stable")[: asked.k]
        ranked = [
            {"candidate": at, "scores": dict(zip(heads, said, strict=True))}
            for at, said in zip(order.tolist(), scores[order].tolist(), strict=True)
        ]
        return {"ranked": ranked, "head": head, "from_log": self._from_log(asked), **self.bundle.origin}

    def _from_log(self, asked: RankQuestion) -> list[str]:
        """The columns of counters and histories that some candidate has from the end of the log."""
        return [
            name
            for name in self.bundle.features.remembered
            if name not in asked.context and not all(name in row for row in asked.candidates)
        ]
