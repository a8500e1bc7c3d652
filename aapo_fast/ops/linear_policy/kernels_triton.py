"""The dense row kernels in Triton: one program a row, fp32, any GPU that Triton knows, and its interpreter.

Reading order: from products to logits; sweep 1 and sweep 2 as functions of one row; the three kernels that are made of
them; how they are launched. ``rows_triton.py`` puts them behind the interface, ``sparse_triton.py`` has sparse rows.

Letters: C rows of a block, V vocabulary (of this shard), T tiles of a row.
"""
# ruff: noqa: N803  (Triton writes its compile-time constants in capitals)
# mypy: allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aapo_fast.ops.linear_policy.statistics import Coefficients, Partials, RowStatistics, Transform

BLOCK = 4096
"""Columns that a program holds at a time: 16 a thread, four 16-byte loads in flight."""

TILED_BLOCK = 2048
"""The same of the sweep that keeps tiles, which needs more registers."""

NUM_WARPS = 8

TILE = 256
"""Columns of a tile, of which sweep 1 keeps the sum for sparse rows: 4 bytes for 1 KB of logits."""

_LOWEST = tl.constexpr(-1e34)
"""Stands for minus infinity where differences are taken: below any logit, and finite times any count."""


# --- from products to logits -----------------------------------------------------------------------------------------

_LOG2_E, _LOG2_E_REST = tl.constexpr(1.44269502162933), tl.constexpr(1.92596303e-8)
_LN_2 = tl.constexpr(0.693147180559945)
_ZERO_BELOW = tl.constexpr(-150.0)


@triton.jit
def exp(x):
    """exp in fp32, to about an ulp; zero below -150.

    ``tl.exp`` is ``exp2(x log2 e)``: what the product rounds away makes it wrong by x times that, 3e-7 at x = -10,
    where the digits of peaked rows are.
    """
    x = tl.maximum(x, _ZERO_BELOW, propagate_nan=tl.PropagateNan.ALL)  # of -inf the rest would be NaN
    power = x * _LOG2_E
    rest = tl.fma(x, _LOG2_E_REST, tl.fma(x, _LOG2_E, -power))
    e = tl.exp2(power)
    return tl.fma(e, rest * _LN_2, e)


@triton.jit
def reciprocal(total):
    """1 / total to an ulp: of a peaked row this is most of the gradient, and the hardware's is 2 ulp off."""
    near = 1.0 / total
    return tl.fma(near, tl.fma(-total, near, 1.0), near)


@triton.jit
def row_factors(row, temperature, scale, softcap, SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr):
    """``inner`` and ``outer`` of ``logits``; ``temperature`` is a number, or points to one a row."""
    if ROW_TEMPERATURE:
        temperature = tl.load(temperature + row)
    if SOFTCAP:
        inner, outer = tl.div_rn(scale, softcap), tl.div_rn(softcap, temperature)
    else:
        inner, outer = tl.div_rn(scale, temperature), 1.0
    return inner, outer


@triton.jit
def logits(x, inner, outer, SOFTCAP: tl.constexpr):
    """z and d z / d x of raw products x: ``z = outer tanh(inner x)``, or ``z = inner x``."""
    if SOFTCAP:
        y = tl.abs(x * inner)
        e = exp(-2.0 * y)
        r = 1.0 / (1.0 + e)
        # (1 - e) / (1 + e) loses its digits near zero; there, a polynomial fitted on [0, 0.5] to 1.5e-8.
        y2 = y * y
        near_zero = y + y * y2 * (-0.33333144 + y2 * (0.13325879 + y2 * (-0.0530455 + y2 * 0.01724149)))
        size = tl.where(y < 0.5, near_zero, (1.0 - e) * r) * outer
        z = tl.where(x * inner < 0.0, -size, size)
        # 1 - tanh^2 without the cancellation
        slope = (4.0 * inner * outer) * (e * r * r)
    else:
        z, slope = x * inner, inner
    return z, slope


# --- the sweeps of one row -------------------------------------------------------------------------------------------


