"""Sequence models whose item vectors are made from parameters and facts, and the plain model that each comes to.

Training needs the making of the vectors; whoever only asks does not. Once trained there is one table of items, and
`fold` gives the plain `Sequence` that has it.
"""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from recjax.core.errors import ConfigError
from recjax.core.flops import TokenFlops, per_token
from recjax.core.module import FACTS, Functional, Params, Rngs
from recjax.models.sequence import Sequence, count_parameters


class FoldedSequence(Sequence):
    """A `Sequence` with a tied head whose subclass makes the item vectors, in `item_table`, of facts in the batch.

    `by_item` is False where a vector needs more than the facts of its own item (see `core.module.Functional`).
    """

    by_item: ClassVar[bool] = True

    def __init__(self, *, num_rows: int, rngs: Rngs, **plain: Any) -> None:
        super().__init__(num_rows=num_rows, rngs=rngs, **plain)
        if not self.config.tied_head:
            raise ConfigError(f"the items of a {type(self).__name__} have one vector each", expected="tied_head = True")
        self.num_rows, self.plain = num_rows, plain

    def token_flops(self, length: int) -> TokenFlops:
        """As for the plain model; making the vectors of the catalogue, once a step, is left out."""
        layers, width = self.config.attention_shape
        plain = Functional(functools.partial(Sequence, num_rows=self.num_rows, **self.plain))
        backbone = count_parameters(jax.eval_shape(plain.init, jax.random.key(0)))["backbone"]
        return per_token(parameters=backbone, layers=layers, length=length, width=width, rows=self.num_rows)


def fold(model: Functional, params: Params) -> tuple[Functional, Params]:
    """The plain model with the same answers, and its parameters; any other model comes back as it is.

    `params` carry the facts (`core.module.with_facts`), of which nothing is left afterwards.
    """
    module = model.bind(params)
    if not isinstance(module, FoldedSequence):
        return model, params
    plain = Functional(functools.partial(Sequence, num_rows=module.num_rows, **module.plain))

    def table(params: Params) -> jax.Array:
        bound: Any = model.bind(params)
        return bound.item_table(params[FACTS])

    rest = {name: value for name, value in params.items() if name in plain.axes}
    return plain, {**rest, "table": jnp.asarray(jax.jit(table)(params), jnp.float32)}
