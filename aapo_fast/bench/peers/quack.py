"""quack's chunked linear cross entropy (quack-kernels 0.6): CuTe kernels for Hopper and Blackwell."""

from __future__ import annotations

import torch
from quack.linear_cross_entropy import chunked_linear_cross_entropy

from aapo_fast.bench.inputs import Problem
from aapo_fast.bench.method import Outputs, Run, needs, needs_cuda


def chunked(problem: Problem) -> Run:
    """Its defaults: 4096 rows a chunk, and the scaled-exp pipeline where the shape allows it."""
    needs_cuda(problem)
    needs(problem.softcap is None, "has no soft-cap")
    needs(problem.hidden.dtype == torch.bfloat16, "measured in bfloat16 alone")
    needs(problem.num_rows % 8 == 0, "needs a multiple of eight rows")

    def run() -> Outputs:
        chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.targets).backward()
        return Outputs()

    return run
