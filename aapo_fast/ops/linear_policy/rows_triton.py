"""The row kernels in Triton, behind the interface. A block is the whole panel.

Letters: C rows of a panel, V vocabulary (of this shard), T tiles of a row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from aapo_fast.ops.linear_policy import kernels_triton, sparse_triton, targets_triton
from aapo_fast.ops.linear_policy.kernels_triton import (
    BLOCK,
    TILE,
    TILED_BLOCK,
    Tiles,
    both_sweeps_kernel,
    gradient_kernel,
    launch,
    row_vectors,
    statistics_kernel,
)
from aapo_fast.ops.linear_policy.statistics import (
    Coefficients,
    Entries,
    Partials,
    RowStatistics,
    SparseProduct,
    Transform,
)


class TritonRows:
    """``RowKernels``, ``OneLaunch``, ``SparseBlocks`` and ``LateProducts`` for fp32 products on a GPU.

    A block is the whole panel.

    Args:
        chunk: a (C, V) buffer of logits, as blocks are views of.
        sparse: keep of each tile what ``sparse_gradient`` needs.
    """

    block_rows = sys.maxsize
    blocks_between_tries = 7

    def __init__(self, chunk: Tensor, sparse: bool = False) -> None:
        if chunk.dtype != torch.float32:
            raise ValueError(f"implementation='triton' computes in fp32, not {chunk.dtype}; use implementation='torch'")
        self._sparse = sparse
        self._tiles: Tiles | None = None

    def statistics(self, products: Tensor, targets: Tensor, transform: Transform, sparse: bool = True) -> Partials:
        partials = products.new_empty(4, products.shape[0])
        level, mass, keep = partials, partials, self._sparse and sparse
        if keep:  # of this block alone: the one before may still wait to be spent
            mass = products.new_empty(products.shape[0], triton.cdiv(products.shape[1], TILE))
            level, mass = self._tiles = Tiles(products.new_empty(products.shape[0]), mass)
        launch(
            statistics_kernel, products, targets, transform, partials, products.shape[0], level, mass, mass.stride(0),
            KEEP_TILES=keep, TILE=TILE, BLOCK=TILED_BLOCK if keep else BLOCK,
        )  # fmt: skip
        return Partials(*partials)

    def finish(self, partials: Partials) -> RowStatistics:
        return kernels_triton.finish(partials)

    def gradient(
        self, products: Tensor, targets: Tensor, rows: RowStatistics, wanted: Coefficients, transform: Transform,
        out: Tensor,
    ) -> None:  # fmt: skip
        """``out`` may be ``products``, another buffer, or a narrower view of the front of each row of ``products``."""
        launch(
            gradient_kernel, products, targets, transform, *row_vectors(rows, wanted), out, out.stride(0),
            ENTROPY=wanted.entropy is not None, LOGSUMEXP=wanted.logsumexp is not None, APART=_apart(products, out),
            BLOCK=BLOCK,
        )  # fmt: skip

    def both_sweeps(
        self, products: Tensor, targets: Tensor, weights: Tensor, index: Tensor, transform: Transform, out: Tensor
    ) -> Partials:
        partials = products.new_empty(4, products.shape[0])
        launch(
            both_sweeps_kernel, products, targets, transform, weights.float().contiguous(), index.contiguous(), out,
            out.stride(0), partials, products.shape[0], APART=_apart(products, out), BLOCK=BLOCK,
        )  # fmt: skip
        return Partials(*partials)

    def uniforms(self, seed: int, rows: Tensor) -> Tensor:
        return sparse_triton.row_uniforms(seed, rows)

    def sparse_gradient(
        self, products: Tensor, targets: Tensor, rows: RowStatistics, wanted: Coefficients, transform: Transform,
        threshold: float, uniforms: Tensor,
    ) -> Callable[[], Entries | None]:  # fmt: skip
        assert self._tiles is not None, "made without sparse=True"
        tiles, self._tiles = self._tiles, None
        return sparse_triton.sparse_gradient(products, targets, tiles, rows, wanted, transform, threshold, uniforms)

    def add_times_weight(self, entries: Entries, weight: Tensor, out: Tensor) -> None:
        sparse_triton.add_times_weight(entries, weight, out)

    def add_transposed_times(self, entries: Entries, hidden: Tensor, out: Tensor) -> None:
        sparse_triton.add_transposed_times(entries, hidden, out)

    def add_targets_times_weight(self, value: Tensor, target: Tensor, weight: Tensor, out: Tensor) -> None:
        targets_triton.add_times_weight(value, target, weight, out)

    def add_targets_transposed_times(self, value: Tensor, target: Tensor, hidden: Tensor, out: Tensor) -> None:
        targets_triton.add_transposed_times(value, target, hidden, out)

    def keep_transposed(self, entries: Entries, hidden: Tensor, num_lines: int) -> SparseProduct:
        return SparseProduct(*sparse_triton.transposed(entries, num_lines), hidden)


def _apart(products: Tensor, out: Tensor) -> bool:
    """In place both begin where the first row does, whatever else is in the same piece of memory."""
    return out.data_ptr() != products.data_ptr()
