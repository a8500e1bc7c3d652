"""The pass: rows in chunks, each chunk visited once.

A chunk is what one pair of gradient products takes; a panel of it is what one product of logits takes; a block of that
is what the row kernels sweep while it is in cache. Their sizes and places are those of ``buffers.py``: on the CPU panel
and chunk are one, and gradient rows overwrite the logits.

What is asked is in ``call.py``; here are the accumulators of a run over the rows, and the runs are in ``runs.py``.

Letters: N rows of the call, M rows visited, C rows of a chunk or block, H hidden, V vocabulary of this shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aapo_fast.objectives import LinearWeights
from aapo_fast.ops.linear_policy import targets as at_targets
from aapo_fast.ops.linear_policy.buffers import Buffers, Layout, sizes_of
from aapo_fast.ops.linear_policy.call import Call
from aapo_fast.ops.linear_policy.memory import new_gradient
from aapo_fast.ops.linear_policy.products import Products
from aapo_fast.ops.linear_policy.rows import row_kernels
from aapo_fast.ops.linear_policy.sizes import gpu_budget, joined_slices
from aapo_fast.ops.linear_policy.statistics import (
    Coefficients,
    Entries,
    LateProducts,
    OneLaunch,
    RowStatistics,
    Sampled,
    SparseBlocks,
    SparsePanels,
    SparseProduct,
    Transform,
    compute_dtype,
    finish,
)
from aapo_fast.ops.linear_policy.tries import Tries
from aapo_fast.transfer import check_not_captured

FLUSH_ENTRIES, GPU_FLUSH_ENTRIES = 4 * 2**20, 8 * 2**20
"""Sparse entries that are gathered before they are spent on the accumulators. On a GPU they are best never spent: with
no dense rows beside them dW is made from them in the backward, in the weight's dtype and without an accumulator."""


class Gradients(NamedTuple):
    """In the compute dtype, None where not wanted: (M, H), (V, H) and (V,). The second may still be to be made."""

    hidden: Tensor | None
    weight: Tensor | SparseProduct | None
    bias: Tensor | None


class _InFlight(NamedTuple):
    """A block whose sparse entries are being counted. ``sweep``: what its dense rows would be made from."""

    rows: slice
    sweep: tuple[Tensor, Tensor, RowStatistics, Coefficients, Transform]
    entries: Callable[[], Entries | None]


