"""The bundle of a ranker: its function, its weights, and the object that makes fields of a request.

Heads that exist to be taught are left out. Each head is calibrated on the validation split, which also makes up for
negatives that training left out. `recjax.freeze` makes the bundle; `recjax.serve.rank_bundle` describes the folder.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from recjax.core.errors import ConfigError, ExamplesError
from recjax.core.folder import hash_of
from recjax.core.module import FACTS, Functional, Params, with_facts
from recjax.core.state import from_paths
from recjax.data.examples import Examples
from recjax.data.fields import shapes_of as fields_of
from recjax.data.ranker_features import RankerFeatures
from recjax.freeze import Program, freeze, host_weights
from recjax.metrics.calibration import fit_calibration
from recjax.models.ranker import Ranker, without_auxiliary
from recjax.nn.dense import merged
from recjax.nn.field_vectors import CONTEXT, OWNER
from recjax.ranker_evaluation import RankerEvaluator
from recjax.recipe import Assembly
from recjax.serve import rank_bundle as layout
from recjax.serve.rank_bundle import SIZES, RankBundle
from recjax.serve.rank_request import RankQuestion

TOLERANCE = 1e-6
_DTYPES = {"numeric": np.float32, "vector": np.float32}


def export_ranker(
    model: Functional,
    params: Params,
    features: RankerFeatures,
    *,
    out: str | os.PathLike[str],
    heads: Sequence[Mapping[str, Any]],
    domains: Mapping[str, Any] | None = None,
    item: str = "item_id",
    facts: Mapping[str, Any] | None = None,
    **told: Any,
) -> Path:
    """Write a rank bundle at `out` and return its path.

    `features` is what training made its fields with. Each of the `heads` is "name", "temperature" and "bias" (or for
    numbers "form", see `RankBundle.scores`), and whatever else there is to say of it. `domains`, for a model that reads
    the domain of a row, is the "column" that holds it and the "names" in order of their numbers; a model that does not
    has a second program, which computes once what candidates that differ in the column `item`, and in what goes by it,
    have alike. `facts` are kept in the manifest, too; `told` (`name`, `recipe`, `step`, `checkpoint`, `platforms`) is
    as `freeze` takes it. Raises `BundleError` as that does, and when the weights cannot be stored.
    """
    weights, names = host_weights(params), [head["name"] for head in heads]
    params = from_paths(params, weights)

    def rank(weights: dict[str, jax.Array], fields: dict[str, jax.Array]) -> jax.Array:
        found = model.apply(from_paths(params, weights), fields, train=False, key=None)
        return jnp.stack([found[f"logit/{head}"] for head in names], axis=1)

    def rank_candidates(
        weights: dict[str, jax.Array], context: dict[str, jax.Array], fields: dict[str, jax.Array]
    ) -> jax.Array:
        shared = {name.replace("field/", CONTEXT, 1): x for name, x in context.items()}
        owner = jnp.zeros(next(iter(fields.values())).shape[0], jnp.int32)
        return rank(weights, {**fields, **shared, OWNER: owner})

    alike = () if domains else layout.alike_of(features, item)
    rows, programs = _fields(features, domains), {}
    if alike:
        context, own = ({k: x for k, x in rows.items() if (k in alike) == is_shared} for is_shared in (True, False))
        context = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in context.items()}
        programs = {layout.CANDIDATES_FILE: Program(rank_candidates, (context, own), is_shortcut=True)}

    def write(folder: Path) -> dict[str, Any]:
        for file, content in features.files().items():
            (folder / file).write_bytes(content)
        (folder / layout.PROBE_FILE).write_text(json.dumps(layout.probe_of(features)), encoding="utf-8")
        schema = layout.schema_of(features, names, domains, alike)
        return {
            "heads": [dict(head) for head in heads],
            "domains": None if domains is None else dict(domains),
            "features_hash": features.hash,
            "encoder_hash": features.encoder.hash,
            "schema": schema,
            "schema_hash": hash_of(schema),
            **(facts or {}),
        }

    return freeze(
        RankBundle,
        out,
        weights,
        {layout.FUNCTION_FILE: Program(rank, (rows,)), **programs},
        write=write,
        pairs=lambda loaded: _pairs(loaded, rank, weights, item),
        tolerance=TOLERANCE,
        **told,
    )


def export_ranker_run(
    assembly: Assembly, params: Params, out: str | os.PathLike[str], *, domain: str = "", **told: Any
) -> Path:
    """`export_ranker` of a run as its recipe says, without heads that were only taught.

    With `domain` the adapters of this domain are merged into the backbone, and others are left out.

    Raises `ExamplesError` where the fields beside the examples are not those that the examples were encoded with.
    """
    examples = assembly.examples[0]
    features = RankerFeatures.load(examples.path)
    if features.hash != examples.manifest["features_hash"]:
        raise ExamplesError(
            f"the fields have hash {features.hash}",
            where=str(examples.path),
            expected=f"{examples.manifest['features_hash']}, those of the examples",
            mend="prepare the examples again with this version of recjax",
        )
    task: Any = assembly.recipe.mixture.tasks[0]
    heads = calibrated_heads(assembly, params)
    model, params = served(assembly, params)
    if domain:
        model, params = of_domain(assembly, params, domain)
        told["name"] = f"{told.get('name', 'model')}-{domain}"
    domains = None
    if reads_domain(model):
        domains = {"column": task.domain, "names": list(examples.manifest["domains"])}
    return export_ranker(
        model,
        params,
        features,
        out=out,
        heads=heads,
        domains=domains,
        item=task.item,
        facts={"log": log_of(examples), "task": examples.manifest["task"]},
        **told,
    )


def served(assembly: Assembly, params: Params) -> tuple[Functional, Params]:
    """The model without heads that were only taught, and its part of the parameters."""
    bound: Any = assembly.model.bind(assembly.abstract_params())
    if not isinstance(bound, Ranker) or not bound.auxiliary:
        return assembly.model, params
    make = functools.partial(
        assembly.recipe.model, num_rows=assembly.num_rows, fields=fields_of(assembly.examples[0].manifest)
    )
    model = Functional(lambda rngs: make(rngs=rngs, auxiliary=False))
    kept = without_auxiliary({name: part for name, part in params.items() if name != FACTS}, model)
    return model, with_facts(kept, params.get(FACTS, {}))


def of_domain(assembly: Assembly, params: Params, name: str) -> tuple[Functional, Params]:
    """The backbone with the adapters of one domain merged into it (`nn.dense.merged`).

    Raises `ConfigError` for a model without adapters, one that mixes them, or an unknown domain.
    """
    bound: Any = assembly.model.bind(assembly.abstract_params())
    names = list(assembly.examples[0].manifest["domains"])
    if name not in names or not getattr(bound, "reads_domain", False) or bound.gate is not None:
        raise ConfigError(
            f"there are no adapters of the domain {name!r} to merge",
            where="--domain",
            expected=f"a model with adapters that no gate mixes, and one of {', '.join(names) or 'its domains'}",
        )
    make = functools.partial(
        assembly.recipe.model, num_rows=assembly.num_rows, fields=fields_of(assembly.examples[0].manifest)
    )
    model = Functional(lambda rngs: make(rngs=rngs, adapters=None, auxiliary=False))
    kept = merged({key: part for key, part in params.items() if key != FACTS}, names.index(name))
    return model, with_facts(kept, params.get(FACTS, {}))


def reads_domain(model: Functional) -> bool:
    """Whether the model reads `domain` of its batch when it serves."""
    bound: Any = model.bind(jax.eval_shape(model.init, jax.random.key(0)))
    heads = getattr(bound, "served", ())
    return bool(getattr(bound, "reads_domain", False)) or any(getattr(head, "gates", 0) for head in heads)


def calibrated_heads(assembly: Assembly, params: Params) -> list[dict[str, Any]]:
    """What a server is told of each head of the task: its rule, the rate of training, and its calibration."""
    evaluator = assembly.evaluator("valid", 0)
    assert isinstance(evaluator, RankerEvaluator)
    logits, labels = evaluator.scores(params, correct=False), evaluator.reader.column("labels")
    manifest, found = assembly.examples[0].manifest, []
    for number, (head, told) in enumerate(manifest["heads"].items()):
        if told.get("kind") == "value":
            found.append({"name": head, **told, "form": evaluator.config.value_form})
            continue
        label, z = labels[:, number], logits[head]
        known = label >= 0
        label, z = label[known], z[known]
        temperature, bias = 1.0, float(np.log(manifest["keep_negatives"]))
        if len(np.unique(label)) == 2 and set(np.unique(label)) == {0.0, 1.0}:
            fitted = fit_calibration(np.stack([np.zeros_like(z), z], axis=1), label.astype(np.int64))
            temperature, bias = fitted.temperature, fitted.bias[1]
        found.append({"name": head, **told, "temperature": temperature, "bias": bias, "calibrated_on": len(label)})
    return found


def log_of(examples: Examples) -> dict[str, Any]:
    """What a client must know of the log: when what counters and histories remember ends."""
    end, splits = 0, ("train",) if examples.manifest["events"] == "train" else ("train", "valid", "test")
    if not examples.manifest["times"]:
        return {"end": None, "events": examples.manifest["events"]}
    for split in splits:
        source = examples.source(split)
        values, begins = source.read(np.arange(len(source)), ["time"])["time"]
        end = max(end, int(values[begins].max(initial=0)))
    return {"end": end, "events": examples.manifest["events"]}


def _fields(features: RankerFeatures, domains: Mapping[str, Any] | None) -> dict[str, jax.ShapeDtypeStruct]:
    """What the program is told of rows: any number of them."""
    [batch] = jax.export.symbolic_shape("b")
    found = {
        f"field/{shape.name}": jax.ShapeDtypeStruct(
            (batch, shape.width) if shape.width else (batch,), _DTYPES.get(shape.kind, np.int32)
        )
        for shape in features.encoder.shapes
    }
    return found | ({layout.DOMAIN: jax.ShapeDtypeStruct((batch,), np.int32)} if domains else {})


def _pairs(loaded: RankBundle, rank: Any, weights: dict[str, np.ndarray], item: str) -> Iterator[tuple[Any, Any]]:
    """Logits of the bundle for the probe, and the model's own; those of candidates for a context, too."""
    rows = json.loads((loaded.path / layout.PROBE_FILE).read_text(encoding="utf-8"))["rows"]
    fields = loaded.features.rows(rows)
    if loaded.domains:
        fields[layout.DOMAIN] = (np.arange(len(rows)) % (len(loaded.domains["names"]) + 1)).astype(np.int32)
    yield loaded.logits(fields), jax.jit(rank)(weights, fields)
    if loaded.alike:
        [probe, *_] = [row for row in rows if row]
        context = {name: value for name, value in probe.items() if name != item}
        candidates = [{item: row.get(item)} for row in rows] * SIZES[0]
        asked = [RankQuestion(context=context, candidates=candidates)]
        yield loaded.answer(asked), jax.jit(rank)(weights, loaded.fields(asked))
