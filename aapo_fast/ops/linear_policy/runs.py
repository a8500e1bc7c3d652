"""The three runs over the rows: ``policy_loss`` (token-local objectives: loss and gradients in one visit), and
``statistics`` and ``gradients`` (any upstream gradient: logits computed twice).

Letters: N rows of the call, M rows visited.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aapo_fast.objectives import LinearWeights, Objective, Tokens
from aapo_fast.ops.linear_policy.chunked import Gradients, Pass
from aapo_fast.ops.linear_policy.statistics import Coefficients, RowStatistics


def policy_loss(work: Pass, objective: Objective, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; (M,) log-probabilities and entropies, NaN without a target. ``work`` holds the gradients.

    ``active`` (N,) says which rows have a loss; None is all that have a target.
    """
    counts = work.has_target if active is None else work.has_target & active[work.numbers]
    loss = torch.zeros((), dtype=work.dtype, device=work.hidden.device)
    logps = torch.full(work.targets.shape, torch.nan, dtype=work.dtype, device=work.hidden.device)
    entropy = logps.clone()
    linear = _known_beforehand(objective, work)
    for chunk in work.chunks():
        for rows, products, gradient in work.blocks(chunk):
            if linear is not None:
                stats = work.sweep_and_spend(rows, products, gradient, linear)
                block_loss, wanted = _differentiate(objective, stats, work.numbers[rows], counts[rows])
                work.spend_target(rows, stats, wanted)
            else:
                stats = work.sweep(rows, products)
                block_loss, wanted = _differentiate(objective, stats, work.numbers[rows], counts[rows])
                if work.wants_gradient():
                    work.spend(rows, products, gradient, stats, wanted)
            loss += block_loss
            logps[rows], entropy[rows] = stats.logps, stats.entropy
        work.end_chunk(chunk)
    return loss, logps.where(work.has_target, torch.nan), entropy.where(work.has_target, torch.nan)


def _known_beforehand(objective: Objective, work: Pass) -> LinearWeights | None:
    """Coefficients that need no first sweep, where the kernels can use them: both sweeps are then one launch."""
    linear = getattr(objective, "linear", None)
    if linear is None or not work.can_sweep_at_once():
        return None
    found: LinearWeights | None = linear()
    return found


def _differentiate(
    objective: Objective, stats: RowStatistics, numbers: Tensor, counts: Tensor
) -> tuple[Tensor, Coefficients]:
    """Sum of the token losses of the rows that count, and its derivatives by their statistics, on vectors.

    The objective gets copies: it may write on them.
    """
    with torch.enable_grad():
        logps = stats.logps.where(counts, 0.0).detach().requires_grad_()
        entropy = stats.entropy.detach().clone().requires_grad_()
        logsumexp = stats.logsumexp.detach().clone().requires_grad_()
        losses = objective(Tokens(logps, entropy, numbers.clone(), logsumexp))
        if not isinstance(losses, Tensor) or losses.shape != logps.shape:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"objective returned {got}; it must return one loss a row, {tuple(logps.shape)}")
        loss = losses.where(counts, 0.0).sum()
    wanted: tuple[Tensor | None, ...] = (None, None, None)
    if loss.requires_grad:
        wanted = torch.autograd.grad(loss, (logps, entropy, logsumexp), allow_unused=True)
    # Masked again: the derivative of a masked loss by a NaN (an old log-probability that nobody has) is 0 * NaN.
    d_logps, d_entropy, d_logsumexp = (None if d is None else d.where(counts, 0.0) for d in wanted)
    d_logps = torch.zeros_like(stats.logps) if d_logps is None else d_logps
    return loss.detach(), Coefficients(d_logps, d_entropy, d_logsumexp)


def statistics(work: Pass) -> tuple[Tensor, Tensor, Tensor]:
    """(M,) log-probabilities, entropies and log-sum-exps; zero in rows without a target."""
    logps = torch.empty(work.targets.shape, dtype=work.dtype, device=work.hidden.device)
    entropy, logsumexp = torch.empty_like(logps), torch.empty_like(logps)
    for chunk in work.chunks():
        for rows, products, _ in work.blocks(chunk):
            stats = work.sweep(rows, products)
            logps[rows], entropy[rows], logsumexp[rows] = stats.logps, stats.entropy, stats.logsumexp
    logps, entropy, logsumexp = (values.where(work.has_target, 0.0) for values in (logps, entropy, logsumexp))
    return logps, entropy, logsumexp


def gradients(work: Pass, upstream: Sequence[Tensor | None]) -> Gradients:
    """Gradients for (M,) upstream gradients of ``statistics``' results; None is zero."""
    d_logps, *others = (None if d is None else d.where(work.has_target, 0.0) for d in upstream)
    if d_logps is None:
        d_logps = torch.zeros(work.targets.shape, dtype=work.dtype, device=work.hidden.device)
    wanted = Coefficients(d_logps, *others)
    for chunk in work.chunks():
        for rows, products, gradient in work.blocks(chunk):
            stats = work.sweep(rows, products)
            work.spend(rows, products, gradient, stats, wanted.of(rows))
        work.end_chunk(chunk)
    return work.end()
