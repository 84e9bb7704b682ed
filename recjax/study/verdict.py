"""What a study comes to, in sentences that follow from its numbers alone."""

from __future__ import annotations

from recjax.study.findings import Findings
from recjax.study.grid import Study

GOOD_ERROR = 0.015
LEAST_EXPONENT = 0.02


def verdict(study: Study, found: Findings) -> list[str]:
    """One sentence for every claim that can be judged so far."""
    said = []
    if len(found.fitted) > 1:
        is_so = "falls with every larger size" if found.is_monotone() else "does NOT fall with every larger size"
        said.append(f"Loss {is_so} at the tuned learning rate.")
    left_out = [name for name, one in found.converged.items() if not one.is_converged]
    if left_out:
        what = "left out of the fit" if study.only_converged else "in the fit all the same"
        said.append(f"Not converged by the rule (change below {study.tolerance:.1%}): {', '.join(left_out)}; {what}.")
    edges = [name for name in found.rates.best if found.rates.is_at_the_edge(name)]
    if edges:
        said.append(
            f"The best learning rate is at the edge of the sweep for {', '.join(edges)}: a better may lie beyond."
        )
    said += _of_laws(found)
    for one in found.verified:
        error, is_good = one["relative_error"], abs(one["relative_error"]) < GOOD_ERROR
        beats = abs(error) < abs(one["naive_error"])
        said.append(
            f"{one['size']} (N = {one['parameters']:,}): predicted {one['loss']:.4f}, measured {one['measured']:.4f}, "
            f"error {error:+.2%} ({'within' if is_good else 'NOT within'} {GOOD_ERROR:.1%}); the 90% interval "
            f"{'covers' if one['is_covered'] else 'does NOT cover'} it; "
            f"{'better' if beats else 'NOT better'} than the last fitted loss ({one['naive_error']:+.2%})."
        )
    if study.held_out and not found.verified:
        said.append("The held-out size has not been trained yet.")
    if found.allocation is not None:
        a = found.allocation
        said.append(
            f"Over {a.budgets} budgets N_opt ~ C^{a.p:.2f} [{a.p_interval[0]:.2f}, {a.p_interval[1]:.2f}] and "
            f"D_opt ~ C^{a.q:.2f} [{a.q_interval[0]:.2f}, {a.q_interval[1]:.2f}] (90%)."
        )
    elif found.isoflops:
        said.append("Too few budgets have their best size between the smallest and the largest one for an exponent.")
    return said or ["Nothing can be said yet."]


def _of_laws(found: Findings) -> list[str]:
    said = []
    for name, draw in found.of_n.items():
        low, high = draw.intervals()["a"]
        value = draw.fit.values["a"]
        is_law = value > LEAST_EXPONENT and low > 0
        chosen = ", the law chosen" if found.law is not None and found.law.name == name else ""
        said.append(
            f"{draw.fit.law.formula}{chosen}: exponent {value:.3f} [{low:.3f}, {high:.3f}], "
            f"{'above' if is_law else 'NOT above'} {LEAST_EXPONENT} with an interval {'off' if low > 0 else 'on'} zero."
        )
        if name == "power" and not draw.has_floor():
            bounds = draw.intervals()["E"]
            said.append(
                f"The asymptote E is not identifiable over these sizes: anything from {bounds[0]:.2f} to "
                f"{bounds[1]:.2f} nats goes with them."
            )
    return said
