"""The pass: rows in chunks, each chunk visited once.

A chunk is what one pair of gradient products takes; a panel of it is what one product of logits takes; a block of that
is what the row kernels sweep while it is in cache. On the CPU panel and chunk are one, and gradient rows overwrite the
logits; on a GPU gradient rows are narrower than logits and have a buffer of their own.

Reading order: sizes; ``Call``, what is asked; ``Pass``, buffers and accumulators of a run over the rows. The runs
themselves are in ``runs.py``.

Letters: N rows of the call, M rows visited, C rows of a chunk or block, H hidden, V vocabulary of this shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aapo_fast.objectives import LinearWeights
from aapo_fast.ops.linear_policy import targets as at_targets
from aapo_fast.ops.linear_policy.products import Products
from aapo_fast.ops.linear_policy.rows_torch import TorchRows, even_parts
from aapo_fast.ops.linear_policy.sharded import VocabularyShard
from aapo_fast.ops.linear_policy.statistics import (
    Coefficients,
    Entries,
    OneLaunch,
    Partials,
    RowKernels,
    RowStatistics,
    Transform,
    compute_dtype,
    finish,
)
from aapo_fast.ops.linear_policy.uniforms import row_uniforms

CHUNK_ROWS = 512
CHUNK_BYTES = 384 * 2**20
"""On the CPU a chunk has at most so many rows and its (C, V) buffer so many bytes. With fewer rows the products are
slower (dW is read and written once a chunk), with more they are no faster: docs/LOG.md."""

GPU_LOGIT_BYTES = 320 * 2**20
GPU_GRADIENT_BYTES = 640 * 2**20
"""On a GPU: the (panel, V) fp32 logits and the (chunk, V) bf16 gradient rows. Each chunk reads and writes dW once, 5 GB
at (151936, 4096); together they stay below 1 GiB. By arithmetic, not yet measured."""

FLUSH_ENTRIES = 4 * 2**20
"""Sparse entries that are gathered before they are spent on the accumulators."""


@dataclass(frozen=True, eq=False)
class Call:
    """What a call asks, beside its tensors and its objective.

    Attributes:
        transform: from raw products to logits; a per-row temperature is (N,).
        vocab_size: rows of the weight that are tokens; those beyond are padding.
        shard: this rank's part of a vocabulary-parallel head, or None.
        threshold: eps of sparse gradient rows, or None for exact ones.
        seed: of their sample.
        implementation: of the row kernels, resolved: "torch", "triton" or "native".
        drop_rows: leave out rows without weight; on a GPU, finding them waits for the device once.
        autocast: what hidden and weight are cast to, or None.
    """

    transform: Transform
    vocab_size: int
    shard: VocabularyShard | None
    threshold: float | None
    seed: int
    implementation: str
    drop_rows: bool
    autocast: torch.dtype | None


class Gradients(NamedTuple):
    """In the compute dtype, None where not wanted: (M, H), (V, H) and (V,)."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Pass:
    """Operands, buffers and gradient accumulators of one run over the rows.

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
        self.transform = call.transform.of(numbers)
        vocab_size = live if call.shard is None else call.shard.vocab_size
        self.has_target = (targets >= 0) & (targets < vocab_size)
        here = targets if call.shard is None else targets - call.shard.start
        self.targets = torch.where(self.has_target & (here >= 0) & (here < live), here, -1)
        # -inf rules a token out. A large finite number does the same without the NaN of 0 * inf in the entropy.
        self.bias = None if bias is None else bias[:live].to(self.dtype).clamp(min=-1e30)
        self.products = Products(hidden, weight[:live], self.dtype)
        columns = live if call.shard is None else call.shard.columns
        self._allocate(hidden.shape[0], live, columns)
        self.kernels = _row_kernels(call, self._logits, columns)
        zeros, empty = self._logits.new_zeros, self._logits.new_empty
        self.gradients = Gradients(
            zeros(hidden.shape) if wanted[0] else None,
            empty(weight.shape) if wanted[1] else None,
            zeros(weight.shape[:1]) if wanted[2] else None,
        )
        # The first dense chunk writes dW instead of adding to zeros: 2.5 GB at (151936, 4096), not made and not read.
        self._weight_gradient_is_empty = wanted[1]
        self._target_products = zeros(hidden.shape[0])
        self._uniforms = numbers if call.threshold is None else row_uniforms(call.seed, numbers)
        self._dense_blocks: list[slice] = []
        self._entries: list[tuple[slice, Entries]] = []

    def _allocate(self, num_rows: int, vocab: int, columns: int) -> None:
        hidden, narrow = self.hidden, self.products.gradient_dtype
        self.chunk_rows, self.panel_rows = buffer_rows(num_rows, columns, self.dtype, narrow, hidden.is_cuda)
        self._logits = _aligned(self.panel_rows, vocab, self.dtype, hidden.device)
        in_place = narrow == self.dtype
        self._gradient_rows = self._logits if in_place else _aligned(self.chunk_rows, vocab, narrow, hidden.device)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.hidden.shape[0], self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, self.hidden.shape[0]))

    def blocks(self, chunk: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of each block: its rows, its (C, V) raw products, and where its gradient rows go, perhaps the same memory."""
        for start in range(chunk.start, chunk.stop, self.panel_rows):
            panel = slice(start, min(start + self.panel_rows, chunk.stop))
            logits = self._logits[: panel.stop - start]
            self.products.logits(panel, logits)
            if self.bias is not None:
                logits += self.bias
            for first in range(start, panel.stop, self.kernels.block_rows):
                rows = slice(first, min(first + self.kernels.block_rows, panel.stop))
                gradient = self._gradient_rows[rows.start - chunk.start : rows.stop - chunk.start]
                yield rows, logits[rows.start - start : rows.stop - start], gradient

    def sweep(self, rows: slice, products: Tensor) -> RowStatistics:
        """Sweep 1 of a block."""
        self._keep_target_products(rows, products)
        partials = self.kernels.statistics(products, self.targets[rows], self.transform.of(rows))
        return finish(partials if self.call.shard is None else self.call.shard.merged(partials))

    def can_sweep_at_once(self) -> bool:
        """Whether one launch may do both sweeps, for coefficients that are known beforehand."""
        whole_rows = self.call.shard is None and self.call.threshold is None
        return whole_rows and self.wants_gradient() and isinstance(self.kernels, OneLaunch)

    def sweep_and_spend(self, rows: slice, products: Tensor, gradient: Tensor, linear: LinearWeights) -> Partials:
        """Both sweeps of a block in one launch. ``linear`` holds one index for each of the M rows."""
        assert isinstance(self.kernels, OneLaunch)
        self._keep_target_products(rows, products)
        transform, index = self.transform.of(rows), linear.sequence_index[rows]
        partials = self.kernels.both_sweeps(products, self.targets[rows], linear.weights, index, transform, gradient)
        self._dense_blocks.append(rows)
        return partials

    def wants_gradient(self) -> bool:
        return any(g is not None for g in self.gradients)

    def spend(
        self, rows: slice, products: Tensor, gradient: Tensor, stats: RowStatistics, wanted: Coefficients
    ) -> None:
        """Sweep 2 of a block: sparse gradient rows are kept for ``_flush``, dense ones for the end of the chunk."""
        sweep = (products, self.targets[rows], stats, wanted, self.transform.of(rows))
        if self.call.threshold is not None:
            entries = self.kernels.sparse_gradient(*sweep, self.call.threshold, self._uniforms[rows])
            if entries is not None:
                self._entries.append((rows, entries))
                return
        self.kernels.gradient(*sweep, gradient)
        self._dense_blocks.append(rows)

    def _keep_target_products(self, rows: slice, products: Tensor) -> None:
        if self.transform.softcap is not None:
            column = self.targets[rows].clamp(min=0)[:, None]
            self._target_products[rows] = products.gather(1, column).squeeze(1)

    def end_chunk(self, chunk: slice) -> None:
        """Spend the chunk's dense gradient rows on the accumulators."""
        for rows in _joined(self._dense_blocks):
            d = self._gradient_rows[rows.start - chunk.start : rows.stop - chunk.start]
            if self.gradients.hidden is not None:
                self.products.hidden_gradient(d, self.gradients.hidden[rows])
            if self.gradients.weight is not None:
                out, first = self.gradients.weight[: self.call.vocab_size], self._weight_gradient_is_empty
                self.products.weight_gradient(d, rows, out, add=not first)
                self._weight_gradient_is_empty = False
            if self.gradients.bias is not None:
                self.gradients.bias[: self.call.vocab_size] += d.sum(0, dtype=self.dtype)
        self._dense_blocks = []
        if sum(entries.value.numel() for _, entries in self._entries) > FLUSH_ENTRIES:
            self._flush()

    def _flush(self) -> None:
        """Spend the sparse gradient rows gathered so far."""
        if not self._entries:
            return
        rows = slice(self._entries[0][0].start, self._entries[-1][0].stop)
        parts = [(entries.row + block.start - rows.start, *entries[1:]) for block, entries in self._entries]
        entries = Entries(*(torch.cat(part) for part in zip(*parts, strict=True)))
        self._entries = []
        live, hidden = self.call.vocab_size, self.hidden[rows]
        if self.gradients.hidden is not None:
            self.kernels.add_times_weight(entries, self.products.weight, self.gradients.hidden[rows])
        if self.gradients.weight is not None:
            self._fill_weight_gradient()
            self.kernels.add_transposed_times(entries, hidden, self.gradients.weight[:live])
        if self.gradients.bias is not None:
            # A product with ones, and not a scatter: that would add in any order on a GPU.
            ones = hidden.new_ones(len(hidden), 1, dtype=self.dtype)
            self.kernels.add_transposed_times(entries, ones, self.gradients.bias[:live, None])

    def end(self, stats: RowStatistics, wanted: Coefficients) -> Gradients:
        """All gradients, complete, from the (M,) statistics and coefficients of all rows."""
        self._flush()
        if self.gradients.weight is not None:
            self._fill_weight_gradient()
            self.gradients.weight[self.call.vocab_size :] = 0
        self._add_targets(stats, wanted)
        if self.call.shard is not None and self.gradients.hidden is not None:
            self.call.shard.sum_(self.gradients.hidden)
        return self.gradients

    def _fill_weight_gradient(self) -> None:
        if self._weight_gradient_is_empty and self.gradients.weight is not None:
            self.gradients.weight.zero_()
        self._weight_gradient_is_empty = False

    def _add_targets(self, stats: RowStatistics, wanted: Coefficients) -> None:
        """After all other products, rounded once: dW of a token that is somebody's target is mostly this."""
        held = self.targets >= 0
        value = at_targets.gradient(stats, wanted, self.transform, held, self._target_products)
        if self.gradients.hidden is not None:
            self.kernels.add_targets_times_weight(value, self.targets, self.products.weight, self.gradients.hidden)
        if self.gradients.weight is not None:
            self.kernels.add_targets_transposed_times(value, self.targets, self.hidden, self.gradients.weight)
        if self.gradients.bias is not None:
            ones = value.new_ones(len(value), 1)
            self.kernels.add_targets_transposed_times(value, self.targets, ones, self.gradients.bias[:, None])


