"""The target's own entry of a gradient row: what it is, and how it is spent (section "The target apart" of README.md).

In fp64 until it meets the accumulators: it is most of a gradient row, and rounded it would be most of its error.

Letters: C rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aapo_fast.ops.linear_policy.statistics import Coefficients, RowStatistics, Transform

BUFFER_BYTES = 16 * 2**20
"""Size of each of the few fp64 (rows, H) buffers in which entries are spent."""


def gradient(rows: RowStatistics, wanted: Coefficients, transform: Transform, held: Tensor, product: Tensor) -> Tensor:
    """(C,) d loss / d the target's raw product, fp64; zero where this shard holds no target, ``held`` (C,) bool.

    ``product`` (C,) is that raw product, needed under a soft-cap: where that is reached, the logit says no more of its
    slope.

    a (1 - p) - b p (log p + H) + c p, times the slope d z / d x.
    """
    p = rows.logps.double().exp()
    # 1 - p has more digits than rest / total while p is small.
    d = wanted.logps * torch.where(p < 0.5, 1 - p, rows.others.double())
    live = wanted.logps != 0
    if wanted.entropy is not None:
        d = d - wanted.entropy * p * (rows.logps.clamp(min=-1e30) + rows.entropy)
        live = live | (wanted.entropy != 0)
    if wanted.logsumexp is not None:
        d = d + wanted.logsumexp * p
        live = live | (wanted.logsumexp != 0)
    temperature = transform.temperature
    temperature = temperature.double() if isinstance(temperature, Tensor) else temperature
    d = d * (transform.scale / temperature)
    if transform.softcap is not None:
        d = d / torch.cosh(product.double() * (transform.scale / transform.softcap)).square()  # 1 - tanh^2
    # A row that nothing depends on gives zeros, whatever is in it.
    return d.where(held & live, 0.0)


def add_times_weight(value: Tensor, target: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out[t] += value[t] * weight[target[t]]``: (C,) fp64, (C,) of which -1 is none, (V, H) to (C, H)."""
    for rows in _blocks(out):
        column = target[rows].clamp(min=0)
        out[rows] = (_times(value[rows], weight[column]) + out[rows]).to(out.dtype)


def add_transposed_times(value: Tensor, target: Tensor, hidden: Tensor, out: Tensor) -> None:
    """``out[target[t]] += value[t] * hidden[t]``: (C, H) to (V, H), in an order that is the same at every run."""
    for rows in _blocks(hidden):
        _add_rows(out, target[rows].clamp(min=0), _times(value[rows], hidden[rows]))


def _blocks(of: Tensor) -> Iterator[slice]:
    """Of the rows, such that (rows, H) in fp64 fits a buffer."""
    step = max(1, BUFFER_BYTES // (8 * max(1, of.shape[1])))
    for start in range(0, of.shape[0], step):
        yield slice(start, start + step)


def _times(value: Tensor, rows: Tensor) -> Tensor:
    """(C,) fp64 times (C, H); zero where the value is, whatever the row holds."""
    return (value[:, None] * rows).masked_fill_(value[:, None] == 0, 0.0)


def _add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """``out[index] += rows`` for fp64 rows, rounded once."""
    index, order = index.sort(stable=True)
    first = torch.searchsorted(index, index)  # rows of one index meet where it first stands
    total = torch.zeros_like(rows)
    if rows.is_cuda:
        total.index_put_((first,), rows[order], accumulate=True)  # sorts; index_add_ would use atomics there
    else:
        total.index_add_(0, first, rows[order])
    out[index] = (total[first] + out[index]).to(out.dtype)
