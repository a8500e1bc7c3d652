"""Sparse gradient rows in Triton: the sample of ``sparse.py``, and its two products.

A row is walked twice, to count its entries and to emit them, in sections that do not wait for each other. Where the
running sum of p / eps stands is kept in fixed point, int64 with ``_FRACTION`` bits below the one. Such sums are exact
in any order: sections join, the two walks agree, the sum never runs backwards, and dust counts from 2^-40 of a step on.
A tile is opened where its mass reaches eps (it may hold an entry that is kept exactly) or, to emit, where a step is.

Letters: C rows of a block, V vocabulary, T tiles and S sections of a row, E entries, H hidden.
"""
# ruff: noqa: N803  (Triton writes its compile-time constants in capitals)
# mypy: allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aapo_fast.ops.linear_policy.kernels_triton import (
    TILE,
    Tiles,
    coefficient,
    gradient_factor,
    launch,
    logits,
    row_factors,
    row_vectors,
)
from aapo_fast.ops.linear_policy.statistics import Coefficients, Entries, RowStatistics, Transform

DENSE_SHARE = 0.004
"""From this share of the vocabulary on, sparse products cost more than dense ones. By arithmetic, not measured: an
entry moves 4 H bytes at 4 TB/s, a dense row takes 4 H V operations at 650 TFLOP/s, which meet at 0.006."""

SECTION = 32
"""Tiles of a section: so many that few programs are idle, so few that a GPU is busy with the rows of one block."""

SMALLEST_THRESHOLD = 2.0**-20

GROUP, WIDTH = 8, 1024
"""Entries and columns that a program of the products holds at a time: 64 sums a thread, 16 KB of bf16 in flight."""

_FRACTION = tl.constexpr(40)
_ONE = tl.constexpr(2.0**40)


# --- the walk --------------------------------------------------------------------------------------------------------


@triton.jit
def _tile_mass(tile_level, tile_mass, tile, row_max, inverse):
    """Probability of a whole tile, from what sweep 1 kept."""
    return tl.exp(tl.load(tile_level + tile) - row_max) * tl.load(tile_mass + tile) * inverse


@triton.jit
def _open(products, tile, vocab, target, row_max, inverse, inner, outer, SOFTCAP: tl.constexpr, TILE: tl.constexpr):
    """(column, logit less the maximum, p, d z / d x) of the entries of a tile; p is zero at the target."""
    column = tile * TILE + tl.arange(0, TILE)
    held = (column < vocab) & (column != target)
    z, slope = logits(tl.load(products + column, mask=column < vocab, other=0.0), inner, outer, SOFTCAP)
    shifted = z - row_max
    return column, shifted, tl.where(held, tl.exp(shifted) * inverse, 0.0), slope


@triton.jit
def _fixed(p, threshold):
    """p / eps in fixed point."""
    return (p * (_ONE / threshold)).to(tl.int64)


@triton.jit
def _tiles_to_walk(num_tiles, row_max, total, on_logp, on_entropy, on_logsumexp):
    """No tile of a row that nothing depends on, or with NaN or infinity."""
    live = (on_logp != 0.0) | (on_entropy != 0.0) | (on_logsumexp != 0.0)
    finite = tl.abs(row_max) + total + 1.0 / total < float("inf")
    return tl.where(live, tl.where(finite, num_tiles, 0), 0)


_VECTORS = ["targets", "temperature", "row_max", "total", "entropy", "on_logp", "on_entropy", "on_logsumexp"]


@triton.jit(do_not_specialize_on_alignment=_VECTORS)
def count_kernel(
    products, stride, vocab, targets, temperature, scale, softcap, row_max, total, entropy, on_logp, on_entropy,
    on_logsumexp, tile_level, tile_mass, num_tiles, threshold, counts, dusts,
    SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr, LOGSUMEXP: tl.constexpr,
    TILE: tl.constexpr, SECTION: tl.constexpr,
):  # fmt: skip
    """Of each section, (C, S): ``counts``, int32, the entries that are not drawn; ``dusts``, int64, dust over eps."""
    row, section = tl.program_id(0).to(tl.int64), tl.program_id(1)
    products += row * stride
    tile_level += row * num_tiles
    tile_mass += row * num_tiles
    inner, outer = row_factors(row, temperature, scale, softcap, SOFTCAP, ROW_TEMPERATURE)
    top, sum_exps = tl.load(row_max + row), tl.load(total + row)
    walk = _tiles_to_walk(
        num_tiles, top, sum_exps, tl.load(on_logp + row), coefficient(on_entropy, row, ENTROPY),
        coefficient(on_logsumexp, row, LOGSUMEXP),
    )  # fmt: skip
    inverse, target = 1.0 / sum_exps, tl.load(targets + row)
    count = tl.full([], 0, tl.int32)
    dust = tl.full([], 0, tl.int64)
    for tile in range(section * SECTION, tl.minimum((section + 1) * SECTION, walk)):
        mass = _tile_mass(tile_level, tile_mass, tile, top, inverse)
        if mass >= threshold:
            _, _, p, _ = _open(products, tile, vocab, target, top, inverse, inner, outer, SOFTCAP, TILE)
            count += tl.sum((p >= threshold).to(tl.int32), 0)
            dust += tl.sum(_fixed(tl.where(p >= threshold, 0.0, p), threshold), 0)
        else:
            dust += _fixed(mass, threshold)
    place = row * tl.num_programs(1) + section
    tl.store(counts + place, count)
    tl.store(dusts + place, dust)