def buffer_rows(
    num_rows: int, vocab: int, dtype: torch.dtype, gradient_dtype: torch.dtype, on_gpu: bool
) -> tuple[int, int]:
    """Rows of a chunk and of a panel: of the buffers of gradient rows and of logits. They are one where gradient rows
    have the compute dtype, and so is the buffer.
    """
    row_bytes = vocab * dtype.itemsize
    if not on_gpu:
        rows = even_parts(num_rows, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes))
        return rows, rows
    if gradient_dtype == dtype:
        rows = even_parts(num_rows, (GPU_LOGIT_BYTES + GPU_GRADIENT_BYTES) // row_bytes)
        return rows, rows
    chunk = even_parts(num_rows, GPU_GRADIENT_BYTES // (vocab * gradient_dtype.itemsize))
    return chunk, even_parts(chunk, GPU_LOGIT_BYTES // row_bytes)


def _aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) whose rows start at multiples of 256 bytes on a GPU, for the vendor's fastest products."""
    unit = 256 // dtype.itemsize if device.type == "cuda" else 1
    return torch.empty(rows, -(-columns // unit) * unit, dtype=dtype, device=device)[:, :columns]


def _row_kernels(call: Call, logits: Tensor, columns: int) -> RowKernels:
    if call.implementation == "triton":
        from aapo_fast.ops.linear_policy.rows_triton import TritonRows

        return TritonRows(logits, sparse=call.threshold is not None)
    if call.implementation == "native":
        from aapo_fast.ops.linear_policy.rows_native import NativeRows

        return NativeRows(logits, sparse=call.threshold is not None, columns=columns)
    return TorchRows(logits, columns)


def _joined(blocks: list[slice]) -> Iterator[slice]:
    """Neighbouring slices as one."""
    current: slice | None = None
    for block in blocks:
        if current is not None and current.stop == block.start:
            current = slice(current.start, block.stop)
            continue
        if current is not None:
            yield current
        current = block
    if current is not None:
        yield current
