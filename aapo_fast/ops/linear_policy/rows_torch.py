"""The row kernels in plain PyTorch: two sweeps over a block of logits that is small enough to stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from aapo_fast.ops.linear_policy import sparse
from aapo_fast.ops.linear_policy import targets as at_targets
from aapo_fast.ops.linear_policy.statistics import (
    Coefficients,
    Entries,
    Partials,
    RowStatistics,
    Transform,
    at_once,
    finish,
)
from aapo_fast.ops.linear_policy.uniforms import row_uniforms

BLOCK_BYTES = 8 * 2**20
"""Size of a block on the CPU: two of them should fit the cache. On a GPU a block is the whole panel."""

LEFT_OUT = -1e30
"""Stands for a logit of minus infinity, without the NaN of 0 * inf."""


SMALLEST = 1e-30
"""An entry of a gradient row that is less is zero on a CPU: no sum of fp32 numbers sees it. A confident model's dust
goes down to subnormal numbers, products of which take a processor a hundred times as long."""


class TorchRows:
    """``RowKernels`` and ``SparseBlocks`` in plain PyTorch, for any device and fp32 or fp64.

    Sweep 1 leaves ``shifted`` (logits less the largest of them) in the block and their exponentials in ``_exps``; both
    serve sweep 2 of the same block; under a soft-cap, so do the slopes in ``_slopes``. The target's logit becomes
    ``LEFT_OUT``.

    Args:
        chunk: the (C, V) buffer that blocks are views of.
        columns: by which rows are cut into blocks: V, or what shards of unequal V have agreed on.
    """

    blocks_between_tries = 0

    def __init__(self, chunk: Tensor, columns: int) -> None:
        rows, vocab = chunk.shape
        fit = rows if chunk.is_cuda else BLOCK_BYTES // max(1, columns * chunk.itemsize)
        self.block_rows = even_parts(rows, fit)
        # Zeros beyond V stay zeros: the padding of the sparse sample's last tile.
        self._exps = chunk.new_zeros(self.block_rows, sparse.padded_width(vocab))
        self._row_max = chunk.new_empty(0)
        self._slopes: Tensor | None = None

    def statistics(self, products: Tensor, targets: Tensor, transform: Transform, sparse: bool = True) -> Partials:
        if transform.softcap is not None:
            self._slopes = _slopes(products, transform, self._slopes)
        z = _logits_(products, transform)
        held, column = targets >= 0, targets.clamp(min=0)[:, None]
        found = z.gather(1, column).squeeze(1)
        at_target = found.masked_fill(~held, -torch.inf)
        z.scatter_(1, column, found.masked_fill(held, LEFT_OUT)[:, None])
        row_max = self._row_max = z.amax(1)
        shifted = z.sub_(row_max[:, None])
        exps = torch.exp(shifted, out=self._exps[: z.shape[0], : z.shape[1]])
        return Partials(row_max, exps.sum(1), torch.linalg.vecdot(exps, shifted), at_target)

    def finish(self, partials: Partials) -> RowStatistics:
        return finish(partials)

    def gradient(
        self,
        products: Tensor,
        targets: Tensor,
        rows: RowStatistics,
        wanted: Coefficients,
        transform: Transform,
        out: Tensor,
    ) -> None:
        """d loss / d z_v = -a p_v - b p_v (log p_v + H) + c p_v but at the target, times the slope d z / d x."""
        shifted, exps = products, self._exps[: products.shape[0], : products.shape[1]]
        steepness = transform.scale / transform.column()
        own, log_own = self._share(rows)
        share = steepness * own[:, None]
        on_every = -wanted.logps if wanted.logsumexp is None else wanted.logsumexp - wanted.logps
        if wanted.entropy is None:
            d = torch.mul(exps, on_every[:, None] * share, out=products)
        else:
            # -b (log p_v + H) + (c - a), with log p_v + H = shifted_v + offset
            b, offset = wanted.entropy, rows.entropy + log_own
            d = shifted.mul_(-b[:, None]).add_((on_every - b * offset)[:, None]).mul_(exps).mul_(share)
        if transform.softcap is not None and self._slopes is not None:
            d.mul_(self._slopes[: d.shape[0]])
        if not d.is_cuda:
            torch.hardshrink(d, SMALLEST, out=d)  # which leaves NaN as it is
        if out.data_ptr() != d.data_ptr():
            out.copy_(d)

    def uniforms(self, seed: int, rows: Tensor) -> Tensor:
        return row_uniforms(seed, rows)

    @at_once
    def sparse_gradient(
        self,
        products: Tensor,
        targets: Tensor,
        rows: RowStatistics,
        wanted: Coefficients,
        transform: Transform,
        threshold: float,
        uniforms: Tensor,
    ) -> Entries | None:
        own, log_own = self._share(rows)
        sample = sparse.sample_rows(self._exps[: products.shape[0]], 1 / own[:, None], threshold, uniforms)
        if sample is None:
            return None
        row, column = sample.row, sample.column
        factor = (-wanted.logps if wanted.logsumexp is None else wanted.logsumexp - wanted.logps)[row]
        if wanted.entropy is not None:
            factor = factor - wanted.entropy[row] * (products[row, column] + (rows.entropy + log_own)[row])
        temperature = transform.of(row).temperature
        value = sample.value * factor * (transform.scale / temperature)
        if transform.softcap is not None and self._slopes is not None:
            value *= self._slopes[row, column]
        return Entries(row, column, value)

    def _share(self, rows: RowStatistics) -> tuple[Tensor, Tensor]:
        """What makes probabilities of this block's exponentials, and its logarithm.

        Zero where the target, or another shard, has all the probability that fp32 can tell.
        """
        gap = self._row_max - rows.row_max
        return gap.exp() / rows.total, gap - rows.total.log()

    def add_times_weight(self, entries: Entries, weight: Tensor, out: Tensor) -> None:
        sparse.add_times_weight(entries, weight.to(out.dtype), out)

    def add_transposed_times(self, entries: Entries, hidden: Tensor, out: Tensor) -> None:
        sparse.add_transposed_times(entries, hidden.to(out.dtype), out)

    def add_targets_times_weight(self, value: Tensor, target: Tensor, weight: Tensor, out: Tensor) -> None:
        at_targets.add_times_weight(value, target, weight, out)

    def add_targets_transposed_times(self, value: Tensor, target: Tensor, hidden: Tensor, out: Tensor) -> None:
        at_targets.add_transposed_times(value, target, hidden, out)


def even_parts(num_rows: int, most: int) -> int:
    """Rows a part: at most ``most``, evened out so that the last part is not a sliver."""
    num_parts = max(1, -(-num_rows // max(1, most)))
    return max(1, -(-num_rows // num_parts))


def _logits_(x: Tensor, transform: Transform) -> Tensor:
    """Raw products to logits, in place."""
    if transform.softcap is not None:
        x.mul_(transform.scale / transform.softcap).tanh_()
        return x.mul_(transform.softcap / transform.column())
    if isinstance(transform.temperature, Tensor) or transform.temperature != transform.scale:
        x.mul_(transform.scale / transform.column())
    return x


def _slopes(products: Tensor, transform: Transform, out: Tensor | None) -> Tensor:
    """What of d z / d x differs from entry to entry, 1 - tanh^2, into the front of ``out``.

    From the raw products, as 1 / cosh^2: of a logit at its cap fp32 does not say how steep the cap still is.
    """
    assert transform.softcap is not None
    if out is None or len(out) < len(products):
        out = torch.empty_like(products)
    part = out[: len(products)]
    torch.mul(products, transform.scale / transform.softcap, out=part)
    part.cosh_().square_().reciprocal_()
    return out
