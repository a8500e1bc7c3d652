"""The row kernels in C++ (csrc/): a row is one thread's from its first column to its last, and stays in its cache.

Letters: C rows of a block, V vocabulary, T tiles of a row, E entries.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aapo_fast.ops import native
from aapo_fast.ops.linear_policy import targets as at_targets
from aapo_fast.ops.linear_policy.rows_torch import even_parts
from aapo_fast.ops.linear_policy.statistics import (
    Coefficients,
    Entries,
    Partials,
    RowStatistics,
    Sampled,
    Transform,
    finish,
)
from aapo_fast.ops.linear_policy.uniforms import row_uniforms

BLOCK_BYTES = 16 * 2**20
"""Size of a block: what a second sweep reads again should still be in the cache that the cores share. Of sparse rows it
is what is sparse or dense together."""

ROWS_A_THREAD = 8
"""Rows that a block has at least for each thread: an eighth of them, which is sampled first, is then one for each."""

TILE, PANEL = 64, 1024
"""Columns of which sweep 1 keeps the sum, and the maximum; as in csrc/kernels.h."""

DENSE_SHARE = 0.08
"""From this share of the vocabulary on, sparse products cost more than dense ones. Measured on two cores it is 0.11
(docs/LOG.md); the rest is kept in hand for processors that compute more for each byte they read."""


class _Found(NamedTuple):
    """Entries of C rows: (C, capacity) columns and probabilities, of which row r has the first ``starts[r + 1] -
    starts[r]``; and of each block whether it is to be dense.
    """

    column: Tensor
    p: Tensor
    starts: Tensor
    dense: Tensor


class NativeRows:
    """``RowKernels``, ``OneLaunch`` and ``SparsePanels`` for fp32 products on the CPU.

    Args:
        chunk: the (C, V) buffer that panels and blocks are views of.
        columns: by which rows are cut into blocks: V, or what shards of unequal V have agreed on.

    Raises:
        ValueError: the products are not fp32.
        RuntimeError: the native extension cannot be used.
    """

    blocks_between_tries = 0

    def __init__(self, chunk: Tensor, columns: int | None = None) -> None:
        if chunk.dtype != torch.float32:
            raise ValueError(f"implementation='native' computes in fp32, not {chunk.dtype}; use implementation='torch'")
        self._run, self._level = native.operators(), native.level()
        rows, vocab = chunk.shape
        fit = max(BLOCK_BYTES // max(1, 4 * (columns or vocab)), ROWS_A_THREAD * torch.get_num_threads())
        self.block_rows = even_parts(rows, fit)
        kept = 2 * -(-vocab // TILE) + -(-vocab // PANEL)
        self._tiles = chunk.new_empty(0, kept)
        self._room: tuple[Tensor, Tensor] | None = None

    def statistics(self, products: Tensor, targets: Tensor, transform: Transform, sparse: bool = True) -> Partials:
        partials = products.new_empty(4, products.shape[0])
        tiles = self._tiles_of(products.shape[0]) if sparse else None
        self._run.statistics(*_block(products, targets, transform), partials, tiles, self._level)
        return Partials(*partials)

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
        self._run.gradient(*_block(products, targets, transform), *_wanted(rows, wanted), self._level)
        _move(products, out)

    def both_sweeps(
        self, products: Tensor, targets: Tensor, weights: Tensor, index: Tensor, transform: Transform, out: Tensor
    ) -> Partials:
        partials = products.new_empty(4, products.shape[0])
        on_logp = weights.float()[index].where(targets >= 0, 0.0)
        self._run.both_sweeps(*_block(products, targets, transform), on_logp, partials, self._level)
        _move(products, out)
        return Partials(*partials)

    def sparse_sweeps(
        self, products: Tensor, targets: Tensor, transform: Transform, live: Tensor, threshold: float, uniforms: Tensor
    ) -> tuple[Partials, Sampled]:
        num_rows, vocab = products.shape
        partials, given = products.new_empty(4, num_rows), _block(products, targets, transform)
        tiles, found = self._tiles_of(min(num_rows, self.block_rows)), self._room_for(num_rows, vocab, threshold)
        self._run.sparse_sweeps(
            *given, live.contiguous(), partials, tiles, uniforms.contiguous(), threshold, self.block_rows,
            DENSE_SHARE * vocab, *found, self._level,
        )  # fmt: skip
        return Partials(*partials), self._sampled(given, found)

    def sample(
        self, products: Tensor, targets: Tensor, transform: Transform, rows: RowStatistics, live: Tensor,
        threshold: float, uniforms: Tensor,
    ) -> Sampled:  # fmt: skip
        num_rows, vocab = products.shape
        given, found = _block(products, targets, transform), self._room_for(num_rows, vocab, threshold)
        self._run.sample_entries(
            *given, rows.row_max, rows.total, live.contiguous(), self._tiles, uniforms.contiguous(), threshold,
            self.block_rows, DENSE_SHARE * vocab, *found, self._level,
        )  # fmt: skip
        return self._sampled(given, found)

    def uniforms(self, seed: int, rows: Tensor) -> Tensor:
        return row_uniforms(seed, rows)

    def _tiles_of(self, num_rows: int) -> Tensor:
        """What sweep 1 keeps for the sample."""
        if self._tiles.shape[0] < num_rows:
            self._tiles = self._tiles.new_empty(num_rows, self._tiles.shape[1])
        return self._tiles

    def _room_for(self, num_rows: int, vocab: int, threshold: float) -> _Found:
        """What is found goes to the same memory for every panel. Little of it is ever touched."""
        num_blocks = -(-num_rows // self.block_rows)
        capacity = min(vocab, int(1 / threshold) + 2)
        if self._room is None or self._room[0].shape[0] < num_rows or self._room[0].shape[1] != capacity:
            column = torch.empty(num_rows, capacity, dtype=torch.int32, device="cpu")
            self._room = column, torch.empty_like(column, dtype=torch.float32)
        starts, dense = (torch.empty(n, dtype=torch.int64, device="cpu") for n in (num_rows + 1, num_blocks))
        return _Found(*self._room, starts, dense)

    def _sampled(self, given: tuple[Any, ...], found: _Found) -> Sampled:
        num_rows, size = len(found.starts) - 1, self.block_rows
        firsts = [number * size for number, is_dense in enumerate(found.dense.tolist()) if is_dense]
        blocks = [slice(first, min(first + size, num_rows)) for first in firsts]
        return Sampled(blocks, functools.partial(self._packed, given, found))

    def _packed(self, given: tuple[Any, ...], found: _Found, rows: RowStatistics, wanted: Coefficients) -> Entries:
        """``given``: what all sweeps begin with."""
        most = int(found.starts[-1])  # and fewer where rows turn out to be of no weight
        row, column, value = torch.empty(3, most, dtype=torch.int32, device="cpu")
        entries, count = Entries(row, column, value.view(torch.float32)), found.starts.new_empty(1)
        self._run.pack_entries(
            *given, *_wanted(rows, wanted), found.column, found.p, found.starts, *entries, count, self._level
        )
        return entries if count == most else Entries(*(part[: int(count)] for part in entries))

    def add_times_weight(self, entries: Entries, weight: Tensor, out: Tensor) -> None:
        self._run.add_times_weight(*_compact(entries), _rows_contiguous(weight), out, self._level)

    def add_transposed_times(self, entries: Entries, hidden: Tensor, out: Tensor) -> None:
        self._run.add_transposed_times(*_compact(entries), _rows_contiguous(hidden), out, self._level)

    def add_targets_times_weight(self, value: Tensor, target: Tensor, weight: Tensor, out: Tensor) -> None:
        at_targets.add_times_weight(value, target, weight, out)

    def add_targets_transposed_times(self, value: Tensor, target: Tensor, hidden: Tensor, out: Tensor) -> None:
        at_targets.add_transposed_times(value, target, hidden, out)


def _block(products: Tensor, targets: Tensor, transform: Transform) -> tuple[Any, ...]:
    """The arguments that all sweeps begin with."""
    t = transform.temperature
    row_temperature = t.float().contiguous() if isinstance(t, Tensor) else products.new_full(targets.shape, float(t))
    softcap = None if transform.softcap is None else float(transform.softcap)
    return products, targets.contiguous(), row_temperature, float(transform.scale), softcap


def _wanted(rows: RowStatistics, wanted: Coefficients) -> tuple[Tensor | None, ...]:
    """The statistics that sweep 2 needs, and the coefficients."""
    return rows.row_max, rows.total, rows.entropy, *(None if d is None else d.contiguous() for d in wanted)


def _compact(entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
    return entries.row.int(), entries.column.int(), entries.value


def _rows_contiguous(factor: Tensor) -> Tensor:
    return factor if factor.stride(1) == 1 else factor.contiguous()


def _move(products: Tensor, out: Tensor) -> None:
    """Gradient rows are made in place; ``out`` may be another buffer."""
    if out.data_ptr() != products.data_ptr():
        out.copy_(products)
