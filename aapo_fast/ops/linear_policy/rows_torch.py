"""The row kernels in plain PyTorch: two sweeps over a block of logits that is small enough to stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from aapo_fast.ops.linear_policy import sparse
from aapo_fast.ops.linear_policy.statistics import Coefficients, Entries, Partials, RowStatistics, Transform

BLOCK_BYTES = 8 * 2**20
"""Size of a block on the CPU: two of them should fit the cache. On a GPU a block is the whole chunk."""


class TorchRows:
    """``RowKernels`` in plain PyTorch, for any device and fp32 or fp64.

    Sweep 1 leaves ``shifted`` (logits less the row's maximum) in the block and their exponentials in ``_exps``; both
    serve sweep 2 of the same block.
    """

    def __init__(self, chunk: Tensor) -> None:
        rows, vocab = chunk.shape
        fit = rows if chunk.is_cuda else BLOCK_BYTES // max(1, vocab * chunk.itemsize)
        self.block_rows = even_parts(rows, fit)
        # Zeros beyond V stay zeros: the padding of the sparse sample's last tile.
        self._exps = chunk.new_zeros(self.block_rows, sparse.padded_width(vocab))
        self._row_max = chunk.new_empty(0)

    def statistics(self, products: Tensor, targets: Tensor, transform: Transform) -> Partials:
        z = _logits_(products, transform)
        row_max = self._row_max = z.amax(1)
        at_target = z.gather(1, targets.clamp(min=0)[:, None]).squeeze(1).masked_fill(targets < 0, -torch.inf)
        shifted = z.sub_(row_max[:, None])
        exps = torch.exp(shifted, out=self._exps[: z.shape[0], : z.shape[1]])
        return Partials(row_max, exps.sum(1), torch.linalg.vecdot(exps, shifted), at_target)

    def gradient(
        self,
        products: Tensor,
        targets: Tensor,
        rows: RowStatistics,
        wanted: Coefficients,
        transform: Transform,
        out: Tensor,
    ) -> None:
        """d loss / d z_v = a (onehot_v - p_v) - b p_v (log p_v + H) + c p_v, times the slope d z / d x."""
        shifted, exps = products, self._exps[: products.shape[0], : products.shape[1]]
        slope = None
        if transform.softcap is not None:
            slope = _slope_(shifted + self._row_max[:, None], transform.column(), transform.softcap)
        steepness = transform.scale / transform.column()
        share = steepness / self._total(rows)[:, None]
        on_every = -wanted.logps if wanted.logsumexp is None else wanted.logsumexp - wanted.logps
        if wanted.entropy is None:
            d = torch.mul(exps, on_every[:, None] * share, out=products)
        else:
            # -b (log p_v + H) + (c - a), with log p_v + H = shifted_v + offset
            b, offset = wanted.entropy, rows.entropy - self._total(rows).log()
            d = shifted.mul_(-b[:, None]).add_((on_every - b * offset)[:, None]).mul_(exps).mul_(share)
        at_target = (wanted.logps * (targets >= 0))[:, None] * steepness
        d.scatter_add_(1, targets.clamp(min=0)[:, None], at_target)
        if slope is not None:
            d.mul_(slope)
        if out.data_ptr() != d.data_ptr():
            out.copy_(d)

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
        total = self._total(rows)
        sample = sparse.sample_rows(self._exps[: products.shape[0]], total[:, None], threshold, uniforms)
        if sample is None:
            return None
        row, column = sample.row, sample.column
        factor = (-wanted.logps if wanted.logsumexp is None else wanted.logsumexp - wanted.logps)[row]
        if wanted.entropy is not None:
            offset = rows.entropy - total.log()
            factor = factor - wanted.entropy[row] * (products[row, column] + offset[row])
        held = (targets >= 0).nonzero().squeeze(1)
        row, column = torch.cat([row, held]), torch.cat([column, targets[held]])
        value = torch.cat([sample.value * factor, wanted.logps[held]])
        temperature = transform.of(row).temperature
        value *= transform.scale / temperature
        if transform.softcap is not None:
            value *= _slope_(products[row, column] + self._row_max[row], temperature, transform.softcap)
        return Entries(row, column, value)

    def _total(self, rows: RowStatistics) -> Tensor:
        """What the exponentials of this shard are divided by: the row's total, from this shard's maximum.

        A shard more than 80 below the row's maximum has no probability that fp32 could hold; the bound keeps inf out.
        """
        return rows.total * (rows.row_max - self._row_max).clamp(max=80.0).exp()

    def add_times_weight(self, entries: Entries, weight: Tensor, out: Tensor) -> None:
        sparse.add_times_weight(entries, weight.to(out.dtype), out)

    def add_transposed_times(self, entries: Entries, hidden: Tensor, out: Tensor) -> None:
        sparse.add_transposed_times(entries, hidden.to(out.dtype), out)


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


def _slope_(z: Tensor, temperature: float | Tensor, softcap: float) -> Tensor:
    """What of d z / d x differs from entry to entry, ``1 - tanh^2``, from the logits z and in their place."""
    return z.mul_(temperature / softcap).square_().neg_().add_(1.0)
