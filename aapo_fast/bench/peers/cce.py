"""Apple's cut-cross-entropy (cut-cross-entropy 25.1)."""

from __future__ import annotations

import shutil

import torch
from cut_cross_entropy import linear_cross_entropy

from aapo_fast.bench.inputs import Problem
from aapo_fast.bench.method import Outputs, Run, needs, needs_cuda, weighted_loss


def fused(problem: Problem) -> Run:
    """The Triton kernels, tiles of small gradients filtered out, which is its default and its fastest."""
    needs_cuda(problem)
    needs(problem.hidden.dtype in (torch.bfloat16, torch.float16), "takes bfloat16 and float16 alone")
    return _per_token(problem, "cce")


def compiled(problem: Problem) -> Run:
    """Its other implementation: the logits materialised, under torch.compile."""
    needs(problem.hidden.is_cuda or shutil.which("g++") is not None, "torch.compile needs a C++ compiler on a CPU")
    return _per_token(problem, "torch_compile")


def _per_token(problem: Problem, implementation: str) -> Run:
    def run() -> Outputs:
        loss = linear_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.targets,
            softcap=problem.softcap,
            reduction="none",
            impl=implementation,
        )
        weighted_loss(problem, -loss).backward()
        return Outputs(-loss.detach())

    return run