@triton.jit
def _sweep_1(products, vocab, target, inner, outer, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """(row_max, total, weighted) of the row that ``products`` points to, all but its target.

    Sums run beside each other, each over every fourth stretch of columns of a thread and from a maximum of its own, and
    meet at the end: no warp waits for another one on the way. What an addition rounds away is added up too: dozens of
    roundings of a total near one would cost a peaked row its last digits.
    """
    sums: tl.constexpr = BLOCK // 4
    place = tl.arange(0, 4)[:, None] * sums + tl.arange(0, sums)[None, :]
    own_max = tl.full([sums], _LOWEST, tl.float32)
    total, total_rest = tl.zeros([sums], tl.float32), tl.zeros([sums], tl.float32)
    weighted, weighted_rest = tl.zeros([sums], tl.float32), tl.zeros([sums], tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + place
        held = (column < vocab) & (column != target)
        z, _ = logits(tl.load(products + column, mask=column < vocab, other=0.0), inner, outer, SOFTCAP)
        z = tl.where(held, z, float("-inf"))
        before, own_max = own_max, tl.maximum(own_max, tl.maximum(tl.max(z, 0), _LOWEST))
        shifted = z - own_max[None, :]
        e = exp(shifted)
        mass, pull = tl.sum(e, 0), tl.sum(e * tl.maximum(shifted, _LOWEST), 0)
        old = exp(before - own_max)
        weighted = old * (weighted + (before - own_max) * total)
        weighted, weighted_rest = _add(weighted, old * (weighted_rest + (before - own_max) * total_rest), pull)
        total, total_rest = _add(old * total, old * total_rest, mass)
    row_max = tl.max(own_max, 0)
    down = (own_max - row_max).to(tl.float64)
    factor = tl.exp(down)
    parts = factor * (total.to(tl.float64) + total_rest.to(tl.float64))
    pulls = factor * (weighted.to(tl.float64) + weighted_rest.to(tl.float64)) + down * parts
    return row_max, tl.sum(parts, 0).to(tl.float32), tl.sum(pulls, 0).to(tl.float32)


@triton.jit
def _sweep_1_in_tiles(
    products, vocab, target, inner, outer, tile_mass, SOFTCAP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """The same, and the mass of each tile; with the ``level`` that masses are from, one for the row.

    It is the maximum of the first columns, so that nothing has to be rescaled on the way and only one sum crosses a
    warp's threads. A row that goes far beyond it is swept again from its true maximum.
    """
    column = tl.arange(0, BLOCK)
    z, _ = logits(tl.load(products + column, mask=column < vocab, other=0.0), inner, outer, SOFTCAP)
    level = tl.maximum(tl.max(tl.where((column < vocab) & (column != target), z, float("-inf"))), _LOWEST)
    row_max, total, weighted = _tiles_from(
        level, products, vocab, target, inner, outer, tile_mass, SOFTCAP, TILE, BLOCK
    )
    if row_max - level > _FAR:
        level = row_max
        row_max, total, weighted = _tiles_from(
            level, products, vocab, target, inner, outer, tile_mass, SOFTCAP, TILE, BLOCK
        )
    down = (level - row_max).to(tl.float64)
    factor = tl.exp(down)
    weighted = factor * (weighted + down * total)
    return row_max, (factor * total).to(tl.float32), weighted.to(tl.float32), level


_FAR = tl.constexpr(16.0)
"""How far a row may go beyond the level: sums of exp(z - level) are far from overflow, and little of the entropy's
digits cancels."""


@triton.jit
def _tiles_from(
    level, products, vocab, target, inner, outer, tile_mass, SOFTCAP: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The row's maximum; the sums of exp(z - level) and of that times z - level, fp64."""
    tiles: tl.constexpr = BLOCK // TILE
    fours: tl.constexpr = TILE // 4
    place = tl.arange(0, tiles)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    highest = tl.full([tiles, fours], _LOWEST, tl.float32)
    total, total_rest = tl.zeros([tiles], tl.float32), tl.zeros([tiles], tl.float32)
    weighted, weighted_rest = tl.zeros([tiles, fours], tl.float32), tl.zeros([tiles, fours], tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + place
        held = (column < vocab) & (column != target)
        z, _ = logits(tl.load(products + column, mask=column < vocab, other=0.0), inner, outer, SOFTCAP)
        z = tl.where(held, z, float("-inf"))
        highest = tl.maximum(highest, tl.max(tl.reshape(z, [tiles, fours, 4]), 2))
        shifted = z - level
        e = exp(shifted)
        mass = tl.sum(tl.sum(tl.reshape(e, [tiles, fours, 4]), 2), 1)
        number = start // TILE + tl.arange(0, tiles)
        tl.store(tile_mass + number, mass, mask=number * TILE < vocab)
        total, total_rest = _add(total, total_rest, mass)
        pull = tl.sum(tl.reshape(e * tl.maximum(shifted, _LOWEST), [tiles, fours, 4]), 2)
        weighted, weighted_rest = _add(weighted, weighted_rest, pull)
    sums = total.to(tl.float64) + total_rest.to(tl.float64)
    pulls = weighted.to(tl.float64) + weighted_rest.to(tl.float64)
    return tl.max(highest), tl.sum(sums, 0), tl.sum(pulls)


@triton.jit
def _add(total, rest, more):
    """total + more as rounded, and ``rest`` with what that lost (Knuth's sum of two)."""
    rounded = total + more
    part = rounded - total
    return rounded, rest + ((total - (rounded - part)) + (more - part))


@triton.jit
def _logit_at(products, target, inner, outer, SOFTCAP: tl.constexpr):
    """The target's logit; -inf without a target."""
    z, _ = logits(tl.load(products + target, mask=target >= 0, other=0.0), inner, outer, SOFTCAP)
    return tl.where(target >= 0, z, float("-inf"))


@triton.jit
def _sweep_2(
    products, out, vocab, target, row_max, total, entropy, on_logp, on_entropy, on_logsumexp, inner, outer,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d loss / d products of one row into ``out``, which may be the memory of ``products``, in fp32 or narrower.

    ``APART``: it is other memory.
    """
    live = (on_logp != 0.0) | (on_entropy != 0.0) | (on_logsumexp != 0.0)
    # A row that nothing depends on gives zeros, whatever is in it: its statistics are replaced, its products not read.
    row_max = tl.where(live, row_max, 0.0)
    inverse = reciprocal(tl.where(live, total, 1.0))
    offset = tl.where(live, entropy - tl.log(total), 0.0)
    readable = tl.where(live, vocab, 0)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(products + column, mask=column < readable, other=0.0, eviction_policy="evict_first")
        z, slope = logits(x, inner, outer, SOFTCAP)
        if not APART:
            # All threads have read a block before any of them writes to it. Written narrower into the front of the row,
            # a block ends where, or before, what has been read ends: [2kB, 2(k+1)B) bytes in place of [4kB, 4(k+1)B).
            tl.debug_barrier()
        d = gradient_factor(z - row_max, offset, on_logp, on_entropy, on_logsumexp, ENTROPY)
        d *= exp(z - row_max) * inverse
        d = tl.where(column == target, 0.0, d * slope)
        tl.store(out + column, d.to(out.dtype.element_ty), mask=column < vocab)


@triton.jit
def gradient_factor(shifted, offset, on_logp, on_entropy, on_logsumexp, ENTROPY: tl.constexpr):
    """d loss / d z_v over p_v at any column but the target: ``c - a - b (log p_v + H)``.

    ``log p_v + H`` is ``shifted + offset``: the logit less the row's maximum, and the entropy less log total.
    """
    factor = on_logsumexp - on_logp
    if ENTROPY:
        # Where p is zero the logit may be -inf, and the product with p must be zero.
        factor -= on_entropy * (tl.maximum(shifted, -1e30) + offset)
    return factor


@triton.jit
def coefficient(pointer, row, GIVEN: tl.constexpr):
    """Of a row, or zero where the objective does not use it."""
    return tl.load(pointer + row) if GIVEN else tl.full([], 0.0, tl.float32)


# --- kernels: one program a row --------------------------------------------------------------------------------------

_VECTORS = ["targets", "temperature", "row_max", "total", "entropy", "on_logp", "on_entropy", "on_logsumexp", "index"]
"""Slices of (C,) vectors: whether one starts at a multiple of 16 bytes must not decide about a compilation."""


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["targets", "temperature"])
def statistics_kernel(
    products, stride, vocab, targets, temperature, scale, softcap, partials, num_rows, level, tile_mass, num_tiles,
    SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, KEEP_TILES: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``partials``: (4, C) row_max, total, weighted, target; ``level`` (C,) and ``tile_mass`` (C, T), if kept."""
    row = tl.program_id(0).to(tl.int64)
    products += row * stride
    inner, outer = row_factors(row, temperature, scale, softcap, SOFTCAP, ROW_TEMPERATURE)
    target = tl.load(targets + row)
    if KEEP_TILES:
        row_max, total, weighted, own_level = _sweep_1_in_tiles(
            products, vocab, target, inner, outer, tile_mass + row * num_tiles, SOFTCAP, TILE, BLOCK
        )
        tl.store(level + row, own_level)
    else:
        row_max, total, weighted = _sweep_1(products, vocab, target, inner, outer, SOFTCAP, BLOCK)
    at_target = _logit_at(products, target, inner, outer, SOFTCAP)
    _store_partials(partials + row, num_rows, row_max, total, weighted, at_target)


@triton.jit
def _store_partials(partials, num_rows, row_max, total, weighted, at_target):
    step = tl.cast(num_rows, tl.int64)
    tl.store(partials, row_max)
    tl.store(partials + step, total)
    tl.store(partials + 2 * step, weighted)
    tl.store(partials + 3 * step, at_target)


@triton.jit(do_not_specialize_on_alignment=_VECTORS)
def gradient_kernel(
    products, stride, vocab, targets, temperature, scale, softcap, row_max, total, entropy, on_logp, on_entropy,
    on_logsumexp, out, out_stride,
    SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr, LOGSUMEXP: tl.constexpr,
    APART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out``: (C, V) d loss / d products, zero at the target."""
    row = tl.program_id(0).to(tl.int64)
    inner, outer = row_factors(row, temperature, scale, softcap, SOFTCAP, ROW_TEMPERATURE)
    _sweep_2(
        products + row * stride, out + row * out_stride, vocab, tl.load(targets + row), tl.load(row_max + row),
        tl.load(total + row), tl.load(entropy + row), tl.load(on_logp + row), coefficient(on_entropy, row, ENTROPY),
        coefficient(on_logsumexp, row, LOGSUMEXP), inner, outer, SOFTCAP, ENTROPY, APART, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["targets", "temperature", "index"])
def both_sweeps_kernel(
    products, stride, vocab, targets, temperature, scale, softcap, weights, index, out, out_stride, partials, num_rows,
    SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The two kernels above in one, with ``weights[index]`` as d loss / d logp and zero without a target."""
    row = tl.program_id(0).to(tl.int64)
    products += row * stride
    target = tl.load(targets + row)
    inner, outer = row_factors(row, temperature, scale, softcap, SOFTCAP, ROW_TEMPERATURE)
    row_max, total, weighted = _sweep_1(products, vocab, target, inner, outer, SOFTCAP, BLOCK)
    at_target = _logit_at(products, target, inner, outer, SOFTCAP)
    _store_partials(partials + row, num_rows, row_max, total, weighted, at_target)
    # The target joins, as in statistics.finish.
    max_of_rest, row_max = row_max, tl.maximum(row_max, at_target)
    total = total * exp(max_of_rest - row_max) + exp(at_target - row_max)
    weight = tl.load(weights + tl.load(index + row), mask=target >= 0, other=0.0)
    nothing = tl.full([], 0.0, tl.float32)
    if not APART:  # no thread may write before every thread has read the row to its end
        tl.debug_barrier()
    out += row * out_stride
    _sweep_2(
        products, out, vocab, target, row_max, total, nothing, weight, nothing, nothing, inner, outer,
        SOFTCAP, False, APART, BLOCK,
    )  # fmt: skip


@triton.jit
def finish_kernel(
    max_of_rest, rest, weighted, target, logps, entropy, logsumexp, row_max, total, others, num_rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``statistics.finish`` in one launch; in fp64, which gives the logarithm the digits that ``log1p`` would."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = row < num_rows
    top, at = tl.load(max_of_rest + row, mask=held, other=0.0), tl.load(target + row, mask=held, other=0.0)
    highest = tl.maximum(top, at)
    gap = top.to(tl.float64) - highest.to(tl.float64)
    gap_of_target = at.to(tl.float64) - highest.to(tl.float64)
    factor, at_target = tl.exp(gap), tl.exp(gap_of_target)
    beside = factor * tl.load(rest + row, mask=held, other=1.0).to(tl.float64)
    sum_exps = beside + at_target
    small = beside * (1.0 - 0.5 * beside)  # the sum may round such a thing away
    log_total = tl.where((at_target == 1.0) & (beside < 1e-7), small, tl.log(sum_exps))
    pull = factor * tl.load(weighted + row, mask=held, other=0.0).to(tl.float64)
    pull += gap * beside + at_target * tl.maximum(gap_of_target, -1e30)
    tl.store(logps + row, (gap_of_target - log_total).to(tl.float32), mask=held)
    tl.store(entropy + row, (log_total - pull / sum_exps).to(tl.float32), mask=held)
    tl.store(logsumexp + row, (highest.to(tl.float64) + log_total).to(tl.float32), mask=held)
    tl.store(row_max + row, highest, mask=held)
    tl.store(total + row, sum_exps.to(tl.float32), mask=held)
    tl.store(others + row, (beside / sum_exps).to(tl.float32), mask=held)


@triton.jit
def scale_kernel(source, scale, out, size, BLOCK: tl.constexpr):
    """``out = source * scale``, rounded once; ``scale`` points to a number."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale).to(tl.float32)
    value = tl.load(source + place, mask=place < size, other=0.0) * factor
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < size)


# --- launches --------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """``mass`` (C, T) fp32, of each tile of ``TILE`` columns the sum of exp(z - level), and that ``level`` (C,)."""

    level: Tensor
    mass: Tensor


def launch(
    kernel: Any, products: Tensor, targets: Tensor, transform: Transform, *rest: Any, programs_a_row: int = 1,
    **flags: Any,
) -> None:  # fmt: skip
    """A kernel over the rows of ``products``, with the arguments that all row kernels begin with."""
    temperature = transform.temperature
    temperature = temperature.float().contiguous() if isinstance(temperature, Tensor) else float(temperature)
    softcap = 1.0 if transform.softcap is None else float(transform.softcap)
    # No fused multiply-adds but those that are written out. The largest logit as it was stored, less itself as it is
    # computed again, must be zero and not what its rounding lost (5e-7 of a peaked row's gradient); and what an
    # addition loses must be what is added up.
    flags = {"num_warps": NUM_WARPS, "enable_fp_fusion": False, **flags}
    with torch.cuda.device_of(products):
        kernel[(products.shape[0], programs_a_row)](
            products, products.stride(0), products.shape[1], targets.contiguous(), temperature, float(transform.scale),
            softcap, *rest, SOFTCAP=transform.softcap is not None, ROW_TEMPERATURE=isinstance(temperature, Tensor),
            **flags,
        )  # fmt: skip


def row_vectors(rows: RowStatistics, wanted: Coefficients) -> list[Tensor]:
    """(C,) each: row_max, total, entropy, and the coefficients, with anything for one that is None."""
    vectors = (rows.row_max, rows.total, rows.entropy, wanted.logps, wanted.entropy, wanted.logsumexp)
    return [(wanted.logps if v is None else v).contiguous() for v in vectors]


def finish(partials: Partials) -> RowStatistics:
    """As ``statistics.finish``, fp32."""
    num_rows = partials.row_max.numel()
    found = partials.row_max.new_empty(6, num_rows)
    if num_rows:
        with torch.cuda.device_of(found):
            finish_kernel[(triton.cdiv(num_rows, 128),)](
                *(p.contiguous() for p in partials), *found, num_rows, BLOCK=128, num_warps=4
            )
    return RowStatistics(*found)


def scaled(source: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``source * scale`` in ``dtype``: contiguous fp32 and a number on the same device, which the host does not see.

    PyTorch's own product of these two dtypes reads and writes at a third of the bandwidth.
    """
    out = torch.empty_like(source, dtype=dtype)
    if out.numel():
        with torch.cuda.device_of(out):
            scale_kernel[(triton.cdiv(out.numel(), BLOCK),)](source, scale, out, out.numel(), BLOCK=BLOCK, num_warps=8)
    return out
