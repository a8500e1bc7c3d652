"""The truth in float64, streamed over blocks of rows, and how far a result is from it.

Plain formulas, no code of the package: this is what the package is measured by.

    row_t = c_t (onehot(target_t) - p_t) * slope_t        c_t = -w_t / N, slope of the soft-cap
    dX = rows @ W,  dW = rows^T @ X
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aapo_fast.bench.inputs import Problem, logit_blocks

Errors = dict[str, float]


@dataclass(frozen=True, eq=False)
class Truth:
    """In float64: (N,) ``logps`` and ``entropy``, (N, H) ``d_hidden``, (V, H) ``d_weight``."""

    logps: Tensor
    entropy: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def truth(problem: Problem, weighted: bool = True) -> Truth:
    """Of the loss with each token's advantage, or (``weighted=False``) of the plain mean of ``-logp``."""
    with torch.no_grad():
        return _stream(problem, weighted)


def _stream(problem: Problem, weighted: bool) -> Truth:
    x, w = problem.hidden.detach().double(), problem.weight.detach().double()
    n = problem.num_rows
    weights = problem.token_weights.double() if weighted else torch.ones(n, dtype=x.dtype, device=x.device)
    result = Truth(x.new_empty(n), x.new_empty(n), torch.empty_like(x), torch.zeros_like(w))
    for rows, log_p, d in _rows(problem, x, w, weights):
        result.logps[rows] = log_p.gather(1, problem.targets[rows, None]).squeeze(1)
        result.entropy[rows] = -(log_p.exp() * log_p).sum(1)
        result.d_hidden[rows] = d @ w
        result.d_weight.addmm_(d.t(), x[rows])
    return result


def gradient_rows(problem: Problem, weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of each block, and their true (C, V) derivatives of the loss with respect to the raw logits, in float64."""
    x, w = problem.hidden.detach().double(), problem.weight.detach().double()
    for rows, _, d in _rows(problem, x, w, weights):
        yield rows, d


def _rows(problem: Problem, x: Tensor, w: Tensor, weights: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of each block, their log-softmax, and the derivatives of the loss with respect to the raw logits."""
    for rows, z in logit_blocks(x, w, problem.softcap, torch.float64):
        log_p = z.log_softmax(1)
        targets = problem.targets[rows, None]
        d = log_p.exp().scatter_add_(1, targets, -torch.ones_like(targets, dtype=log_p.dtype))
        d.mul_(weights[rows, None] / problem.num_rows)
        if problem.softcap is not None:
            d.mul_(1 - (z / problem.softcap).square())
        yield rows, log_p, d


def gradient_errors(value: Tensor, true: Tensor) -> Errors:
    """How a gradient differs from the truth.

    Returns:
        error: relative Frobenius error, ``|value - true| / |true|``.
        one_minus_cosine: of the angle between the two.
        worst_row: largest relative error of a row, among rows whose true norm is at least a thousandth of their
            root mean square.
        bias: ``<value - true, true> / <true, true>``, signed: 0.01 is a gradient 1 % too large.
    """
    difference = true.new_zeros(true.shape[0])
    inner, own, norms = torch.zeros_like(difference), torch.zeros_like(difference), torch.zeros_like(difference)
    size = max(1, 2**25 // true.shape[1])
    for start in range(0, true.shape[0], size):
        rows = slice(start, start + size)
        wide, right = value[rows].detach().double(), true[rows]
        difference[rows] = (wide - right).square().sum(1)
        inner[rows] = (wide * right).sum(1)
        own[rows] = wide.square().sum(1)
        norms[rows] = right.square().sum(1)
    total = norms.sum().clamp(min=torch.finfo(torch.float64).tiny)
    counted = norms >= 1e-6 * norms.mean()
    cosine = inner.sum() / (total * own.sum()).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return {
        "error": (difference.sum() / total).sqrt().item(),
        "one_minus_cosine": (1 - cosine).item(),
        "worst_row": (difference[counted] / norms[counted]).max().sqrt().item() if counted.any() else float("nan"),
        "bias": (inner.sum() / total - 1).item(),
    }


def vector_errors(value: Tensor, true: Tensor) -> Errors:
    """Of log-probabilities or entropies, in nats: root mean square, largest, and signed mean."""
    difference = value.detach().double() - true
    return {
        "rms": difference.square().mean().sqrt().item(),
        "largest": difference.abs().max().item(),
        "bias": difference.mean().item(),
    }
