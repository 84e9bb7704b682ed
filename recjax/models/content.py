"""A sequence model whose item vectors come, wholly or in part, from what is known about the items.

Every item has a vector z of content, a fact of the recipe (`item/vectors`, see `recjax.data.features`): of its title,
or of another model. A learned g turns it into a vector of the width of the model. With a free part beside it this is
the collaborative embedding distillation of DLLM2Rec (Cui et al. 2024, arXiv 2405.00338); without, a model that knows
no item by name, and so can be a teacher, or rank an item nobody has had. Whatever it is made of, there is one table in
the end, and `models.folded.fold` makes the plain model that has it.
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from recjax.core.errors import ConfigError
from recjax.core.module import Rngs, param
from recjax.models.folded import FoldedSequence
from recjax.nn.config import fan_in_normal


class ContentSequence(FoldedSequence):
    """`Sequence` with the item vectors free_i + eta g(z_i), and a tied head; without `offset`, eta g(z_i) alone.

    g is one product with a bias, or, with `content_hidden` units, two with a ReLU in between. `eta` is fixed, or the
    start of a learned number. `content_width` is the length of z. `eta` 0 (fixed) is the plain model. Everything else
    is as in `Sequence`; the output has `projected` [v, d] too, which is g(z).
    """

    def __init__(
        self,
        *,
        num_rows: int,
        content_width: int,
        content_hidden: int | None = None,
        eta: float = 0.2,
        learn_eta: bool = False,
        offset: bool = True,
        rngs: Rngs,
        **plain: Any,
    ) -> None:
        super().__init__(num_rows=num_rows, rngs=rngs, **plain)
        if content_width < 1 or eta < 0 or (content_hidden is not None and content_hidden < 1):
            raise ConfigError(
                f"content_width = {content_width}, content_hidden = {content_hidden}, eta = {eta}",
                expected="widths of at least 1, and eta of at least 0",
            )
        if not offset:
            del self.table
        self.offset = offset
        width, zeros = self.config.width, nnx.initializers.zeros
        inner = content_hidden
        self.content_inner = param(rngs, (content_width, inner), (None, "mlp"), fan_in_normal) if inner else None
        self.content_inner_bias = param(rngs, (inner,), ("mlp",), zeros) if inner else None
        self.content = param(rngs, (inner or content_width, width), (None, "embed"), fan_in_normal)
        self.content_bias = param(rngs, (width,), (None,), zeros)
        self.fixed_eta = eta
        self.eta = param(rngs, (), (), nnx.initializers.constant(eta)) if learn_eta else None

    def project(self, batch: dict[str, Any]) -> jax.Array:
        """g(z) [v, d]."""
        x = batch["item/vectors"]
        if self.content_inner is not None and self.content_inner_bias is not None:
            x = jax.nn.relu(x @ self.content_inner[...] + self.content_inner_bias[...][None])
        return x @ self.content[...] + self.content_bias[...][None]

    def item_table(self, batch: dict[str, Any]) -> jax.Array:
        """[v, d]: what `fold` makes of them for good."""
        eta = self.fixed_eta if self.eta is None else self.eta[...]
        if not self.offset:
            return eta * self.project(batch)
        return self.table[...] if self.eta is None and not eta else self.table[...] + eta * self.project(batch)

    def __call__(self, batch: dict[str, Any], *, train: bool, key: Key[Array, ""] | None) -> dict[str, jax.Array]:
        """As `Sequence`, with `projected`."""
        return super().__call__(batch, train=train, key=key) | {"projected": self.project(batch)}
