"""`recjax export`: freeze a checkpoint into a bundle that a serving team loads without the training code.

The whole answer, from history rows to the best rows of the catalogue, is one function, exported with jax.export for
any batch size and any number of seen items; the weights lie beside it, so that they can be inspected and are not
part of the program. The new bundle is loaded and compared with the model in this process before it takes its place.
`recjax.serve.bundle` describes the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from safetensors.numpy import save_file

from recjax import cli, trained
from recjax.core.errors import BundleError
from recjax.core.folder import hash_of, new_folder, write_manifest
from recjax.core.module import Functional, Params
from recjax.core.state import by_path, from_paths
from recjax.data.vocab import FIRST_ITEM, ItemVocab
from recjax.models.content import fold
from recjax.recommend import TIMES, Recommend, make_recommend
from recjax.serve import bundle as layout

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-5


def export_bundle(
    model: Functional,
    params: Params,
    *,
    vocab: ItemVocab,
    titles: Sequence[str | None],
    out: str | os.PathLike[str],
    history_length: int,
    times: str = "none",
    max_k: int = 100,
    name: str = "model",
    recipe: str = "",
    step: int = 0,
    checkpoint: str = "",
    platforms: Sequence[str] = PLATFORMS,
) -> Path:
    """Write a bundle at `out` and return its path.

    `titles` has one entry for each table row; `times` is what the feed tells the model ("none", "history", "target");
    `max_k` is cut to the number of items. `recipe`, `step` and
    `checkpoint` are kept in the manifest. The function is lowered for every one of `platforms` that allows it; the
    one this process runs on must. Raises `BundleError` when `out` exists, when the weights cannot be stored, or when
    the bundle does not answer as the model does.
    """
    if jax.process_count() > 1:
        raise BundleError("export runs in one process", where=f"{jax.process_count()} processes")
    if max_k < 1 or not name:
        raise BundleError(f"max_k is {max_k}, name is {name!r}", expected="max_k at least 1 and a name")
    if len(titles) != vocab.num_rows:
        raise ValueError(f"{len(titles)} titles for {vocab.num_rows} rows")
    max_k = min(max_k, vocab.num_items)
    model, params = fold(model, params)
    weights = _host(params)
    params = from_paths(params, weights)
    recommend = make_recommend(model, num_items=vocab.num_items, k=max_k)
    function, refused = _lower(recommend, params, weights, history_length, times, tuple(platforms))
    schema = layout.schema_of(history_length, max_k, times)
    with new_folder(out, error=BundleError) as folder:
        (folder / layout.FUNCTION_FILE).write_bytes(function.serialize())
        save_file(weights, folder / layout.WEIGHTS_FILE)
        # safetensors lets nobody else read what it wrote.
        shutil.copymode(folder / layout.FUNCTION_FILE, folder / layout.WEIGHTS_FILE)
        vocab.save(folder / layout.VOCABULARY_FILE)
        (folder / layout.TITLES_FILE).write_text(json.dumps(list(titles), ensure_ascii=False), encoding="utf-8")
        write_manifest(
            folder,
            {
                "format": layout.FORMAT,
                "name": name,
                "recipe": recipe,
                "step": step,
                "checkpoint": checkpoint,
                "max_k": max_k,
                "history_length": history_length,
                "times": times,
                "num_items": vocab.num_items,
                "vocabulary_hash": vocab.hash,
                "schema": schema,
                "schema_hash": hash_of(schema),
                "functions": {layout.FUNCTION: layout.FUNCTION_FILE},
                "weights": layout.shapes_of(weights),
                "jax_version": jax.__version__,
                "calling_convention": function.calling_convention_version,
                "platforms": list(function.platforms),
                "platforms_refused": refused,
            },
        )
        _compare(folder, recommend, params)
    return Path(out)


def main(argv: list[str]) -> int:
    """`recjax export`."""
    flags = trained.parser("export")
    flags.add_argument("--max_k", type=int, default=100, help="most items that can be asked for (default 100)")
    flags.add_argument("--name", default="", help="what the server calls the model (default: name of the recipe)")
    run, args = trained.from_command_line(flags, argv)
    recipe, examples = run.assembly.recipe, run.assembly.examples[0]
    path = export_bundle(
        run.assembly.model,
        run.params,
        vocab=run.assembly.vocab,
        titles=examples.titles(),
        out=args.out,
        history_length=recipe.feed.history_length,
        times=recipe.feed.times,
        max_k=args.max_k,
        name=args.name or recipe.name,
        recipe=recipe.name,
        step=run.step,
        checkpoint=str(run.checkpoint),
    )
    print(f"{path}: step {run.step} of {recipe.name}; recjax serve --bundle {path}")
    return 0


def _host(params: Params) -> dict[str, np.ndarray]:
    """The arrays by path, such as "transformer/blocks/ffn/up"; raises `BundleError` for one that is not finite."""
    weights = {name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in by_path(params).items()}
    for name, array in weights.items():
        if not np.isfinite(array.astype(np.float32)).all():
            raise BundleError(
                "a parameter holds values that are not finite", where=name, mend="export an earlier checkpoint"
            )
    return weights


def _lower(
    recommend: Recommend,
    params: Params,
    weights: dict[str, np.ndarray],
    length: int,
    times: str,
    platforms: tuple[str, ...],
) -> tuple[jax.export.Exported, dict[str, str]]:
    """The exported function and, for each platform it could not be lowered for, why."""

    def by_name(weights: dict[str, jax.Array], *inputs: jax.Array) -> Any:
        return recommend(from_paths(params, weights), *inputs)

    batch, seen = jax.export.symbolic_shape("b, n")
    arguments = (
        {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()},
        jax.ShapeDtypeStruct((batch, length), np.int32),
        jax.ShapeDtypeStruct((batch, seen), np.int32),
        *(
            jax.ShapeDtypeStruct((batch, length) if name == "history_time" else (batch,), np.int32)
            for name in TIMES[times]
        ),
    )

    def attempt(targets: Sequence[str]) -> jax.export.Exported:
        return jax.export.export(jax.jit(by_name), platforms=tuple(targets))(*arguments)

    here = jax.export.default_export_platform()
    wanted = list(dict.fromkeys((here, *platforms)))
    try:
        return attempt(wanted), {}
    except Exception:  # a platform may refuse a kernel in any way; find out which one does
        function, refused = attempt([here]), {}
    for platform in wanted[1:]:
        try:
            function = attempt([*function.platforms, platform])
        except Exception as error:
            refused[platform] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return function, refused


def _compare(folder: Path, recommend: Recommend, params: Params) -> None:
    """Load the bundle and hold its answers to a few histories against the model's own."""
    loaded = layout.Bundle(folder, verify=False)
    rng = np.random.default_rng(0)
    last = FIRST_ITEM + loaded.vocab.num_items
    history = rng.integers(FIRST_ITEM, last, (3, loaded.history_length), dtype=np.int32)
    history[0, 1:] = 0
    seen = np.unique(history[1:])[None, :8].repeat(3, axis=0)
    when = (np.sort(rng.integers(0, 10**6, history.shape), axis=1).astype(np.int32), np.full(3, 10**6, np.int32))
    times = when[: len(TIMES[loaded.times])]
    expected, _ = jax.jit(recommend)(params, history, seen, *times)
    found, _ = loaded.recommend(history, seen, *times)
    # Rows may change places among equal scores; the scores in order may not.
    if not np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
        gap = float(np.nanmax(np.abs(np.where(np.isinf(found), 0, found) - np.where(np.isinf(expected), 0, expected))))
        raise BundleError(
            f"the exported function differs from the model by {gap:.2g}",
            expected=f"scores equal to {TOLERANCE}",
            mend="this is a bug in recjax or jax; please report it with the recipe",
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