class Pass:
    """Operands and gradient accumulators of one run over the rows.

    Args:
        hidden, weight, bias: (M, H), (V, H), (V,) or None.
        targets: (M,) tokens; anything outside [0, vocab_size) is a row without a target.
        numbers: (M,) int64 numbers of the rows in the call.
        call: what is asked.
        wanted: whether each of the three operands needs a gradient.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        numbers: Tensor,
        call: Call,
        wanted: Sequence[bool],
    ) -> None:
        self.call, self.numbers, self.hidden = call, numbers, hidden
        self.dtype = compute_dtype(hidden, weight, bias)
        live = call.vocab_size
        self.products = Products(hidden, weight[:live], self.dtype)
        columns = live if call.shard is None else call.shard.columns
        self.wanted, self._weight_shape = wanted, weight.shape
        self._threshold = call.threshold if self.wants_gradient() else None
        if self._threshold is not None:
            why = "with backward='sparse' the host reads how many entries there are; with 'exact' it does not"
            check_not_captured(hidden.device, why)
        self._buffers = self._allocate(hidden.shape[0], live, columns)
        self._chunk = slice(0, 0)
        first = slice(0, min(self._buffers.panel_rows, hidden.shape[0]))
        logits = self._buffers.panel(first)
        if hidden.shape[0]:  # a GPU has begun while the host is still preparing the rest
            self.products.logits(first, logits)
        self.transform = call.transform.of(numbers)
        vocab_size = live if call.shard is None else call.shard.vocab_size
        self.has_target = (targets >= 0) & (targets < vocab_size)
        here = targets if call.shard is None else targets - call.shard.start
        self.targets = torch.where(self.has_target & (here >= 0) & (here < live), here, -1)
        # -inf rules a token out. A large finite number does the same without the NaN of 0 * inf in the entropy.
        self.bias = None if bias is None else bias[:live].to(self.dtype).clamp(min=-1e30)
        self.kernels = row_kernels(call.implementation, logits, self._threshold is not None, columns)
        self._sparse_panels: SparsePanels | None = self.kernels if isinstance(self.kernels, SparsePanels) else None
        # Both sweeps at once are for rows that are whole, without other ranks.
        whole = self.kernels if call.shard is None and self.wants_gradient() else None
        self._one_launch: OneLaunch | None = whole if isinstance(whole, OneLaunch) else None
        zeros = logits.new_zeros
        self._d_hidden = zeros(hidden.shape) if wanted[0] else None
        self._d_weight: Tensor | None = None  # made when the first rows are spent on it, with what they make of it
        self._d_bias = zeros(weight.shape[:1]) if wanted[2] else None
        self.no_weight = zeros(1)
        self._target_products = zeros(hidden.shape[0] if self.transform.softcap is not None else 0)
        self._uniforms = numbers if self._threshold is None else self.kernels.uniforms(call.seed, numbers)
        self._dense_blocks: list[slice] = []
        self._in_flight: deque[_InFlight] = deque()
        self._sampled: Sampled | None = None
        self._entries: list[tuple[slice, Entries]] = []
        self._tries = Tries(self.kernels.blocks_between_tries)

    def _allocate(self, num_rows: int, vocab: int, columns: int) -> Buffers:
        """Dense rows first, until a panel comes out sparse; of shards, whose entries differ, one layout for all."""
        device, shard, narrow = self.hidden.device, self.call.shard, self.products.gradient_dtype
        threshold = self._threshold if shard is None else self.call.threshold  # what no rank has otherwise
        in_flight = threshold is not None and self.call.implementation == "triton"
        self._changes_layout = in_flight and shard is None
        width = self.hidden.shape[1]
        budget = gpu_budget(columns * width * self.products.weight.itemsize) if device.type == "cuda" else 0
        layout = Layout.SPARSE if in_flight and shard is not None else Layout.DENSE
        sizes = sizes_of(num_rows, columns, width, self.dtype, narrow, budget, layout)
        return Buffers(vocab, self.dtype, narrow, device, sizes, layout, self._changes_layout)

    def chunks(self) -> Iterator[slice]:
        """One after the other. ``panels`` ends one early that is followed by sparse rows."""
        while self._chunk.stop < self.hidden.shape[0]:
            if self._changes_layout:
                self._lay_out()
            start = self._chunk.stop
            self._chunk = slice(start, min(start + self._buffers.chunk_rows, self.hidden.shape[0]))
            yield self._chunk

    def _lay_out(self) -> None:
        """For the next chunk, as the last block turned out."""
        if self._buffers.layout is Layout.SPARSE and not self._tries.came_out_sparse:
            self._land_all()
            self._spend_dense()
        wanted = Layout.SPARSE if self._tries.came_out_sparse else Layout.DENSE
        if self._buffers.layout is not wanted:
            self._buffers.lay_out(wanted)

    def panels(self, chunk: slice) -> Iterator[tuple[slice, Tensor]]:
        """Of each panel: its rows and its (C, V) raw products."""
        for start in range(chunk.start, chunk.stop, self._buffers.panel_rows):
            panel = slice(start, min(start + self._buffers.panel_rows, chunk.stop))
            if start == 0:  # the product is there, or under way
                logits = self._buffers.held(panel)
            else:
                logits = self._buffers.panel(panel)
                self.products.logits(panel, logits)
            if self.bias is not None:
                logits += self.bias
            yield panel, logits
            if self._changes_layout and self._tries.came_out_sparse and self._buffers.layout is Layout.DENSE:
                self._chunk = slice(chunk.start, panel.stop)
                return

    def cut(self, panel: slice, products: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Of each block of a panel the same; the panel, for kernels that cut it for themselves to sample it, or whose
        blocks follow from a rank's threads: all ranks of a sharded head take the same rows at a time.
        """
        if self._sampler() is not None or (self._sparse_panels is not None and self.call.shard is not None):
            yield panel, products
            return
        for first in range(panel.start, panel.stop, self.kernels.block_rows):
            rows = slice(first, min(first + self.kernels.block_rows, panel.stop))
            yield rows, products[rows.start - panel.start : rows.stop - panel.start]

    def blocks(self, chunk: slice) -> Iterator[tuple[slice, Tensor]]:
        """Of each block of a chunk."""
        for panel, products in self.panels(chunk):
            yield from self.cut(panel, products)

    def _gradient_rows_of(self, rows: slice) -> Tensor:
        """(C, V): where the dense gradient rows of these rows are, or go."""
        return self._buffers.gradient_rows(rows, self._chunk.start)

    def sweep(self, rows: slice, products: Tensor, live: Tensor) -> RowStatistics:
        """Sweep 1 of what ``cut`` gives, and a whole panel's sample. ``live``: (M,) rows that the loss may want."""
        self._keep_target_products(rows, products)
        given = (products, self.targets[rows], self.transform.of(rows))
        sampler, threshold, shard = self._sampler(), self._threshold, self.call.shard
        if sampler is None or threshold is None:
            partials = self.kernels.statistics(*given, sparse=self._tries_sparse())
            return self.kernels.finish(partials) if shard is None else finish(shard.merged(partials))
        how = (live[rows], threshold, self._uniforms[rows])
        if shard is None:
            partials, self._sampled = sampler.sparse_sweeps(*given, *how)
            return self.kernels.finish(partials)
        stats = finish(shard.merged(self.kernels.statistics(*given)))
        self._sampled = sampler.sample(*given, stats, *how)
        return stats

    def sweeps_at_once(self) -> bool:
        """Whether one launch may do both sweeps of the next panel, for coefficients that are known beforehand."""
        return self._one_launch is not None and not self._tries_sparse()

    def _sampler(self) -> SparsePanels | None:
        """What samples the next panel whole, if anything does."""
        return self._sparse_panels if self._tries_sparse() else None

    def sweep_and_spend(self, rows: slice, products: Tensor, linear: LinearWeights) -> RowStatistics:
        """Both sweeps of a panel in one launch. ``linear`` holds one index for each of the M rows."""
        assert self._one_launch is not None
        self._keep_target_products(rows, products)
        self._land_all()
        given = (products, self.targets[rows], linear.weights, linear.sequence_index[rows], self.transform.of(rows))
        partials = self._one_launch.both_sweeps(*given, self._gradient_rows_of(rows))
        self._add_dense(rows)
        return self.kernels.finish(partials)

    def wants_gradient(self) -> bool:
        return any(self.wanted)

    def spend(self, rows: slice, products: Tensor, stats: RowStatistics, wanted: Coefficients) -> None:
        """Sweep 2 of a block: sparse gradient rows are kept for the end, dense ones for the end of the chunk."""
        sweep = (products, self.targets[rows], stats, wanted, self.transform.of(rows))
        if self._sampled is not None:
            self._spend_sampled(rows, products, stats, wanted, self._sampled)
            self._sampled = None
            return
        if not self._tries_sparse():
            self._land_all()
            self.kernels.gradient(*sweep, self._gradient_rows_of(rows))
            self._add_dense(rows)
            return
        assert self._threshold is not None and isinstance(self.kernels, SparseBlocks)
        entries = self.kernels.sparse_gradient(*sweep, self._threshold, self._uniforms[rows])
        self._in_flight.append(_InFlight(rows, sweep, entries))
        while len(self._in_flight) >= self._buffers.num_panels:
            self._land()

    def _spend_sampled(
        self, panel: slice, products: Tensor, stats: RowStatistics, wanted: Coefficients, sampled: Sampled
    ) -> None:
        self._entries.append((panel, sampled.entries(stats, wanted)))
        for block in joined_slices(sampled.dense):
            rows = slice(panel.start + block.start, panel.start + block.stop)
            sweep = (products[block], self.targets[rows], stats.of(block), wanted.of(block), self.transform.of(rows))
            self.kernels.gradient(*sweep, self._gradient_rows_of(rows))
            self._dense_blocks.append(rows)

    def _land_all(self) -> None:
        """Before dense rows take a place, and before a buffer of logits is used again."""
        while self._in_flight:
            self._land()

    def _land(self) -> None:
        """The entries of the block that is longest in flight; its dense rows, if it has too many."""
        rows, sweep, entries_of = self._in_flight.popleft()
        entries = entries_of()
        self._tries.looked(sparse=entries is not None)
        if entries is not None:
            self._entries.append((rows, entries))
            return
        self.kernels.gradient(*sweep, self._gradient_rows_of(rows))
        if rows.start < self._chunk.start:  # the last of the chunk before, in its own panel
            self._spend_rows(rows)
        else:
            self._dense_blocks.append(rows)

    def _tries_sparse(self) -> bool:
        return self._threshold is not None and self._tries.due()

    def _add_dense(self, rows: slice) -> None:
        self._dense_blocks.append(rows)
        self._tries.passed_over()

    def _keep_target_products(self, rows: slice, products: Tensor) -> None:
        if self.transform.softcap is not None:
            column = self.targets[rows].clamp(min=0)[:, None]
            self._target_products[rows] = products.gather(1, column).squeeze(1)

    def end_chunk(self) -> None:
        """Spend the chunk's dense gradient rows on the accumulators. A block in flight may land in the next chunk."""
        if self._dense_blocks:
            self._land_all()
        self._spend_dense()
        most = GPU_FLUSH_ENTRIES if self.hidden.is_cuda else FLUSH_ENTRIES
        if sum(entries.value.numel() for _, entries in self._entries) > most:
            self._flush()

    def _spend_dense(self) -> None:
        for rows in joined_slices(sorted(self._dense_blocks, key=lambda block: block.start)):
            self._spend_rows(rows)
        self._dense_blocks = []

    def _spend_rows(self, rows: slice) -> None:
        """Dense gradient rows on the accumulators."""
        d = self._gradient_rows_of(rows)
        if self._d_hidden is not None:
            self.products.hidden_gradient(d, self._d_hidden[rows])
        if self.wanted[1]:
            first = self._d_weight is None
            d_weight = self._weight_gradient(zeros=False)
            self.products.weight_gradient(d, rows, d_weight[: self.call.vocab_size], add=not first)
        if self._d_bias is not None:
            self._d_bias[: self.call.vocab_size] += d.sum(0, dtype=self.dtype)

    def _weight_gradient(self, zeros: bool) -> Tensor:
        """The accumulator. The first dense rows write it instead of adding to zeros."""
        if self._d_weight is None:
            self._d_weight = new_gradient(self._weight_shape, self.dtype, self.hidden.device, zeros)
            self._d_weight[self.call.vocab_size :] = 0
        return self._d_weight

    def _flush(self, spend_weight: bool = True) -> None:
        """Spend the sparse gradient rows gathered so far."""
        if not self._entries:
            return
        [(rows, entries)] = self._join_entries()
        self._entries = []
        live, hidden = self.call.vocab_size, self.hidden[rows]
        if self._d_hidden is not None:
            self.kernels.add_times_weight(entries, self.products.weight, self._d_hidden[rows])
        if self.wanted[1] and spend_weight:
            self.kernels.add_transposed_times(entries, hidden, self._weight_gradient(zeros=True)[:live])
        if self._d_bias is not None:
            # A product with ones, and not a scatter: that would add in any order on a GPU.
            ones = hidden.new_ones(len(hidden), 1, dtype=self.dtype)
            self.kernels.add_transposed_times(entries, ones, self._d_bias[:live, None])

    def _join_entries(self) -> list[tuple[slice, Entries]]:
        """What was gathered, as one."""
        rows = slice(self._entries[0][0].start, self._entries[-1][0].stop)
        parts = [(entries.row + block.start - rows.start, *entries[1:]) for block, entries in self._entries]
        self._entries = [(rows, Entries(*(torch.cat(part) for part in zip(*parts, strict=True))))]
        return self._entries

    def end(self, stats: RowStatistics, wanted: Coefficients) -> Gradients:
        """All gradients, complete, from the (M,) statistics and coefficients of all rows."""
        self._land_all()
        self._spend_dense()
        self._buffers.release()
        value = at_targets.gradient(stats, wanted, self.transform, self.targets >= 0, self._target_products)
        late = self._late_weight_gradient(value)
        self._flush(spend_weight=late is None)
        if self.wanted[1] and late is None:
            self._weight_gradient(zeros=True)
        self._add_targets(value)
        if self.call.shard is not None and self._d_hidden is not None:
            self.call.shard.sum_(self._d_hidden)
        return Gradients(self._d_hidden, self._d_weight if late is None else late, self._d_bias)

    def _late_weight_gradient(self, value: Tensor) -> SparseProduct | None:
        """dW unmade, if all rows are sparse. The targets' entries, ``value``, are fp32 here: the sample is coarser."""
        makes_later = isinstance(self.kernels, LateProducts)
        if not (self.wanted[1] and makes_later and self._entries and self._d_weight is None):
            return None
        [(_, entries)] = self._join_entries()
        rows = torch.arange(len(value), dtype=torch.int32, device=value.device)
        at_target = Entries(rows, self.targets.clamp(min=0).int(), value.float())
        together = Entries(*(torch.cat(pair) for pair in zip(entries, at_target, strict=True)))
        assert isinstance(self.kernels, LateProducts)
        return self.kernels.keep_transposed(together, self.hidden, self._weight_shape[0])

    def _add_targets(self, value: Tensor) -> None:
        """After all other products, rounded once: dW of a token that is somebody's target is mostly this."""
        if self._d_hidden is not None:
            self.kernels.add_targets_times_weight(value, self.targets, self.products.weight, self._d_hidden)
        if self._d_weight is not None:
            self.kernels.add_targets_transposed_times(value, self.targets, self.hidden, self._d_weight)
        if self._d_bias is not None:
            ones = value.new_ones(len(value), 1)
            self.kernels.add_targets_transposed_times(value, self.targets, ones, self._d_bias[:, None])
