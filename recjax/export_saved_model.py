"""A bundle as a TensorFlow SavedModel, for serving teams whose servers load nothing else.

    python -m recjax.export_saved_model --bundle DIR --out DIR

The functions are those of the bundle, the same StableHLO in a form that TensorFlow reads: `recommend` (the default
signature) and, where the bundle has it, `filtered`, for any batch size and any number of seen items. Their inputs are
named as in the manifest of the bundle and are rows, not item ids: the vocabulary, the manifest and whatever else turns
ids into rows lie in `assets.extra`. The model is loaded again and compared with the bundle before it takes its place.
Needs TensorFlow (extra `saved_model`), which is imported here, when this runs, and nowhere else.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np

from recjax import cli
from recjax.core.errors import BundleError
from recjax.core.folder import MANIFEST, new_folder
from recjax.data.vocab import FIRST_ITEM
from recjax.recommend import TIMES
from recjax.serve import bundle as layout
from recjax.serve.bundle import Bundle
from recjax.serve.stored import WEIGHTS_FILE, load_function, load_weights

SIGNATURES = {layout.FUNCTION: "serving_default", layout.FILTERED: "filtered"}
EXTRA = "assets.extra"
TOLERANCE = 1e-5
_COMPOSITE = re.compile(r'stablehlo\.composite "[^"]+" (%[^{]*?) \{.*?decomposition = (@[\w.]+).*?\} : \(')


def export_saved_model(bundle_path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the bundle at `bundle_path` as a SavedModel at `out` and return its path.

    Raises `BundleError` without TensorFlow, when `out` exists, when the bundle is of another kind, or when the
    SavedModel does not answer as the bundle does.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise BundleError("a SavedModel needs TensorFlow", mend="pip install 'recjax[saved_model]'")
    import tensorflow

    tf: Any = tensorflow
    bundle, module = Bundle(bundle_path), tf.Module()
    module.weights = {
        name: tf.Variable(array, trainable=False)
        for name, array in load_weights(bundle.path, bundle.manifest["weights"]).items()
    }
    functions = {name: _function(tf, bundle, module, name) for name in bundle.manifest["functions"]}
    for name, function in functions.items():
        setattr(module, name, function)
    with new_folder(out, error=BundleError) as folder:
        tf.saved_model.save(module, str(folder), {SIGNATURES[name]: each for name, each in functions.items()})
        (folder / EXTRA).mkdir()
        left_out = {WEIGHTS_FILE, *bundle.manifest["functions"].values()}
        for name in (MANIFEST, *(name for name in bundle.manifest["files"] if name not in left_out)):
            shutil.copyfile(bundle.path / name, folder / EXTRA / name)
        _compare(tf.saved_model.load(str(folder)), bundle)
    return Path(out)


def inputs_of(bundle: Bundle, name: str) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """dtype and shape of each input of a function by name, None where any size will do."""
    length = bundle.prompt_length
    found: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "history_ids": ("int32", (None, length)),
        "seen_ids": ("int32", (None, None)),
    }
    for time in TIMES[bundle.times]:
        found[time] = ("int32", (None, length) if time == "history_time" else (None,))
    if name == layout.FILTERED:
        found["allowed"] = ("bool", (None, bundle.vocab.num_rows))
    return found


def _function(tf: Any, bundle: Bundle, module: Any, name: str) -> Any:
    """The function of a bundle as one of TensorFlow, which reads the weights of `module`."""
    from jax.extend.mlir.dialects import stablehlo
    from tensorflow.compiler.tf2xla.python import xla  # where jax2tf takes it from; tf.raw_ops does not show it

    told, call = bundle.manifest, cast(Any, xla.call_module)
    exported = load_function(bundle.path, told["functions"][name], made_by=told["jax_version"])
    # As old a form as jax can write: a released TensorFlow is older than the jax that is released with it.
    age = stablehlo.StablehloCompatibilityRequirement.WEEK_12
    version = stablehlo.get_version_from_compatibility_requirement(age)
    attributes = {
        "version": exported.calling_convention_version,
        "module": stablehlo.serialize_portable_artifact_str(called(exported.mlir_module()), version),
        "platforms": [platform.upper() for platform in exported.platforms],
        "Tout": [tf.as_dtype(aval.dtype) for aval in exported.out_avals],
        "Sout": [[n if isinstance(n, int) else None for n in aval.shape] for aval in exported.out_avals],
    }

    def answer(*given: Any) -> dict[str, Any]:
        flat = [*(module.weights[key] for key in sorted(module.weights)), *given]
        kept = [flat[at] for at in exported.module_kept_var_idx]
        scores, rows = call(kept, **attributes)
        return {"scores": scores, "rows": rows}

    specs = [tf.TensorSpec(shape, dtype, name=key) for key, (dtype, shape) in inputs_of(bundle, name).items()]
    return tf.function(answer, input_signature=specs, autograph=False)


def called(text: str) -> str:
    """A module in which composites, such as the best k of a row, are calls of the functions they stand for.

    TensorFlow fills in the sizes of a batch through calls, and not through composites.
    """
    return _COMPOSITE.sub(r"func.call \2(\1) : (", text)


def _compare(loaded: Any, bundle: Bundle) -> None:
    """Hold the answers of a loaded SavedModel to a few histories against those of the bundle."""
    rng = np.random.default_rng(0)
    for name in bundle.manifest["functions"]:
        for rows, seen in ((1, 1), (3, 8)):
            given = {}
            for key, (dtype, shape) in inputs_of(bundle, name).items():
                size = [rows, *(seen if n is None else n for n in shape[1:])]
                top = FIRST_ITEM + bundle.vocab.num_items
                given[key] = rng.random(size) < 0.7 if dtype == "bool" else rng.integers(2, top, size).astype(dtype)
            found = loaded.signatures[SIGNATURES[name]](**given)
            history, seen_ids, *times = (value for key, value in given.items() if key != "allowed")
            expected, _ = bundle.recommend(history, seen_ids, *times, allowed=given.get("allowed"))
            if not np.allclose(found["scores"].numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE):
                raise BundleError(
                    f"the SavedModel answers otherwise than the bundle ({name})",
                    where=str(bundle.path),
                    expected=f"scores equal to {TOLERANCE}",
                    mend="this is a bug in recjax, jax or TensorFlow; please report it with the recipe",
                )


def main(argv: list[str]) -> int:
    """`python -m recjax.export_saved_model`."""
    flags = argparse.ArgumentParser("recjax.export_saved_model", description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--bundle", required=True, metavar="DIR", help="what `recjax export` wrote")
    flags.add_argument("--out", required=True, metavar="DIR", help="a new folder; TensorFlow Serving wants DIR/1")
    options = flags.parse_args(argv)
    print(f"{export_saved_model(options.bundle, options.out)}: a SavedModel of {options.bundle}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
