"""An exported ranker: the folder that `recjax export` writes for a model of rows with fields.

    manifest.json         "kind": "rank", heads with their calibrations, columns, hashes; checksums of the other files
    rank.jaxexport        the fields of rows -> a logit of each head, for any number of rows
    candidates.jaxexport  the same of the candidates of one request, told once of the fields that are alike for all of
                          them; not there where the model reads domains
    weights.safetensors   what the function takes as its first argument, by name
    features.json, .npz   what turns a request into fields: the very object that training used (`data.ranker_features`)
    probe.json            some rows and the bytes their fields had when the bundle was made

Loading needs jax, numpy and safetensors, and none of the training code. It refuses what does not fit together: fields
other than those of the weights, and feature code that encodes the probe to other bytes than it did at export.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recjax.core.errors import BundleError, ExamplesError, RequestError
from recjax.data.ranker_features import RankerFeatures, owners
from recjax.data.raw import Raw
from recjax.serve.rank_request import MAX_CANDIDATES, Columns, RankQuestion
from recjax.serve.stored import REMAKE, Stored, check_hash

FUNCTION_FILE, CANDIDATES_FILE, PROBE_FILE = "rank.jaxexport", "candidates.jaxexport", "probe.json"
DOMAIN = "domain"
# Rows of one call are filled up to one of these, so that a server compiles a handful of programs.
SIZES = (16, 32, 64, 128, 256, 512, 1024)
assert SIZES[-1] >= MAX_CANDIDATES


class RankBundle(Stored):
    """A loaded bundle that ranks rows; to be called by one thread at a time."""

    kind = "rank"

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        """As `Stored`."""
        super().__init__(path, verify=verify)
        told = self.manifest
        self.heads: dict[str, Mapping[str, Any]] = {head["name"]: head for head in told["heads"]}
        self.domains: Mapping[str, Any] | None = told["domains"]
        self.alike: tuple[str, ...] = tuple(told["schema"].get("alike", ()))
        self.features = self._load_features()
        kinds = {**self.features.kinds, **({self.domains["column"]: "value"} if self.domains else {})}
        self.columns = Columns(kinds)
        self._check_probe()
        self._weights, self._call = self.load_weights(), self.load_call(FUNCTION_FILE)
        self._call_alike = self.load_call(CANDIDATES_FILE) if self.alike else None

    def facts(self) -> dict[str, Any]:
        """What is said of it to callers: heads, the columns that are read, and which of them the log remembers."""
        heads = {
            name: {fact: head[fact] for fact in ("rule", "rate", "form") if fact in head}
            for name, head in self.heads.items()
        }
        return {
            **super().facts(),
            "ranks": True,
            "heads": heads,
            "columns": dict(self.columns.kinds),
            "remembered": {name: list(on) for name, on in self.features.remembered.items()},
            "log": self.manifest.get("log"),
        }

    def check(self, asked: RankQuestion) -> None:
        """Raises `RequestError` for columns, a head or a number of answers that the model does not have."""
        self.columns.check(asked)
        if asked.head and asked.head not in self.heads:
            raise RequestError("there is no such head", where="head", expected="one of: " + ", ".join(self.heads))

    def fields(self, asked: Sequence[RankQuestion]) -> dict[str, np.ndarray]:
        """What the function takes besides the weights, for the rows of all questions one after the other."""
        requests = [(one.context, one.candidates) for one in asked]
        if self.domains is None:
            return self.features.fields_of(requests)
        complete = self.features.complete(self.features.rows_of(requests, more=(self.domains["column"],)))
        return {**self.features.encoder.encode(complete), DOMAIN: domain_of(complete, self.domains)}

    def answer(self, asked: Sequence[RankQuestion]) -> np.ndarray:
        """float32 [n, heads]: the logits of the candidates of all questions, one after the other.

        Where candidates are many and differ in nothing but their item, and what goes by it, what they have alike is
        encoded and computed once for a question; else they are rows like any others.
        """
        requests = [(one.context, one.candidates) for one in asked]
        alike = self.features.alike(name for one in asked for row in one.candidates for name in row)
        owner = owners(requests)
        is_few = len(owner) < SIZES[0] * len(asked)
        if self._call_alike is None or is_few or not {*self.alike} <= {*alike}:
            return self.logits(self.fields(asked))
        contexts, rows = self.features.parts_of(requests)
        rows |= {name: x[owner] for name, x in contexts.items() if name not in self.alike}
        found = []
        for at in range(len(asked)):
            mine = np.flatnonzero(owner == at)
            context = {name: contexts[name][at : at + 1] for name in self.alike}
            padded = {name: _filled(x[mine], _size(len(mine))) for name, x in rows.items()}
            found.append(np.asarray(self._call_alike(self._weights, context, padded))[: len(mine)])
        return np.concatenate(found)

    def logits(self, fields: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 [n, heads]: what the model says of rows, uncalibrated."""
        count = len(next(iter(fields.values())))
        found = []
        for start in range(0, count, SIZES[-1]):
            part = min(count - start, SIZES[-1])
            padded = {name: _filled(x[start : start + part], _size(part)) for name, x in fields.items()}
            found.append(np.asarray(self._call(self._weights, padded))[:part])
        return np.concatenate(found)

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """float64 [n, heads]: what each head says in words of its label.

        A probability is sigmoid(logit / temperature + bias); of a head of numbers ("form") it is the number, exp(z) - 1
        of at least 0 ("log1p") or exp(z) ("poisson").
        """
        found = np.empty(logits.shape, np.float64)
        for column, head in enumerate(self.heads.values()):
            z = logits[:, column].astype(np.float64)
            if form := head.get("form"):
                found[:, column] = np.exp(z) if form == "poisson" else np.maximum(np.expm1(z), 0)
            else:
                found[:, column] = np.exp(-np.logaddexp(0.0, -(z / head["temperature"] + head["bias"])))
        return found

    def warm_up(self) -> int:
        """Compile every shape; returns how many."""
        for size in SIZES:
            rows = RankQuestion(candidates=[{}] * size)
            self.logits(self.fields([rows]))
            self.answer([rows])
        return len(SIZES) * (2 if self.alike else 1)

    def _load_features(self) -> RankerFeatures:
        try:
            features = RankerFeatures.load(self.path)
        except ExamplesError as error:
            raise BundleError(error.what, where=error.where, expected=error.expected, mend=REMAKE) from error
        check_hash("the set of fields", features.hash, self.manifest["features_hash"], where=self.path)
        check_hash("the encoder", features.encoder.hash, self.manifest["encoder_hash"], where=self.path)
        self.check_schema(schema_of(features, tuple(self.heads), self.domains, self.alike))
        return features

    def _check_probe(self) -> None:
        told = json.loads((self.path / PROBE_FILE).read_text(encoding="utf-8"))
        fields = self.features.rows(told["rows"])
        odd = [name for name, digest in told["digests"].items() if digest_of(fields[name]) != digest]
        if odd:
            raise BundleError(
                f"the feature code here makes other bytes of {', '.join(odd[:5])} than that of the export",
                where=str(self.path / PROBE_FILE),
                mend=f"serve with recjax {self.manifest['recjax_version']}, or export again with this version",
            )