@triton.jit(do_not_specialize_on_alignment=_VECTORS)
def emit_kernel(
    products, stride, vocab, targets, temperature, scale, softcap, row_max, total, entropy, on_logp, on_entropy,
    on_logsumexp, tile_level, tile_mass, num_tiles, threshold, stands_before, starts, entry_row, entry_column,
    entry_value,
    SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr, LOGSUMEXP: tl.constexpr,
    TILE: tl.constexpr, SECTION: tl.constexpr,
):  # fmt: skip
    """Entries of section s to [starts[s], starts[s + 1]), in order of columns."""
    row, section = tl.program_id(0).to(tl.int64), tl.program_id(1)
    products += row * stride
    tile_level += row * num_tiles
    tile_mass += row * num_tiles
    inner, outer = row_factors(row, temperature, scale, softcap, SOFTCAP, ROW_TEMPERATURE)
    top, sum_exps = tl.load(row_max + row), tl.load(total + row)
    a, b = tl.load(on_logp + row), coefficient(on_entropy, row, ENTROPY)
    c = coefficient(on_logsumexp, row, LOGSUMEXP)
    walk = _tiles_to_walk(num_tiles, top, sum_exps, a, b, c)
    inverse, offset = 1.0 / sum_exps, tl.load(entropy + row) - tl.log(sum_exps)
    place = row * tl.num_programs(1) + section
    stands, slot, end = tl.load(stands_before + place), tl.load(starts + place), tl.load(starts + place + 1)
    target = tl.load(targets + row)
    for tile in range(section * SECTION, tl.minimum((section + 1) * SECTION, walk)):
        mass = _tile_mass(tile_level, tile_mass, tile, top, inverse)
        dust = _fixed(mass, threshold)
        if (mass >= threshold) | (((stands + dust) >> _FRACTION) != (stands >> _FRACTION)):
            column, shifted, p, slope = _open(products, tile, vocab, target, top, inverse, inner, outer, SOFTCAP, TILE)
            exact = p >= tl.where(mass >= threshold, threshold, 2.0)
            part = _fixed(tl.where(exact, 0.0, p), threshold)
            running = tl.cumsum(part, 0)
            measured = tl.sum(part, 0)
            if mass >= threshold:
                dust = measured
            # Between a tile's stored mass and the sum of its entries lies a rounding error, in which no step may be
            # lost or found twice: the last entry with any dust ends where the tile does, and none goes further.
            before = stands + tl.minimum(running - part, dust)
            after = stands + tl.where(running == measured, dust, tl.minimum(running, dust))
            sampled = (part > 0) & ((after >> _FRACTION) != (before >> _FRACTION))
            q = tl.where(exact, p, tl.where(sampled, threshold, 0.0))
            kept = (q > 0.0).to(tl.int32)
            to = slot + tl.cumsum(kept, 0) - 1
            fits = (q > 0.0) & (to < end)
            tl.store(entry_value + to, q * gradient_factor(shifted, offset, a, b, c, ENTROPY) * slope, mask=fits)
            tl.store(entry_column + to, column, mask=fits)
            tl.store(entry_row + to, tl.zeros_like(column) + row.to(tl.int32), mask=fits)
            slot += tl.sum(kept, 0)
        stands += dust


# --- the products ----------------------------------------------------------------------------------------------------


@triton.jit
def add_gathered_kernel(
    starts, index, value, source, source_stride, width, out, out_stride, GROUP: tl.constexpr, WIDTH: tl.constexpr
):
    """``out[s] += sum of value[e] * source[index[e]]`` for e in [starts[s], starts[s + 1]); WIDTH columns a program."""
    segment = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    if start == end:
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([GROUP, WIDTH], tl.float32)
    for first in range(start, end, GROUP):
        entry = first + tl.arange(0, GROUP)
        line = tl.load(index + entry, mask=entry < end, other=0).to(tl.int64)
        factor = tl.load(value + entry, mask=entry < end, other=0.0)
        part = tl.load(
            source + line[:, None] * source_stride + column[None, :],
            mask=(entry < end)[:, None] & (column < width)[None, :], other=0.0,
        )  # fmt: skip
        total += factor[:, None] * part.to(tl.float32)
    out += segment * out_stride + column
    tl.store(out, tl.load(out, mask=column < width) + tl.sum(total, 0), mask=column < width)


