"""Whether a method computes what it is timed for: its gradients against float64, before any time is reported.

The yardstick is the naive method in the same dtype on the same inputs: rounding explains what it does too. A scale
off by one per cent, a dropped chunk or a wrong sign is beyond it; and a peer that is called wrongly is our error.
"""

from __future__ import annotations

from dataclasses import dataclass

from aapo_fast.bench import methods
from aapo_fast.bench.inputs import Problem
from aapo_fast.bench.method import Method, Run
from aapo_fast.bench.truth import Errors, Truth, gradient_errors, truth, vector_errors

LOW_PRECISION = ("float16", "bfloat16")

ERROR_LIMIT, ERROR_LIMIT_LOW = 5e-3, 5e-2
"""Of a gradient's relative error, in single and in low precision."""

BIAS_LIMIT, BIAS_LIMIT_LOW = 5e-3, 2e-2

LOGPS_LIMIT, LOGPS_LIMIT_LOW = 1e-3, 5e-2
"""Root mean square in nats."""

TIMES_NAIVE = 3.0


@dataclass(frozen=True, eq=False)
class Yardstick:
    """A problem, its truths with and without weights, and the errors of the naive method."""

    problem: Problem
    weighted: Truth
    plain: Truth | None
    naive: dict[str, Errors]

    def truth_for(self, method: Method) -> Truth:
        if method.weighted:
            return self.weighted
        assert self.plain is not None
        return self.plain


def make_yardstick(problem: Problem, contenders: list[Method]) -> Yardstick:
    """The truths that the contenders need. Raises what the naive method raises, out of memory for example."""
    plain = truth(problem, weighted=False) if any(not m.weighted for m in contenders) else None
    weighted = truth(problem)
    naive = errors_of(methods.NAIVE.build(problem), problem, weighted)
    return Yardstick(problem, weighted, plain, naive)


def errors_of(run: Run, problem: Problem, true: Truth) -> dict[str, Errors]:
    """Run once and compare everything it gives; gradients are cleared afterwards."""
    problem.clear_gradients()
    out = run()
    if problem.hidden.grad is None or problem.weight.grad is None:
        raise RuntimeError("left no gradient")
    errors = {
        "d_hidden": gradient_errors(problem.hidden.grad, true.d_hidden),
        "d_weight": gradient_errors(problem.weight.grad, true.d_weight),
    }
    if out.logps is not None:
        errors["logps"] = vector_errors(out.logps, true.logps)
    if out.entropy is not None:
        errors["entropy"] = vector_errors(out.entropy, true.entropy)
    problem.clear_gradients()
    return errors


def complaint(method: Method, errors: dict[str, Errors], naive: dict[str, Errors], dtype: str) -> str:
    """What rounding does not explain, in words; empty if there is nothing."""
    low = dtype in LOW_PRECISION
    for name in ("d_hidden", "d_weight"):
        found, usual = errors[name], naive[name]
        limits = {
            "error": ERROR_LIMIT_LOW if low else ERROR_LIMIT,
            "bias": BIAS_LIMIT_LOW if low else BIAS_LIMIT,
        }
        if method.sampled:
            limits = {"bias": max(limits["bias"], found["error"] / 10)}
        for measure, limit in limits.items():
            if not abs(found[measure]) <= max(limit, TIMES_NAIVE * abs(usual[measure])):  # NaN is wrong too
                return f"{name}: {measure} {found[measure]:+.1e}, naive {usual[measure]:+.1e}"
    if "logps" in errors:
        rms, limit = errors["logps"]["rms"], LOGPS_LIMIT_LOW if low else LOGPS_LIMIT
        if not rms <= max(limit, TIMES_NAIVE * naive["logps"]["rms"]):
            return f"logps: rms {rms:.1e} nats, naive {naive['logps']['rms']:.1e}"
    return ""