def schema_of(
    features: RankerFeatures, heads: Sequence[str], domains: Mapping[str, Any] | None, alike: Sequence[str] = ()
) -> dict[str, Any]:
    """What the exported functions take and give; the manifest carries its hash. Of the fields that are `alike` for all
    candidates that of candidates takes those of one context, [1, ...]."""
    arguments = {}
    for shape in features.encoder.shapes:
        dtype = "float32" if shape.kind in ("numeric", "vector") else "int32"
        arguments[f"field/{shape.name}"] = f"{dtype} [b, {shape.width}]" if shape.width else f"{dtype} [b]"
    more = {DOMAIN: "int32 [b]"} if domains else {}
    return {
        "arguments": {"weights": "safetensors by name", **arguments, **more},
        "results": {"logits": f"float32 [b, {len(heads)}]", "heads": list(heads)},
        **({"alike": list(alike)} if alike else {}),
    }


def alike_of(features: RankerFeatures, item: str) -> tuple[str, ...]:
    """The fields that are alike for candidates that say nothing but their `item`; none where no field is their own."""
    alike = features.alike((item,))
    return alike if len(alike) < len(features.encoder.shapes) else ()


def probe_of(features: RankerFeatures) -> dict[str, Any]:
    """Rows of known, unknown and missing values, and a digest of each field's bytes for them."""
    known: dict[str, list[Any]] = {}
    for field in features.encoder.told()["fields"]:
        codings = [field["one"]] if "one" in field else field.get("many", [])
        texts = [text for coding in codings for text in coding.get("vocabulary", [])[:4]]
        for name in field["columns"]:
            known.setdefault(name, []).extend(texts)
    for side in features.sides:
        known.setdefault(side.key, []).extend(side.ids[:4])
    rows: list[dict[str, Any]] = [{}]
    for at in range(6):
        row: dict[str, Any] = {}
        for place, name in enumerate(features.asked):
            if features.kinds[name] == "number":
                row[name] = (at - 2) * 1.75 * 10 ** (place % 4)
            else:
                texts = known.get(name) or []
                row[name] = texts[(at + place) % len(texts)] if texts and at < 4 else f"Some Text {at}|{place}"
        rows.append(row)
    fields = features.rows(rows)
    return {"rows": rows, "digests": {name: digest_of(values) for name, values in fields.items()}}


def digest_of(values: np.ndarray) -> str:
    """16 hexadecimal digits of dtype, shape and bytes."""
    told = f"{values.dtype.str} {values.shape}".encode()
    return hashlib.sha256(told + np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def domain_of(complete: Mapping[str, Raw], domains: Mapping[str, Any]) -> np.ndarray:
    """int32 [n]: the number of each row's domain; that after all others where it has none of training."""
    column = complete[domains["column"]]
    codes, texts = column.keys
    names = {name: number for number, name in enumerate(domains["names"])}
    numbers = np.array([names.get(text, len(names)) for text in texts], np.int32)
    return np.where(column.missing, len(names), numbers[codes]).astype(np.int32)


def _size(count: int) -> int:
    """Rows of the program that takes so many."""
    return next(size for size in SIZES if size >= count)


def _filled(values: np.ndarray, size: int) -> np.ndarray:
    """`size` rows, of which the last are zero."""
    if len(values) == size:
        return values
    out = np.zeros((size, *values.shape[1:]), values.dtype)
    out[: len(values)] = values
    return out
