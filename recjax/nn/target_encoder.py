"""A candidate read after the history of its row: the ranking form of HSTU, and of any causal stack of blocks."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recjax.core.errors import ConfigError
from recjax.core.module import Module, Rngs
from recjax.nn.composed import taken
from recjax.nn.config import TransformerConfig
from recjax.nn.dense import Dense, Pass
from recjax.nn.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetEncoder:
    """What a causal `encoder` makes of the candidate when it stands behind the events of its row.

    With `attention` "hstu" this is the ranking model of Zhai et al. 2024 (arXiv 2402.17152, section 2.2), but for one
    thing: what was done with an item is added to the item's vector (`FieldConfig.beside`) where the paper has a slot
    for each of the two, so that a history is half as long. A stack of another width than the fields' has a dense layer
    before and after it. Its positions are relative or rotary.
    """

    encoder: TransformerConfig = TransformerConfig(position="rotary")

    def __post_init__(self) -> None:
        c = self.encoder
        if not c.causal or c.has_positions or c.relative == "position_time" or c.cross or c.moe is not None:
            raise ConfigError(
                "this stack of blocks cannot read a candidate after a history",
                where=f"TargetEncoder.encoder: causal = {c.causal}, position = {c.position!r}, "
                f"relative = {c.relative!r}, cross = {c.cross}, moe = {c.moe}",
                expected='causal blocks without cross-attention and experts, position "rotary" or "none"',
            )

    def make(self, width: int, *, rngs: Rngs) -> TargetEncoderLayers:
        """The module, for vectors of `width`."""
        return TargetEncoderLayers(self, width, rngs=rngs)


class TargetEncoderLayers(Module):
    """See `TargetEncoder`."""

    def __init__(self, config: TargetEncoder, width: int, *, rngs: Rngs) -> None:
        inner = config.encoder.width
        self.encoder = config.encoder.make(rngs=rngs)
        self.into = Dense(width, inner, rngs=rngs) if inner != width else None
        self.back = Dense(inner, width, rngs=rngs) if inner != width else None

    def __call__(
        self,
        target: Float[Array, "b d"],
        history: Float[Array, "r n d"],
        real: Bool[Array, "r n"],
        call: Pass,
        *,
        owner: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b d"]:
        """Events are oldest first and padded on the right; those of rows, or of contexts where rows have an `owner`."""
        history, real = taken(history, owner), taken(real, owner)
        length, count = real.shape[1], real.sum(1, dtype=jnp.int32)[:, None]
        slots = jnp.arange(length + 1, dtype=jnp.int32)[None]
        # The padding goes to the front, so that the newest event is next to the candidate.
        moved = jnp.take_along_axis(history, ((slots[:, :-1] + count) % length)[..., None], axis=1)
        first = length - count
        layout = Layout(jnp.maximum(slots - first, 0), (slots >= first).astype(jnp.int32))
        x = jnp.concatenate([moved, target[:, None]], axis=1)
        x = self.into(x, call) if self.into else x
        if call.train:
            x = self.encoder(x, layout, train=True, key=call.key)[:, -1]
        else:
            last = jnp.full((target.shape[0], 1), length, jnp.int32)
            x = self.encoder(x, layout, train=False, key=None, query_at=last)[:, 0]
        x = x.astype(target.dtype)
        return self.back(x, call) if self.back else x
