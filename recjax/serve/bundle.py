"""An exported bundle: the folder that `recjax export` writes and a server loads.

    manifest.json         format, versions, hashes, schema, where it comes from; checksums of the other files
    recommend.jaxexport   the model and the search as one serialised jax.export function (StableHLO)
    filtered.jaxexport    the same, told which items may come out
    weights.safetensors   what these functions take as their first argument, by name
    vocabulary.json       item ids <-> rows
    titles.json           a title or null for every row
    spelling.npy          int32 [rows, L]: the tokens of every item, where an item takes several
    text.model            the text vocabulary, where the model answers queries
    facets.json           facet -> a value, several or null for every row, where items can be filtered
    users.json            sample users, where asked for: {"history": [item ids]}, and times where the model reads them

Loading needs jax and numpy, for text sentencepiece, and none of the training code. It refuses whatever
does not fit together: missing or altered files, another format, other feature code, another vocabulary or spelling
than the weights were trained with, a platform the functions were not lowered for. It never falls back to something
else.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import numpy as np

from recjax.core.errors import BundleError, ExamplesError, RequestError
from recjax.data.vocab import ItemVocab
from recjax.serve import features
from recjax.serve.facets import Facets, Filter
from recjax.serve.stored import REMAKE, Stored, check_hash

FUNCTION, FILTERED = "recommend", "filtered"
FUNCTION_FILE = "recommend.jaxexport"
FILTERED_FILE = "filtered.jaxexport"
VOCABULARY_FILE = "vocabulary.json"
TITLES_FILE = "titles.json"
SPELLING_FILE = "spelling.npy"
FACETS_FILE = "facets.json"
USERS_FILE = "users.json"


class Bundle(Stored):
    """A loaded bundle that recommends or searches."""

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        """As `Stored`."""
        super().__init__(path, verify=verify)
        told = self.manifest
        self.max_k: int = told["max_k"]
        self.history_length: int = told["history_length"]
        self.prompt_length: int = told.get("prompt_length", self.history_length)
        self.times: str = told.get("times", "none")
        is_spelled, is_filtered = "prompt_length" in told, FILTERED in told["functions"]
        self.check_schema(
            schema_of(self.prompt_length, self.max_k, self.times, tokens=is_spelled, filtered=is_filtered)
        )
        # What it was trained to answer; a bundle of before it could search says nothing of it.
        self.recommends: bool = told.get("recommends", True)
        self.vocab = self._load_vocab()
        self.titles = self._by_row("titles", self._read_json(TITLES_FILE))
        self.spelling = self._load_spelling()
        self.texts = self._load_texts()
        self.facets = self._load_facets()
        self.users: list[dict[str, Any]] = self._read_json(USERS_FILE) if self._has(USERS_FILE) else []
        self._calls = {name: self.load_call(file) for name, file in told["functions"].items()}
        self._weights = self.load_weights()

    @property
    def searches(self) -> bool:
        """Whether it answers queries."""
        return self.texts is not None

    @property
    def filters(self) -> bool:
        """Whether there is anything to filter by."""
        return bool(self.facets.shown())

    def facts(self) -> dict[str, Any]:
        """What is said of it to callers."""
        told = ("max_k", "history_length", "num_items", "vocabulary_hash", "schema_hash")
        return {
            **super().facts(),
            **{name: self.manifest[name] for name in told},
            "recommends": self.recommends,
            "searches": self.searches,
            "facets": self.facets.shown(),
            "sample_users": len(self.users),
        }

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
            user_history,
            self.vocab,
            self.history_length,
            spelling=self.spelling,
            history_time=history_time,
            time=time,
        )

    def encode_query(self, query: str) -> features.Encoded:
        """The feature code of this bundle for one query.

        Raises `RequestError` when the model knows no text, or finds nothing in the query.
        """
        if self.texts is None:
            raise RequestError(
                f"{self.name} does not search", where="model", expected="a model that was trained with a search task"
            )
        encoded = features.encode_query(query, self.texts)
        if not encoded.is_known:
            raise RequestError("the query is empty", where="query", expected="text with at least one character")
        return encoded

    def allowed(self, wanted: Filter) -> np.ndarray | None:
        """bool [rows]: the items that a filter leaves; None where it asks nothing.

        Raises `RequestError` for a facet or value that the catalogue does not have.
        """
        return self.facets.allowed(wanted)

    def recommend(
        self, history_ids: np.ndarray, seen_ids: np.ndarray, *times: np.ndarray, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [b, max_k] and rows int32 [b, max_k], best first.

        For prompts int32 [b, prompt_length] as `encode` makes them and seen item rows [b, n] (0 is padding). `times`
        int32, as `times` of the manifest says: none, those of the events [b, l], also the question's [b]. `allowed`
        bool [b, rows] are the items that may come out. Row 0 with score -inf stands where no item is left. Every new
        (b, n) compiles once, with and without `allowed`.
        """
        if allowed is None:
            scores, rows = self._calls[FUNCTION](self._weights, history_ids, seen_ids, *times)
        else:
            scores, rows = self._calls[FILTERED](self._weights, history_ids, seen_ids, *times, allowed)
        return np.asarray(scores), np.asarray(rows)

    def _load_vocab(self) -> ItemVocab:
        try:
            vocab = ItemVocab.load(self.path / VOCABULARY_FILE)
        except ExamplesError as error:
            raise BundleError(error.what, where=error.where, expected=error.expected, mend=REMAKE) from error
        check_hash("the vocabulary", vocab.hash, self.manifest["vocabulary_hash"], where=self.path / VOCABULARY_FILE)
        return vocab

    def _has(self, file: str) -> bool:
        return file in self.manifest["files"]

    def _read_json(self, file: str) -> Any:
        return json.loads((self.path / file).read_text(encoding="utf-8"))

    def _by_row(self, what: str, values: Any) -> list[Any]:
        if len(values) != self.vocab.num_rows:
            raise BundleError(
                f"there are {len(values)} {what}",
                where=str(self.path),
                expected=f"{self.vocab.num_rows}, one for each row of the vocabulary",
                mend=REMAKE,
            )
        return values

    def _load_spelling(self) -> np.ndarray | None:
        if "spelling" not in self.manifest:
            return None
        file = self.path / SPELLING_FILE
        try:
            spelling = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot read the spelling: {error}", where=str(file), mend=REMAKE) from error
        check_hash("the spelling", spelling_hash(spelling), self.manifest["spelling"]["hash"], where=file)
        return spelling

    def _load_texts(self) -> features.Texts | None:
        told = self.manifest.get("text")
        if told is None:
            return None
        return features.Texts(
            vocab=self.load_tokenizer(), start=told["start"], length=told["length"], prompt=told["prompt"]
        )

    def _load_facets(self) -> Facets:
        if not self._has(FACETS_FILE):
            return Facets({})
        found = self._read_json(FACETS_FILE)
        return Facets({name: self._by_row(f"values of {name}", values) for name, values in found.items()})


