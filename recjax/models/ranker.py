"""A ranker: fields, what an interaction makes of them, and a logit for each named head.

Its parts are configs: how fields become vectors (`nn.field_vectors`), which interaction (`nn.interaction`), experts
between the tasks (`nn.experts`), towers and adapters of domains (`nn.by_domain`, `nn.dense`). Which fields there are it
is told by the prepared examples. It computes no loss and never sees a label; heads that exist to be taught
(`Head.beside`) are not there when it is evaluated, and with `auxiliary` False not in its parameters either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from recjax.core.errors import ConfigError
from recjax.core.flops import TokenFlops, per_token
from recjax.core.module import SEEN, Functional, Module, Params, Rngs, param
from recjax.core.state import by_path, from_paths
from recjax.nn.by_domain import ByDomain, DomainGate
from recjax.nn.dense import DomainAdapters, Pass, adapt, round_factors
from recjax.nn.domain_norm import DomainNorm
from recjax.nn.experts import Mmoe, Ple
from recjax.nn.field_vectors import FieldConfig, FieldShape, FieldVectors
from recjax.nn.interaction import Interaction, Linear
from recjax.nn.past_vectors import KNOWN
from recjax.nn.tower import TowerConfig, moved, name_norms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """The logit `logit/<name>`: hidden layers of its own (`tower`), and an output layer.

    `beside` names a head that this one stands beside in training only: without a tower of its own it reads what the
    hidden layers of that one made, with one what they read. `stop_gradient` keeps what it is taught from everything
    before. `gates` adds the output `gate/<name>`, a learned number in (0, 1) for each of so many domains, for a
    selector of labels that adapts (`losses.self_distillation`).
    """

    name: str = "label"
    tower: TowerConfig | None = None
    beside: str = ""
    stop_gradient: bool = False
    gates: int = 0


class Ranker(Module):
    """`logit/<name>` [b] for every head, of rows with these `fields`.

    `num_rows` is the length of the table that fields share, `table_scale` the standard deviation that it starts with.
    Where the fact `item/<start>` knows a row (`data.field_tables`), the vector of the row starts as it is there.
    Experts, if any, give every head that is served a vector of its own. With `norm` half the sum of squares of the
    table is told in training, as `norm/table` (`losses.table_norm`). With `products` "bfloat16" dense layers before
    the heads round the factors of their products (`nn.linear`); sums, parameters and everything else are float32.
    """

    max_length = None

    def __init__(
        self,
        *,
        num_rows: int,
        fields: Sequence[FieldShape],
        interaction: Interaction,
        heads: Sequence[Head] = (Head(),),
        inputs: FieldConfig | None = None,
        experts: Mmoe | Ple | ByDomain | None = None,
        adapters: DomainAdapters | None = None,
        table_scale: float = 1e-2,
        start: str = "",
        products: Literal["float32", "bfloat16"] = "float32",
        norm: bool = False,
        auxiliary: bool = True,
        rngs: Rngs,
    ) -> None:
        served, inputs = _checked(heads), inputs or FieldConfig()
        self.auxiliary = tuple(h for h in heads if h.beside) if auxiliary else ()
        self.start, self.norm = start, norm
        self.served, columns = served, inputs.width + interaction.first_order
        normal = nnx.initializers.normal(table_scale)
        self.table = param(rngs, (num_rows, columns), ("items", None), normal)
        self.fields = FieldVectors(inputs, fields, first_order=interaction.first_order, rngs=rngs)
        self.interaction = interaction.make(self.fields.shape, rngs=rngs)
        width = self.interaction.width
        self.experts = experts.make(width, len(served), rngs=rngs) if experts else None
        self.trunk = self.experts.width if self.experts else width
        for head in served:
            setattr(self, f"head_{head.name}", self._make(head, self.trunk, rngs))
        for part in [p for p in (self.fields, self.interaction, self.experts) if p is not None]:
            if adapters is not None:
                adapt(part, adapters, rngs)
            if products == "bfloat16":
                round_factors(part)
        mixes, flat = adapters is not None and adapters.mixed, self.fields.shape.flat
        self.gate = DomainGate(flat, adapters.domains, rngs=rngs) if adapters and mixes else None
        normal = adapters is not None and adapters.normalise
        self.domain_norm = DomainNorm(flat, adapters.domains, rngs=rngs) if adapters and normal else None
        self.reads_domain = adapters is not None or isinstance(experts, ByDomain)
        for head in self.auxiliary:  # the last to be drawn: whatever is beside them, the others are the same
            teacher = getattr(self, f"head_{head.beside}")
            setattr(self, f"head_{head.name}", self._make(head, self.trunk if head.tower else teacher.width, rngs))
        name_norms(self)

    def _make(self, head: Head, width: int, rngs: Rngs) -> HeadLayers:
        """A head that reads what the interaction made has the output layer that goes with it."""
        towers = {h.name: h.tower for h in self.served}
        reads_trunk = not (head.tower or self.experts or towers.get(head.beside))
        return HeadLayers(head, width, self.interaction.output(rngs=rngs) if reads_trunk else None, rngs=rngs)

    def __call__(self, batch: dict[str, Any], *, train: bool, key: Key[Array, ""] | None) -> dict[str, jax.Array]:
        """Reads `field/<name>` of every field, `domain` for what is by domain, and facts where parts are told to.

        The candidates of a request share its context: see `nn.field_vectors.FieldVectors` for fields that are given
        once for a context. Logits are those of rows with all their fields, but for rounding.
        """
        call = Pass(train, key, batch["domain"] if self.reads_domain else None, {})
        inputs = self.fields(batch, self.table[...], call.part(0))
        if self.gate is not None:
            call = call._replace(domain=self.gate(inputs.flat(), call))
        inputs = self.domain_norm.of_inputs(inputs, call) if self.domain_norm is not None else inputs
        crossed = self.interaction(inputs, call.part(1))
        trunk, offset, made, out = crossed.hidden, crossed.offset, {}, {}
        mixed = self.experts(trunk, call.part(2)) if self.experts else None
        for number, head in enumerate((*self.served, *(self.auxiliary if train else ()))):
            layers, place = (
                getattr(self, f"head_{head.name}"),
                [h.name for h in self.served].index(head.beside or head.name),
            )
            x = trunk if mixed is None else mixed[:, place]
            x = made[head.beside] if head.beside and not head.tower else x
            x, shift = jax.lax.stop_gradient((x, offset)) if head.stop_gradient else (x, offset)
            made[head.name], logit = layers(x, call.part(3 + number))
            out[f"logit/{head.name}"] = logit if shift is None else logit + shift
            if head.gates:
                out[f"gate/{head.name}"] = layers.gate(batch["domain"])
        if self.norm and train:
            out["norm/table"] = jnp.square(self.table[...]).sum() / 2
        return out | {f"{SEEN}{name}": value for name, value in call.seen.items()}

    @property
    def table_width(self) -> int:
        """Columns of the table that are vectors; weights of the first order come behind them."""
        return self.fields.config.width

    def fit(self, facts: Mapping[str, Any], key: Key[Array, ""]) -> dict[str, jax.Array]:
        """The table as the fact `start` has it where it knows a row; weights of the first order stay as they are."""
        if not self.start:
            return {}
        table, start, known = self.table[...], facts[f"item/{self.start}"], facts[f"item/{self.start}{KNOWN}"]
        if start.shape[1] != self.table_width:
            expected = f"{self.table_width}, as FieldConfig.width says"
            raise ConfigError(f"the table starts from vectors of {start.shape[1]}", where=self.start, expected=expected)
        vectors = jnp.where(known[:, None] > 0, start, table[:, : start.shape[1]])
        return {"table": jnp.concatenate([vectors, table[:, start.shape[1] :]], axis=1)}

    def maintain(self, seen: Mapping[str, Any], key: Key[Array, ""]) -> dict[str, jax.Array]:
        """Running moments of norms."""
        return moved(self, seen)

    def token_flops(self, length: int) -> TokenFlops:
        """Training FLOPs of one row: two for every weight that is not looked up, three times."""
        sizes = {path: math.prod(x.shape) for path, x in by_path(nnx.to_pure_dict(nnx.state(self))).items()}
        parameters = sum(size for path, size in sizes.items() if path != "table")
        return per_token(parameters=parameters, layers=0, length=length, width=0, rows=0)


class HeadLayers(Module):
    """See `Head`."""

    def __init__(self, config: Head, inputs: int, output: Any, *, rngs: Rngs) -> None:
        self.tower = config.tower.make(inputs, rngs=rngs) if config.tower else None
        self.width = self.tower.width if self.tower else inputs
        self.output = output or Linear(self.width, rngs=rngs)
        self.gates = param(rngs, (config.gates,), (None,), nnx.initializers.zeros) if config.gates else None

    def __call__(self, x: jax.Array, call: Pass) -> tuple[jax.Array, jax.Array]:
        """What the hidden layers made [b, o], and the logit [b]."""
        x = self.tower(x, call) if self.tower else x
        return x, self.output(x, call)

    def gate(self, domain: jax.Array) -> jax.Array:
        """A number in (0, 1) for each row, by its domain."""
        assert self.gates is not None
        return jax.nn.sigmoid(self.gates[...][domain])


def without_auxiliary(params: Params, served: Functional) -> Params:
    """Of the parameters of a ranker those of the one that is `served`, made with `auxiliary` False.

    Raises `ConfigError` where the two are not the same but for heads that are taught.
    """
    shapes, found = jax.eval_shape(served.init, jax.random.key(0)), by_path(params)
    wrong = [path for path, s in by_path(shapes).items() if path not in found or found[path].shape != s.shape]
    if wrong:
        raise ConfigError(f"the ranker has no such {', '.join(wrong)}", expected="the same model, auxiliary = False")
    return from_paths(shapes, {path: found[path] for path in by_path(shapes)})


def _checked(heads: Sequence[Head]) -> tuple[Head, ...]:
    """The heads that are served."""
    served, names = tuple(h for h in heads if not h.beside), [h.name for h in heads]
    if not served or len(set(names)) != len(names):
        raise ConfigError(
            f"heads {names}", expected="different names, and at least one head that is not beside another"
        )
    for head in heads:
        if head.beside and head.beside not in [h.name for h in served]:
            raise ConfigError(
                f"the head {head.name!r} is beside {head.beside!r}", expected=", ".join(h.name for h in served)
            )
    return served
