"""Liger-Kernel's heads (liger-kernel 0.8)."""

from __future__ import annotations

import importlib.util

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

from aapo_fast.bench.inputs import Problem
from aapo_fast.bench.method import Outputs, Run, needs, needs_cuda, weighted_loss

CHUNK_BUDGET = 8
"""Logits of eight times the hidden states' size at once. The default, one, makes chunks of a few hundred rows at large
vocabularies, which are slower."""


def grpo(problem: Problem) -> Run:
    """On-policy, no KL term, all sequences in one chunk (it bounds memory by itself), so that dW is summed in fp32.

    The elementwise part is not compiled: it is (B, T), and the rest is not compiled either.
    """
    needs(problem.softcap is None, "has no soft-cap")
    needs(problem.rectangular, "needs sequences of equal length")
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, chunk_size=problem.advantages.numel(), loss_type="dapo"
    )
    shape = (problem.advantages.numel(), problem.num_rows // problem.advantages.numel())
    mask = torch.ones(shape, device=problem.hidden.device)

    def run() -> Outputs:
        value, _ = loss(
            problem.hidden.view(*shape, -1),
            problem.weight,
            problem.targets.view(shape),
            mask,
            problem.advantages,
            num_items_in_batch=problem.num_rows,
        )
        value.backward()
        return Outputs()

    return run


def scaled(problem: Problem) -> Run:
    """Per-token cross entropy: CuTe kernels on Hopper with nvidia-cutlass-dsl, chunked PyTorch elsewhere."""
    needs(problem.softcap is None, "has no soft-cap")
    if problem.hidden.is_cuda and torch.cuda.get_device_capability(problem.hidden.device) == (9, 0):
        needs(importlib.util.find_spec("cutlass") is not None, "needs nvidia-cutlass-dsl on Hopper")
        needs(problem.hidden.dtype == torch.bfloat16, "takes bfloat16 alone on Hopper")

    def run() -> Outputs:
        loss = LigerFusedLinearScaledCrossEntropyFunction.apply(problem.hidden, problem.weight, problem.targets)
        weighted_loss(problem, -loss).backward()
        return Outputs(-loss.detach())

    return run


def mean(problem: Problem) -> Run:
    """Fused linear cross entropy with dW summed in fp32, mean over tokens."""
    return _cross_entropy(problem, "mean")


def tokens(problem: Problem) -> Run:
    """The same without reduction: it recomputes the logits to apply a weight a token."""
    return _cross_entropy(problem, "none")


def _cross_entropy(problem: Problem, reduction: str) -> Run:
    needs_cuda(problem)

    def run() -> Outputs:
        loss = liger_fused_linear_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.targets,
            reduction=reduction,
            softcap=problem.softcap,
            accum_dtype=torch.float32,
            chunk_mem_const=CHUNK_BUDGET,
        )
        if reduction == "mean":
            loss.backward()
            return Outputs()
        weighted_loss(problem, -loss).backward()
        return Outputs(-loss.detach())

    return run
