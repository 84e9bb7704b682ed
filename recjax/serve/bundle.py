"""An exported bundle: the folder that `recjax export` writes and a server loads.

    manifest.json         format, versions, hashes, schema, where it comes from; checksums of the other files
    recommend.jaxexport   the model and the search as one serialised jax.export function (StableHLO)
    weights.safetensors   what that function takes as its first argument, by name
    vocabulary.json       item ids <-> rows
    titles.json           a title or null for every row

Loading needs jax, numpy and safetensors, and none of the training code. It refuses whatever does not fit together:
missing or altered files, another format, other feature code, another vocabulary than the weights were trained with,
a platform the function was not lowered for. It never falls back to something else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from recjax.core.errors import BundleError, ExamplesError, RequestError
from recjax.core.folder import Manifest, check_files, hash_of, read_manifest
from recjax.data.vocab import ItemVocab
from recjax.serve import features

FORMAT = 1
FUNCTION = "recommend"
FUNCTION_FILE = "recommend.jaxexport"
WEIGHTS_FILE = "weights.safetensors"
VOCABULARY_FILE = "vocabulary.json"
TITLES_FILE = "titles.json"

REMAKE = "export the checkpoint again with this version of recjax"


class Bundle:
    """A loaded bundle on the default device."""

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        """Load and check the bundle at `path`; raises `BundleError`. `verify=False` leaves out the checksums."""
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path, format_version=FORMAT, what="bundle", error=BundleError)
        check_files(self.path, self.manifest, verify=verify, error=BundleError)
        self._check_features()
        self.name: str = self.manifest["name"]
        self.max_k: int = self.manifest["max_k"]
        self.history_length: int = self.manifest["history_length"]
        self.times: str = self.manifest.get("times", "none")
        self.vocab = self._load_vocab()
        self.titles = self._load_titles()
        self._function = self._load_function()
        self._weights = jax.device_put(self._load_weights())
        self._call = jax.jit(self._function.call)

    def encode(
        self, user_history: list[int | str], history_time: list[int] | None = None, time: int | None = None
    ) -> features.Encoded:
        """The feature code of this bundle for one user's item ids, oldest first, their times and that of the question.

        Raises `RequestError` when the model reads times that are not given.
        """
        if self.times != "none" and history_time is None:
            raise RequestError(
                "history_time is missing",
                where="body",
                expected=f"the seconds since 1970 of each event: {self.name} reads them",
            )
        return features.encode_history(
            user_history, self.vocab, self.history_length, history_time=history_time, time=time
        )

    def recommend(
        self, history_ids: np.ndarray, seen_ids: np.ndarray, *times: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [b, max_k] and rows int32 [b, max_k], best first, for int32 [b, l] and [b, n] (0 is padding).

        `times` int32, as `times` of the manifest says: none, those of the events [b, l], also the question's [b]. Row
        0 with score -inf stands where no item is left. Every new (b, n) compiles once.
        """
        scores, rows = self._call(self._weights, history_ids, seen_ids, *times)
        return np.asarray(scores), np.asarray(rows)

    def _check_features(self) -> None:
        schema = schema_of(self.manifest["history_length"], self.manifest["max_k"], self.manifest.get("times", "none"))
        found = self.manifest["schema"]
        if found != schema or self.manifest["schema_hash"] != hash_of(schema):
            raise BundleError(
                f"the bundle was made for feature code {found.get('features')} and arguments {found.get('arguments')}",
                where=str(self.path),
                expected=f"{schema['features']} and {schema['arguments']}",
                mend=REMAKE,
            )

    def _load_vocab(self) -> ItemVocab:
        try:
            vocab = ItemVocab.load(self.path / VOCABULARY_FILE)
        except ExamplesError as error:
            raise BundleError(error.what, where=error.where, expected=error.expected, mend=REMAKE) from error
        if vocab.hash != self.manifest["vocabulary_hash"]:
            raise BundleError(
                f"the vocabulary has hash {vocab.hash}",
                where=str(self.path / VOCABULARY_FILE),
                expected=f"{self.manifest['vocabulary_hash']}, the vocabulary of the weights",
                mend=REMAKE,
            )
        return vocab

    def _load_titles(self) -> list[str | None]:
        titles = json.loads((self.path / TITLES_FILE).read_text(encoding="utf-8"))
        if len(titles) != self.vocab.num_rows:
            raise BundleError(
                f"there are {len(titles)} titles",
                where=str(self.path / TITLES_FILE),
                expected=f"{self.vocab.num_rows}, one for each row of the vocabulary",
                mend=REMAKE,
            )
        return titles

    def _load_function(self) -> jax.export.Exported:
        file = self.path / FUNCTION_FILE
        try:
            function = jax.export.deserialize(bytearray(file.read_bytes()))
            function.mlir_module()  # a newer jax writes operations that an older one knows nothing of
        except Exception as error:  # jax raises many kinds for bytes of another version
            made, here = self.manifest["jax_version"], jax.__version__
            raise BundleError(
                f"jax {here} cannot read a function made by jax {made}: {error}",
                where=str(file),
                mend=f"serve with jax {made} or up to six months newer, or export again with jax {here}",
            ) from error
        platform = jax.export.default_export_platform()
        if platform not in function.platforms:
            raise BundleError(
                f"the bundle does not run on {platform}",
                where=str(self.path),
                expected=f"one of: {', '.join(function.platforms)}",
                mend="set JAX_PLATFORMS to one of these, or export again",
            )
        return function

    def _load_weights(self) -> dict[str, np.ndarray]:
        file = self.path / WEIGHTS_FILE
        try:
            weights = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise BundleError(f"cannot read the weights: {error}", where=str(file), mend=REMAKE) from error
        found, wanted = shapes_of(weights), self.manifest["weights"]
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if odd:
            raise BundleError(f"weights do not fit the function: {', '.join(odd[:5])}", where=str(file), mend=REMAKE)
        return weights


def shapes_of(weights: dict[str, Any]) -> dict[str, str]:
    """Name -> dtype and shape, as the manifest records them."""
    return {name: f"{array.dtype} {list(array.shape)}" for name, array in weights.items()}


def schema_of(history_length: int, max_k: int, times: str) -> dict[str, Any]:
    """What the exported function takes and gives and which feature code makes it; the manifest carries its hash."""
    more = {
        "none": {},
        "history": {"history_time": f"int32 [b, {history_length}]"},
        "target": {"history_time": f"int32 [b, {history_length}]", "query_time": "int32 [b]"},
    }[times]
    return {
        "features": {"name": features.NAME, "version": features.VERSION},
        "arguments": {
            "weights": "safetensors by name",
            "history_ids": f"int32 [b, {history_length}]",
            "seen_ids": "int32 [b, n]",
            **more,
        },
        "results": {"scores": f"float32 [b, {max_k}]", "rows": f"int32 [b, {max_k}]"},
    }