def spelling_hash(spelling: np.ndarray) -> str:
    """16 hexadecimal digits of what items are spelled with."""
    digest = hashlib.sha256(repr(spelling.shape).encode())
    digest.update(np.ascontiguousarray(spelling, "<i4").tobytes())
    return digest.hexdigest()[:16]


def schema_of(
    prompt_length: int, max_k: int, times: str, *, tokens: bool = False, filtered: bool = False
) -> dict[str, Any]:
    """What the exported functions take and give and which feature code makes it; the manifest carries its hash.

    `tokens` says that prompts are spelled, `filtered` that there is a function that is told which items are allowed.
    """
    more = {
        "none": {},
        "history": {"history_time": f"int32 [b, {prompt_length}]"},
        "target": {"history_time": f"int32 [b, {prompt_length}]", "query_time": "int32 [b]"},
    }[times]
    return {
        "features": {"name": features.TOKENS if tokens else features.NAME, "version": features.VERSION},
        "arguments": {
            "weights": "safetensors by name",
            "history_ids": f"int32 [b, {prompt_length}]",
            "seen_ids": "int32 [b, n]",
            **more,
        },
        **({"filtered": {"allowed": "bool [b, rows of the vocabulary]"}} if filtered else {}),
        "results": {"scores": f"float32 [b, {max_k}]", "rows": f"int32 [b, {max_k}]"},
    }