# --- launches --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is known of the entries before they are emitted. A row is cut into S sections.

    Attributes:
        stands: (C, S) int64, where the running sum stands at the beginning of each section, in fixed point.
        starts: (C * S + 1,) int64, the entries of earlier sections, row by row.
        expected: () fp64, entries of all rows in the mean over the uniforms.
    """

    stands: Tensor
    starts: Tensor
    expected: Tensor


def sparse_gradient(
    products: Tensor, targets: Tensor, tiles: Tiles, rows: RowStatistics, wanted: Coefficients, transform: Transform,
    threshold: float, uniforms: Tensor,
) -> Entries | None:  # fmt: skip
    """As in ``RowKernels``. Waits for the device once, to know how many entries there are."""
    walk = (products, targets, tiles, rows, wanted, transform, threshold)
    plan = count(*walk, uniforms)
    num_entries, expected = torch.stack([plan.starts[-1].double(), plan.expected]).tolist()
    # By the mean, which does not look at the uniforms: a choice that did would bias the sample.
    if expected > DENSE_SHARE * products.numel():
        return None
    return emit(*walk, plan, int(num_entries))


def count(
    products: Tensor, targets: Tensor, tiles: Tiles, rows: RowStatistics, wanted: Coefficients, transform: Transform,
    threshold: float, uniforms: Tensor,
) -> Plan:  # fmt: skip
    """How many entries there will be, and where. ``uniforms``: (C,) in [0, 1).

    Raises:
        ValueError: a threshold too small for the fixed-point sums.
    """
    if not SMALLEST_THRESHOLD <= threshold <= 1:
        raise ValueError(f"sparsity_threshold={threshold!r} must lie in [2**-20, 1] for implementation='triton'")
    shape = (products.shape[0], triton.cdiv(tiles.mass.shape[1], SECTION))
    counts = torch.empty(shape, dtype=torch.int32, device=products.device)
    dusts = torch.empty_like(counts, dtype=torch.int64)
    _walk(count_kernel, products, targets, tiles, rows, wanted, transform, threshold, counts, dusts)
    expected = counts.sum().double() + dusts.sum(dtype=torch.float64) / _ONE.value
    after = dusts.cumsum(1).add_((uniforms.double() * _ONE.value).long()[:, None])
    stands = after - dusts
    starts = dusts.new_zeros(counts.numel() + 1)
    torch.cumsum((counts + (after >> _FRACTION.value) - (stands >> _FRACTION.value)).view(-1), 0, out=starts[1:])
    return Plan(stands, starts, expected)


def emit(
    products: Tensor, targets: Tensor, tiles: Tiles, rows: RowStatistics, wanted: Coefficients, transform: Transform,
    threshold: float, plan: Plan, num_entries: int,
) -> Entries:  # fmt: skip
    """The entries that were counted: int32, int32, fp32, row by row. ``num_entries``: ``plan.starts[-1]``."""
    row = torch.zeros(num_entries, dtype=torch.int32, device=products.device)
    column, value = torch.zeros_like(row), torch.zeros_like(row, dtype=torch.float32)
    given = (products, targets, tiles, rows, wanted, transform, threshold)
    _walk(emit_kernel, *given, plan.stands, plan.starts, row, column, value)
    return Entries(row, column, value)


def _walk(
    kernel: Any, products: Tensor, targets: Tensor, tiles: Tiles, rows: RowStatistics, wanted: Coefficients,
    transform: Transform, threshold: float, *results: Tensor,
) -> None:  # fmt: skip
    # Without fused multiply-adds both kernels round alike, and find the same entries. One warp a section: it waits for
    # memory, again and again, and many wait at a time.
    launch(
        kernel, products, targets, transform, *row_vectors(rows, wanted), *tiles, tiles.level.stride(0),
        float(threshold), *results, ENTROPY=wanted.entropy is not None, LOGSUMEXP=wanted.logsumexp is not None,
        TILE=TILE, SECTION=SECTION, num_warps=1, enable_fp_fusion=False,
        programs_a_row=triton.cdiv(tiles.mass.shape[1], SECTION),
    )  # fmt: skip


def add_times_weight(entries: Entries, weight: Tensor, out: Tensor) -> None:
    """``out += S @ weight``: entries row by row, (V, H) of any dtype, (C, H) fp32. The order of the sums is fixed."""
    _add_gathered(entries.row, entries.column, entries.value, weight, out)


def add_transposed_times(entries: Entries, hidden: Tensor, out: Tensor) -> None:
    """``out += S.T @ hidden``: (C, H) of any dtype, (V, H) fp32. The order of the sums is fixed."""
    column, order = torch.sort(entries.column, stable=True)
    _add_gathered(column, entries.row[order], entries.value[order], hidden, out)


def _add_gathered(segment: Tensor, index: Tensor, value: Tensor, source: Tensor, out: Tensor) -> None:
    """``out[segment[e]] += value[e] * source[index[e]]``, with ``segment`` in ascending order."""
    lines, width = out.shape
    starts = torch.searchsorted(segment, torch.arange(lines + 1, dtype=segment.dtype, device=segment.device))
    source = source if source.stride(1) == 1 else source.contiguous()
    grid = (lines, triton.cdiv(width, WIDTH))
    with torch.cuda.device_of(out):
        add_gathered_kernel[grid](
            starts, index, value, source, source.stride(0), width, out, out.stride(0), GROUP=GROUP, WIDTH=WIDTH,
            num_warps=4,
        )  # fmt: skip
