"""Sparse gradient rows: what matters exactly, of the dust an unbiased sample.

Of a softmax row, entries p >= eps are kept as they are. The rest is walked in order with the running sum of p / eps,
started at one uniform u in [0, 1): where its integer part steps, the entry is kept with the value eps. An entry is so
kept with probability p / eps and value eps, which is unbiased; the row's mass is right to within eps; and there are at
most 1 / eps + 1 entries. (Systematic sampling: Madow, 1949.)

To find the steps, most of a row is never looked at again: sums of tiles of TILE entries say in which tiles the integer
part steps or an entry reaches eps, and only those tiles are opened.

Letters: C rows of a block, V vocabulary, T tiles of a row, E entries.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from aapo_fast.ops.linear_policy.statistics import Entries

TILE = 64
DENSE_SHARE = 0.01
"""From this share of the vocabulary on, sparse products cost more than dense ones. Measured on a CPU (docs/LOG.md)."""


class Sample(NamedTuple):
    """Kept entries of the C probability rows of a block.

    Attributes:
        row, column: (E,) int64.
        value: (E,) their probability, or eps where sampled.
    """

    row: Tensor
    column: Tensor
    value: Tensor


def padded_width(vocab_size: int) -> int:
    """Columns of a scratch buffer whose rows are whole tiles."""
    return -(-vocab_size // TILE) * TILE


def sample_rows(padded_exps: Tensor, total: Tensor, threshold: float, uniforms: Tensor) -> Sample | None:
    """Systematic sample of ``exps / total``.

    Args:
        padded_exps: (C, whole tiles) with zeros beyond V.
        total: (C, 1) row sums.
        threshold: eps, in (0, 1].
        uniforms: (C,) in [0, 1).

    Returns:
        The entries, row by row; None where they would be so many that dense rows are cheaper. That choice depends on
        the probabilities alone, not on the uniforms, so it biases nothing.
    """
    tiles = padded_exps.unflatten(1, (-1, TILE))
    limit = total * threshold
    dust = tiles.sum(-1)
    heavy = tiles.amax(-1) >= limit
    heavy_row, _ = heavy.nonzero(as_tuple=True)
    opened = tiles[heavy]
    exact = opened >= limit[heavy_row]
    dust[heavy] = opened.masked_fill(exact, 0.0).sum(-1)
    end = (dust.double() / limit).cumsum_(1)
    expected = exact.sum() + end[:, -1].sum()
    if not expected <= DENSE_SHARE * padded_exps.numel():  # NaN, too: dense rows hand it on, where a sample would not
        return None

    end += uniforms.double()[:, None]
    start = torch.cat([uniforms.double()[:, None], end[:, :-1]], 1)
    visit = heavy | (end.floor() != start.floor())
    row, tile = visit.nonzero(as_tuple=True)
    opened, start, end = tiles[visit], start[visit][:, None], end[visit][:, None]
    exact = opened >= limit[row]
    running = opened.double().masked_fill(exact, 0.0).cumsum_(1)
    dust_of_tile = running[:, -1:]
    # Where within (start, end] of the row the running sum stands; exactly at its ends, so that no step is lost between
    # the sums of the tiles and the sums within them.
    inside = start + (end - start) * (running / dust_of_tile.clamp(min=torch.finfo(torch.float64).tiny))
    stands = torch.where(running >= dust_of_tile, end, inside)
    before = torch.cat([start, stands[:, :-1]], 1)
    keep = exact | (stands.floor() != before.floor()) & (opened > 0)
    which, place = keep.nonzero(as_tuple=True)
    value = torch.where(exact, opened / total[row], threshold)[keep]
    return Sample(row[which], tile[which] * TILE + place, value)


def add_times_weight(entries: Entries, weight: Tensor, out: Tensor) -> None:
    """``out += S @ weight``, (C, H)."""
    out.addmm_(_csr(entries.row, entries.column, entries.value, (out.shape[0], weight.shape[0])), weight)


def add_transposed_times(entries: Entries, hidden: Tensor, out: Tensor) -> None:
    """``out += S.T @ hidden``, (V, H). The order of the sums is fixed, so the result is the same at every run."""
    matrix = _csr(entries.column, entries.row, entries.value, (out.shape[0], hidden.shape[0]))
    out.addmm_(matrix, hidden)


def _csr(row: Tensor, column: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
    order = torch.argsort(row, stable=True)
    starts = torch.zeros(size[0] + 1, dtype=torch.int64, device=row.device)
    torch.cumsum(torch.bincount(row, minlength=size[0]), 0, out=starts[1:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, column[order], value[order], size, check_invariants=False)
