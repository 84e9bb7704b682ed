"""How a quantiser is judged while it is trained: by the codes it gives the whole catalogue. Nobody is ranked."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, ClassVar

import numpy as np

from recjax.core.module import Functional, Params
from recjax.core.sharding import Mesh
from recjax.data.codes import statistics
from recjax.data.examples import Examples
from recjax.quantise import content_codes
from recjax.results import System


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodesEvaluation:
    """Codes of all items, `batch_size` at a time.

    `unexplained` is the share of the variance of content that the reconstruction misses, which says nothing where
    levels are normalised; `used` and `perplexity` are shares of the codes of a level, averaged over levels;
    `distinct`, `alone` and `largest` are those of `codes.report`.
    """

    batch_size: int = 4096

    k: ClassVar[tuple[int, ...]] = ()
    metrics = ("unexplained", "used", "perplexity", "distinct", "alone", "largest")
    main = "distinct"

    def shown(self) -> tuple[str, ...]:
        """The metrics that a line of progress shows."""
        return "unexplained", "used", "distinct"


class CodesEvaluator:
    """Gives every item its codes, with any parameters of one model."""

    def __init__(self, examples: Examples, *, config: CodesEvaluation, model: Functional, mesh: Mesh) -> None:
        self.config, self._vocab, self._model, self._mesh = config, examples.vocab, model, mesh

    def __call__(self, params: Params) -> System:
        """The metrics; a system that ranks nobody."""
        started = time.perf_counter()
        codes, _, unexplained = content_codes(
            self._model, params, self._vocab, batch_size=self.config.batch_size, mesh=self._mesh
        )
        module: Any = self._model.bind(params)
        found = statistics(codes, module.size)
        levels = found["levels"]
        values = {
            "unexplained": unexplained,
            "used": float(np.mean([level["used"] / level["size"] for level in levels])),
            "perplexity": float(np.mean([level["perplexity"] / level["size"] for level in levels])),
            **{name: float(found[name]) for name in ("distinct", "alone", "largest")},
        }
        return System(rank=np.zeros(0, np.int32), values=values, seconds=time.perf_counter() - started)
