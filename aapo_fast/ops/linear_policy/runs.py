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
from aapo_fast.ops.linear_policy.statistics import (
    Coefficients,
    RowStatistics,
    joined,
    joined_coefficients,
    no_rows,
)


def policy_loss(work: Pass, objective: Objective, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """The loss; (M,) log-probabilities and entropies, NaN without a target; the gradients.

    ``active`` (N,) says which rows have a loss; None is all that have a target.
    """
    counts = work.has_target if active is None else work.has_target & active[work.numbers]
    weights = _linear_weights(objective)
    if weights is None:
        stats, loss, wanted = _visit(work, objective, counts)
    else:
        stats = _visit_with_known_weights(work, weights, counts)
        # On the vectors of all rows at once: on a GPU some sixty launches a panel would be a twentieth of the time.
        loss, wanted = _differentiate(objective, stats, work.numbers, counts)
        loss = loss.to(work.dtype)  # and not in that of the advantages
    logps, entropy = (values.where(work.has_target, torch.nan) for values in (stats.logps, stats.entropy))
    return loss, logps, entropy, work.end(stats, wanted)


def _visit(work: Pass, objective: Objective, counts: Tensor) -> tuple[RowStatistics, Tensor, Coefficients]:
    """Statistics and coefficients of all rows, and the loss."""
    loss = torch.zeros((), dtype=work.dtype, device=work.hidden.device)
    found: list[RowStatistics] = [no_rows(work.dtype, work.hidden.device)]
    coefficients: list[Coefficients] = [Coefficients(found[0].logps)]
    for chunk in work.chunks():
        for rows, products in work.blocks(chunk):
            stats = work.sweep(rows, products, counts)
            block_loss, wanted = _differentiate(objective, stats, work.numbers[rows], counts[rows])
            if work.wants_gradient():
                work.spend(rows, products, stats, wanted)
            loss += block_loss
            found.append(stats)
            coefficients.append(wanted)
        work.end_chunk()
    return joined(found), loss, joined_coefficients(coefficients)


def _visit_with_known_weights(work: Pass, linear: LinearWeights, counts: Tensor) -> RowStatistics:
    """Statistics of all rows, for a loss whose coefficients need none; both sweeps in one launch where that exists."""
    # One weight more, for rows that are not to count.
    none = linear.weights.numel()
    index = linear.sequence_index[work.numbers].where(counts, none)
    linear = LinearWeights(torch.cat([linear.weights.to(work.dtype), work.no_weight]), index)
    wanted = Coefficients(linear.weights[index])
    found: list[RowStatistics] = [no_rows(work.dtype, work.hidden.device)]
    for chunk in work.chunks():
        for panel, products in work.panels(chunk):
            if work.sweeps_at_once():
                found.append(work.sweep_and_spend(panel, products, linear))
                continue
            for rows, part in work.cut(panel, products):
                found.append(work.sweep(rows, part, counts))
                if work.wants_gradient():
                    work.spend(rows, part, found[-1], wanted.of(rows))
        work.end_chunk()
    return joined(found)


def _linear_weights(objective: Objective) -> LinearWeights | None:
    """What ``linear()`` gives, unless a subclass may have another loss than the class that promised a linear one: it
    has a ``__call__`` of its own, or anything else of that class but the rows that count.
    """
    lines = type(objective).__mro__
    promised = next((place for place, kind in enumerate(lines) if "linear" in vars(kind)), None)
    if promised is None:
        return None
    known = {name for name in dir(lines[promised]) if not name.startswith("__")} - {"active", "num_rows"} | {"__call__"}
    fields = getattr(lines[promised], "__dataclass_fields__", {})
    for kind in lines[:promised]:
        own = known & vars(kind).keys()
        if any(name not in fields or isinstance(vars(kind)[name], property) for name in own):  # and no new default
            return None
    found: LinearWeights | None = objective.linear()  # type: ignore[attr-defined]
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
    found: list[RowStatistics] = [no_rows(work.dtype, work.hidden.device)]
    for chunk in work.chunks():
        found += [work.sweep(rows, products, work.has_target) for rows, products in work.blocks(chunk)]
    logps, entropy, logsumexp = (values.where(work.has_target, 0.0) for values in joined(found)[:3])
    return logps, entropy, logsumexp


def gradients(work: Pass, upstream: Sequence[Tensor | None]) -> Gradients:
    """Gradients for (M,) upstream gradients of ``statistics``' results; None is zero."""
    d_logps, *others = (None if d is None else d.where(work.has_target, 0.0) for d in upstream)
    if d_logps is None:
        d_logps = torch.zeros(work.targets.shape, dtype=work.dtype, device=work.hidden.device)
    wanted = Coefficients(d_logps, *others)
    return work.end(_visit_again(work, wanted), wanted)


def _visit_again(work: Pass, wanted: Coefficients) -> RowStatistics:
    """Statistics of all rows, on the way to their gradients."""
    live = wanted.live()
    found: list[RowStatistics] = [no_rows(work.dtype, work.hidden.device)]
    for chunk in work.chunks():
        for rows, products in work.blocks(chunk):
            found.append(work.sweep(rows, products, live))
            work.spend(rows, products, found[-1], wanted.of(rows))
        work.end_chunk()
    return joined(found)
