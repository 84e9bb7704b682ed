"""The prediction of larger models, written down and hashed before they may be trained, and its verification.

A prediction is a dated file that is never written twice, refused once any cell of a held-out size has begun, and
names every cell that it rests on with a hash of their results. The runner trains no held-out size without it. The
rate, the law and the interval are chosen by rules that are in the file; nobody chooses after the fact.

Law: of E + (N0/N)^a and (N0/N)^a, the one that predicts the largest fitted size better from the smaller ones.
Interval: the hull of the 90% intervals of both laws, because which of them is right is not known either.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recjax.core.errors import ConfigError
from recjax.study.fit import COVERAGE, Bootstrap, bootstrap, fit, stated
from recjax.study.grid import Size
from recjax.study.laws import POWER, PURE, Law
from recjax.study.ledger import Finished, Ledger, digest
from recjax.study.rates import RULE

LAWS = {"power": POWER, "pure": PURE}


def choose_law(found: Sequence[Finished], split: str, wanted: str = "") -> tuple[Law, dict[str, float]]:
    """The law, and the relative error of each in predicting the largest size from the others ({} when impossible)."""
    largest = max(one.parameters for one in found)
    rest = [one for one in found if one.parameters < largest]
    errors: dict[str, float] = {}
    target = float(np.mean([one.loss(split) for one in found if one.parameters == largest]))
    for name, law in LAWS.items():
        if len({one.parameters for one in rest}) >= law.parameters:
            guess = fit(law, *points(rest, split)).predict([largest])[0]
            errors[name] = abs(float(guess) - target) / target
    usable = [name for name, law in LAWS.items() if len({one.parameters for one in found}) > law.parameters]
    if not usable:
        raise ConfigError(
            f"{len({one.parameters for one in found})} sizes are too few for a law",
            expected="three converged sizes, better five or more",
        )
    if wanted:
        return LAWS[wanted], errors
    judged = {name: error for name, error in errors.items() if name in usable}
    best = min(judged, key=lambda name: judged[name]) if len(judged) == len(LAWS) else usable[-1]
    return LAWS[best], errors


def points(found: Sequence[Finished], split: str) -> tuple[np.ndarray, np.ndarray]:
    """N [n] and loss [n] of finished cells."""
    return np.array([float(one.parameters) for one in found]), np.array([one.loss(split) for one in found])


def bootstraps(found: Sequence[Finished], split: str, samples: int) -> dict[str, Bootstrap]:
    """Every law that there are enough sizes for."""
    n, loss = points(found, split)
    usable = {name: law for name, law in LAWS.items() if len(np.unique(n)) > law.parameters}
    return {name: bootstrap(fit(law, n, loss), samples=samples) for name, law in usable.items()}


def existing(workdir: Path) -> Path | None:
    """The prediction of the study, if there is one."""
    found = sorted(workdir.glob("prediction-*.json"))
    return found[0] if found else None


def write(
    workdir: Path,
    found: Sequence[Finished],
    held_out: Sequence[tuple[Size, float, Sequence[Path]]],
    *,
    split: str,
    law: str = "",
    samples: int = 1000,
) -> Path:
    """Predict the held-out sizes, each with its learning rate and the folders of its runs, from finished cells.

    Raises `ConfigError` when there is a prediction already or when a held-out run has begun.
    """
    before = existing(workdir)
    if before is not None:
        raise ConfigError("there is a prediction already", where=str(before), mend="start a new study to predict again")
    for size, _, folders in held_out:
        begun = [folder for folder in folders if folder.exists()]
        if begun:
            raise ConfigError(
                f"{size.name} cannot be predicted any more: it has been run",
                where=str(begun[0]),
                expected="a prediction before the run",
            )
    if not held_out:
        raise ConfigError("nothing is held out", where="Study.held_out", expected="a larger size")
    chosen, errors = choose_law(found, split, law)
    draws = bootstraps(found, split, samples)
    last = max(found, key=lambda one: one.parameters)
    now = datetime.datetime.now(datetime.UTC)
    content = {
        "written": now.isoformat(timespec="seconds"),
        "law": chosen.name,
        "formula": chosen.formula,
        "law_rule": "set by Study.law" if law else "smaller error on the largest fitted size, from the others",
        "error_on_the_largest_fitted": errors,
        "interval_rule": f"hull of the central {COVERAGE:.0%} of {' and '.join(draws)}, {samples} refits each",
        "learning_rate_rule": RULE,
        "split": split,
        "parameters": {name: stated(draw) for name, draw in draws.items()},
        "cells": sorted(one.key for one in found),
        "inputs_sha256": digest(found),
        "predictions": [
            {
                "size": size.name,
                "parameters": size.parameters,
                "learning_rate": rate,
                **_predicted(draws, chosen, size),
                "naive": float(np.mean([one.loss(split) for one in found if one.parameters == last.parameters])),
            }
            for size, rate, _ in held_out
        ],
    }
    path = workdir / f"prediction-{now.date().isoformat()}.json"
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.link(beside, path)  # unlike a rename, fails when another process was first
    beside.unlink()
    return path


def read(path: Path, ledger: Ledger) -> dict[str, Any]:
    """A prediction; raises `ConfigError` when the results it rests on are not those that were predicted from."""
    content = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in content["cells"] if key not in ledger]
    if missing or digest([ledger[key] for key in content["cells"]]) != content["inputs_sha256"]:
        raise ConfigError(
            "the cells that the prediction rests on have changed since",
            where=str(path),
            expected=f"inputs with the hash {content['inputs_sha256'][:12]}",
            mend="bring back cells.jsonl as it was, or start a new study",
        )
    return content


def verify(content: Mapping[str, Any], held_out: Sequence[Finished]) -> list[dict[str, Any]]:
    """Predicted beside measured, for every held-out size that is finished."""
    out = []
    for one in content["predictions"]:
        losses = [run.loss(content["split"]) for run in held_out if run.parameters == one["parameters"]]
        if not losses:
            continue
        measured = float(np.mean(losses))
        out.append(
            {
                **one,
                "measured": measured,
                "runs": len(losses),
                "relative_error": (one["loss"] - measured) / measured,
                "is_covered": one["low"] <= measured <= one["high"],
                "naive_error": (one["naive"] - measured) / measured,
            }
        )
    return out


def _predicted(draws: Mapping[str, Bootstrap], chosen: Law, size: Size) -> dict[str, float]:
    bounds = [draw.prediction([size.parameters]) for draw in draws.values()]
    return {
        "loss": float(draws[chosen.name].fit.predict([size.parameters])[0]),
        "low": min(float(low[0]) for low, _ in bounds),
        "high": max(float(high[0]) for _, high in bounds),
    }
