"""Contestants that need torch alone: floors, materialised logits, PyTorch's own op, ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import aapo_fast as af
from aapo_fast.bench.inputs import Problem, soft_capped
from aapo_fast.bench.method import Outputs, Run, needs, weighted_loss
from aapo_fast.objectives import Objective
from aapo_fast.ops import dispatch

FLOOR_BLOCK_BYTES = 4 * 2**30
"""Bare products go in even blocks of rows whose logits take at most this much."""


# --- floors and the plain way ----------------------------------------------------------------------------------------


def bare_products(count: int) -> Callable[[Problem], Run]:
    """The matrix products alone, in the operands' dtype, into buffers made beforehand: what no dense method beats."""

    def build(problem: Problem) -> Run:
        x, w = problem.hidden.detach(), problem.weight.detach()
        most = max(1, FLOOR_BLOCK_BYTES // (w.shape[0] * w.dtype.itemsize))
        num_blocks = -(-x.shape[0] // most)
        size = -(-x.shape[0] // num_blocks)
        z = w.new_empty(size, w.shape[0])
        dx, dw = (torch.empty_like(x), torch.empty_like(w)) if count == 3 else (None, None)

        def run() -> Outputs:
            for start in range(0, x.shape[0], size):
                block = x[start : start + size]
                logits = torch.mm(block, w.t(), out=z[: block.shape[0]])
                if dx is not None and dw is not None:
                    torch.mm(logits, w, out=dx[start : start + size])
                    torch.addmm(dw, logits.t(), block, beta=float(start > 0), out=dw)
            return Outputs()

        return run

    return build


def naive(problem: Problem) -> Run:
    """Logits materialised in the operands' dtype, log-softmax in fp32, autograd."""

    def run() -> Outputs:
        z = soft_capped(problem.hidden @ problem.weight.t(), problem.softcap)
        logps = F.log_softmax(z, -1, dtype=torch.promote_types(z.dtype, torch.float32))
        logps = logps.gather(1, problem.targets[:, None]).squeeze(1)
        weighted_loss(problem, logps).backward()
        return Outputs(logps.detach())

    return run


# --- PyTorch's linear_cross_entropy ----------------------------------------------------------------------------------


def torch_cross_entropy(chunked: bool, weighted: bool) -> Callable[[Problem], Run]:
    """Chunks of 2048 rows on CUDA and 1024 on a CPU: its own heuristics pick very few rows at large vocabularies."""

    def build(problem: Problem) -> Run:
        needs(hasattr(F, "linear_cross_entropy"), f"torch {torch.__version__} has no linear_cross_entropy")
        needs(problem.softcap is None, "has no soft-cap")
        options = {}
        if chunked:
            from_nn = getattr(torch.nn, "LinearCrossEntropyOptions", None)
            needs(from_nn is not None, f"torch {torch.__version__} has no chunked linear_cross_entropy")
            assert from_nn is not None
            options["options"] = from_nn(batch_chunk_size=2048 if problem.hidden.is_cuda else 1024)

        def run() -> Outputs:
            reduction = "none" if weighted else "mean"
            loss = F.linear_cross_entropy(
                problem.hidden, problem.weight, problem.targets, reduction=reduction, **options
            )
            (weighted_loss(problem, -loss) if weighted else loss).backward()
            return Outputs(-loss.detach() if weighted else None)

        return run

    return build


# --- ours ------------------------------------------------------------------------------------------------------------


def policy_loss(implementation: str = "auto", **options: Any) -> Callable[[Problem], Run]:
    """The fused loss with AAPO's objective; ``options`` go to ``linear_policy_loss``."""

    def build(problem: Problem) -> Run:
        objective = af.AAPO(problem.advantages, problem.sequence_index, problem.num_rows)
        return _run_policy_loss(problem, objective, implementation, **options)

    return build


def plain_mean(implementation: str = "auto") -> Callable[[Problem], Run]:
    """The fused loss as a mean over tokens: what peers without a weight a token compute."""
    return lambda problem: _run_policy_loss(problem, af.SFT(problem.num_rows), implementation)


def _run_policy_loss(problem: Problem, objective: Objective, implementation: str, **options: Any) -> Run:
    _check_implementation(implementation, problem)
    keywords: dict[str, Any] = {"softcap": problem.softcap, "implementation": implementation, **options}

    def run() -> Outputs:
        out = af.linear_policy_loss(problem.hidden, problem.weight, problem.targets, objective, **keywords)
        out.loss.backward()
        return Outputs(out.logps, out.entropy)

    return run


def logprobs(implementation: str = "auto") -> Callable[[Problem], Run]:
    """Differentiable log-probabilities and entropies, the loss written outside."""

    def build(problem: Problem) -> Run:
        _check_implementation(implementation, problem)

        def run() -> Outputs:
            out = af.linear_logprobs(
                problem.hidden,
                problem.weight,
                problem.targets,
                softcap=problem.softcap,
                implementation=implementation,
            )
            weighted_loss(problem, out.logps).backward()
            return Outputs(out.logps.detach(), out.entropy.detach())

        return run

    return build


def _check_implementation(name: str, problem: Problem) -> None:
    if name != "auto":
        candidate = next(c for c in dispatch.survey(problem.hidden.device) if c.name == name)
        needs(candidate.available, candidate.reason)
