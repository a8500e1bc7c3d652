"""The row kernels in plain PyTorch: two sweeps over a block of logits.

This is the interface that other row kernels take over: ``statistics`` reads a block, ``dense_gradient`` turns the same
block into gradient rows (``sparse.emit`` into sparse ones). Between the two the caller evaluates the objective, on
vectors. A block is small enough for its sweeps to stay in the processor's cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aapo_fast.ops.linear_policy.logits import LogitTransform


class RowStatistics(NamedTuple):
    """Per row of a block, (C,): ``logps`` of the targets and ``entropy``; and what the second sweep needs again.

    Attributes:
        shifted: (C, V) logits less their row maximum, in the buffer of the raw products.
        exps: (C, V) ``exp(shifted)``.
        row_max, total: (C, 1) that maximum, and the sum of ``exps``.
    """

    logps: Tensor
    entropy: Tensor
    shifted: Tensor
    exps: Tensor
    row_max: Tensor
    total: Tensor


class Coefficients(NamedTuple):
    """What the objective wants of each row, (C,).

    Attributes:
        logps: d loss / d logp.
        entropy: d loss / d entropy, or None where the objective does not use the entropy.
    """

    logps: Tensor
    entropy: Tensor | None


def statistics(products: Tensor, targets: Tensor, transform: LogitTransform, scratch: Tensor) -> RowStatistics:
    """Sweep 1: log-sum-exp, target logit and entropy of each row.

    Args:
        products: (C, V) raw head products, fp32 or fp64; overwritten.
        targets: (C,) int64.
        scratch: (C, V) like ``products``; overwritten.
    """
    z = transform.apply_(products)
    row_max = z.amax(1, keepdim=True)
    shifted = z.sub_(row_max)
    exps = torch.exp(shifted, out=scratch)
    total = exps.sum(1, keepdim=True)
    log_total = total.log()
    logps = (shifted.gather(1, targets[:, None]) - log_total).squeeze(1)
    # H = log-sum-exp - E[z]; written with the shifted logits, so no large numbers cancel.
    mean_shifted = torch.linalg.vecdot(exps, shifted) / total.squeeze(1)
    entropy = log_total.squeeze(1) - mean_shifted
    return RowStatistics(logps, entropy, shifted, exps, row_max, total)


def dense_gradient(rows: RowStatistics, targets: Tensor, wanted: Coefficients, transform: LogitTransform) -> Tensor:
    """Sweep 2: (C, V) gradient of the loss with respect to the raw products, in their buffer.

        d loss / d z_v = d_logp (onehot_v - p_v) - d_entropy p_v (log p_v + H)

    Args:
        rows: the result of sweep 1; overwritten.
        targets: (C,) int64.
    """
    slope = transform.slope(rows.shifted, rows.row_max)
    d_logps = wanted.logps[:, None] / transform.temperature
    if wanted.entropy is None:
        out = torch.mul(rows.exps, -d_logps / rows.total, out=rows.shifted)
    else:
        d_entropy = wanted.entropy[:, None] / transform.temperature
        # log p_v + H = shifted_v + offset
        offset = rows.entropy[:, None] - rows.total.log()
        out = rows.shifted.add_(offset).mul_(-d_entropy).sub_(d_logps).mul_(rows.exps).div_(rows.total)
    out.scatter_add_(1, targets[:, None], d_logps)
    return out if slope is None else out.mul_(slope)
