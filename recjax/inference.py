"""What is asked of a trained model, whatever kind of artifact is to come out of it (`recjax.infer`)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from contextlib import AbstractContextManager
from typing import Any

from recjax.core.errors import ConfigError, UnservableError
from recjax.core.module import Functional, Params
from recjax.core.sharding import Mesh
from recjax.data.examples import Examples
from recjax.data.spelling import Prompts
from recjax.retrieve import Catalogue, Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inference:
    """A model, the examples it is asked about, and what there is to say of both.

    `prompts` is how a model of tokens is asked, and `catalogue` how its items are found, where that is not by their
    rows. `extend` are codes of a smaller catalogue, which are kept. `recipe` and `step` go into the manifest. Raises
    `ConfigError` for numbers below 1.
    """

    model: Functional
    params: Params
    examples: Examples
    out: str | os.PathLike[str]
    history_length: int
    times: str = "none"
    prompts: Prompts | None = None
    catalogue: Catalogue | None = None
    split: str = "test"
    k: int = 100
    exclude_seen: bool = True
    batch_size: int = 256
    extend: str | os.PathLike[str] = ""
    mesh: Mesh | None = None
    recipe: str = ""
    step: int = 0

    def __post_init__(self) -> None:
        if self.k < 1 or self.batch_size < 1:
            raise ConfigError(f"k is {self.k} and batch_size {self.batch_size}", expected="at least 1")

    @property
    def origin(self) -> dict[str, Any]:
        """Whose work it is."""
        return {"recipe": self.recipe, "step": self.step}

    @property
    def about(self) -> dict[str, Any]:
        """What it was done on."""
        return {"task": self.examples.manifest.get("task"), "examples": self.examples.hash}

    @property
    def most(self) -> int:
        """`k`, cut to the number of items, or to what the catalogue always finds."""
        return min(self.k, (self.catalogue or Rows(self.examples.vocab.num_items)).most)

    @property
    def parts(self) -> int:
        """Into how many parts the mesh divides a batch."""
        return self.mesh.size_of("batch") if self.mesh else 1

    def on_mesh(self) -> AbstractContextManager[Any]:
        """Where the model is called."""
        return self.mesh.activate() if self.mesh else contextlib.nullcontext()

    def need_rows(self, what: str) -> None:
        """Raises `UnservableError` for a model that names an item in several tokens."""
        if self.catalogue is not None:
            raise UnservableError(
                f"there are no {what} of a model that names an item in several tokens", mend="infer recommendations"
            )
