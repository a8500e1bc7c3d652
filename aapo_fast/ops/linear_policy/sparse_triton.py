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

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aapo_fast.ops.linear_policy.kernels_triton import (
    TILE,
    Tiles,
    coefficient,
    exp,
    gradient_factor,
    launch,
    logits,
    reciprocal,
    row_factors,
    row_vectors,
)
from aapo_fast.ops.linear_policy.statistics import Coefficients, Entries, RowStatistics, SparseProduct, Transform

DENSE_SHARE = 0.004
"""From this share of the vocabulary on, sparse products cost more than dense ones. By arithmetic, not measured: an
entry moves 4 H bytes at 4 TB/s, a dense row takes 4 H V operations at 650 TFLOP/s, which meet at 0.006."""

SECTION = 32
"""Tiles of a section: so many that few programs are idle, so few that a GPU is busy with the rows of one block."""

SMALLEST_THRESHOLD = 2.0**-20

WHOLE_ROWS, COLUMNS = (8, 1024), (2, 2048)
"""Entries and columns that a program of a product holds at a time: of dX, whose lines have a hundred entries, and of
dW, whose lines have a few (docs/LOG.md). Half the columns where much of the last program's would lie beyond H."""

_FRACTION = tl.constexpr(40)
_ONE = tl.constexpr(2.0**40)


# --- the sample's uniforms -------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "num_rows"])
def uniforms_kernel(rows, seed, out, num_rows, BLOCK: tl.constexpr):
    """``uniforms.row_uniforms`` in one launch instead of three hundred."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + place, mask=place < num_rows, other=0).to(tl.int32)
    tl.store(out + place, tl.rand(seed, row), mask=place < num_rows)


# --- the walk --------------------------------------------------------------------------------------------------------


@triton.jit
def _open(products, tile, vocab, target, row_max, inverse, inner, outer, SOFTCAP: tl.constexpr, TILE: tl.constexpr):
    """(column, logit less the maximum, p, d z / d x) of the entries of a tile; p is zero at the target."""
    column = tile * TILE + tl.arange(0, TILE)
    held = (column < vocab) & (column != target)
    z, slope = logits(tl.load(products + column, mask=column < vocab, other=0.0), inner, outer, SOFTCAP)
    shifted = z - row_max
    return column, shifted, tl.where(held, exp(shifted) * inverse, 0.0), slope


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
    on_logsumexp, level, tile_mass, num_tiles, threshold, counts, dusts,
    SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr, LOGSUMEXP: tl.constexpr,
    TILE: tl.constexpr, SECTION: tl.constexpr,
):  # fmt: skip
    """Of each section, (C, S): ``counts``, int32, the entries that are not drawn; ``dusts``, int64, dust over eps."""
    row, section = tl.program_id(0).to(tl.int64), tl.program_id(1)
    products += row * stride
    tile_mass += row * num_tiles
    inner, outer = row_factors(row, temperature, scale, softcap, SOFTCAP, ROW_TEMPERATURE)
    top, sum_exps = tl.load(row_max + row), tl.load(total + row)
    walk = _tiles_to_walk(
        num_tiles, top, sum_exps, tl.load(on_logp + row), coefficient(on_entropy, row, ENTROPY),
        coefficient(on_logsumexp, row, LOGSUMEXP),
    )  # fmt: skip
    inverse, target = reciprocal(sum_exps), tl.load(targets + row)
    share = exp(tl.load(level + row) - top) * inverse
    count = tl.full([], 0, tl.int32)
    dust = tl.full([], 0, tl.int64)
    for tile in range(section * SECTION, tl.minimum((section + 1) * SECTION, walk)):
        mass = tl.load(tile_mass + tile) * share
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
    on_logsumexp, level, tile_mass, num_tiles, threshold, stands_before, starts, entry_row, entry_column,
    entry_value,
    SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, ENTROPY: tl.constexpr, LOGSUMEXP: tl.constexpr,
    TILE: tl.constexpr, SECTION: tl.constexpr,
):  # fmt: skip
    """Entries of section s to [starts[s], starts[s + 1]), in order of columns."""
    row, section = tl.program_id(0).to(tl.int64), tl.program_id(1)
    products += row * stride
    tile_mass += row * num_tiles
    inner, outer = row_factors(row, temperature, scale, softcap, SOFTCAP, ROW_TEMPERATURE)
    top, sum_exps = tl.load(row_max + row), tl.load(total + row)
    a, b = tl.load(on_logp + row), coefficient(on_entropy, row, ENTROPY)
    c = coefficient(on_logsumexp, row, LOGSUMEXP)
    walk = _tiles_to_walk(num_tiles, top, sum_exps, a, b, c)
    inverse, offset = reciprocal(sum_exps), tl.load(entropy + row) - tl.log(sum_exps)
    share = exp(tl.load(level + row) - top) * inverse
    place = row * tl.num_programs(1) + section
    stands, slot, end = tl.load(stands_before + place), tl.load(starts + place), tl.load(starts + place + 1)
    target = tl.load(targets + row)
    for tile in range(section * SECTION, tl.minimum((section + 1) * SECTION, walk)):
        mass = tl.load(tile_mass + tile) * share
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
    # A step that falls on dust below the fixed point finds no entry. Its place keeps the order of the rows, with zero.
    for left in range(slot, end):
        tl.store(entry_row + left, row.to(tl.int32))


@triton.jit
def plan_kernel(counts, dusts, uniforms, num_sections, stands, numbers, expected, SECTIONS: tl.constexpr):
    """``Plan`` of one row from what was counted: ``numbers`` (C, S) entries of each section, ``expected`` (C,)."""
    row, section = tl.program_id(0).to(tl.int64), tl.arange(0, SECTIONS)
    held = section < num_sections
    place = row * num_sections + section
    count, dust = tl.load(counts + place, mask=held, other=0), tl.load(dusts + place, mask=held, other=0)
    after = tl.cumsum(dust, 0) + (tl.load(uniforms + row).to(tl.float64) * _ONE).to(tl.int64)
    stand = after - dust
    tl.store(stands + place, stand, mask=held)
    tl.store(numbers + place, count + (after >> _FRACTION) - (stand >> _FRACTION), mask=held)
    tl.store(expected + row, tl.sum(count, 0).to(tl.float64) + tl.sum(dust, 0).to(tl.float64) / _ONE)


@triton.jit(do_not_specialize=["size", "num_rows"])
def scan_kernel(numbers, size, expected, num_rows, starts, told, BLOCK: tl.constexpr):
    """One program. ``starts``: (size + 1,) sums of what is before; ``told``: how many entries, and in the mean."""
    place = tl.arange(0, BLOCK)
    before = tl.full([], 0, tl.int64)
    for first in range(0, size, BLOCK):
        number = tl.load(numbers + first + place, mask=first + place < size, other=0)
        tl.store(starts + first + place, before + tl.cumsum(number, 0) - number, mask=first + place < size)
        before += tl.sum(number, 0)
    tl.store(starts + size, before)
    mean = tl.full([], 0.0, tl.float64)
    for first in range(0, num_rows, BLOCK):
        mean += tl.sum(tl.load(expected + first + place, mask=first + place < num_rows, other=0.0), 0)
    tl.store(told, before.to(tl.float64))
    tl.store(told + 1, mean)


# --- the products ----------------------------------------------------------------------------------------------------


@triton.jit
def gather_kernel(
    starts, index, value, source, source_stride, width, scale, out, out_stride,
    ADD: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``out[s]`` = sum of ``value[e] * source[index[e]]`` for e in [starts[s], starts[s + 1]); WIDTH columns a program.

    Added to ``out`` if ADD; else times the number at ``scale``, rounded once to the dtype of ``out``.
    """
    segment = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    if ADD & (start == end):
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    held = column < width
    total = tl.zeros([GROUP, WIDTH], tl.float32)
    for first in range(start, end, GROUP):
        entry = first + tl.arange(0, GROUP)
        line = tl.load(index + entry, mask=entry < end, other=0).to(tl.int64)
        factor = tl.load(value + entry, mask=entry < end, other=0.0)
        part = tl.load(
            source + line[:, None] * source_stride + column[None, :], mask=(factor != 0.0)[:, None] & held[None, :],
            other=0.0,
        )  # fmt: skip
        total += factor[:, None] * part.to(tl.float32)
    out += segment * out_stride + column
    made = tl.sum(total, 0)
    if ADD:
        made += tl.load(out, mask=held)
    else:
        made *= tl.load(scale).to(tl.float32)
    tl.store(out, made.to(out.dtype.element_ty), mask=held)


# --- launches --------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is known of the entries before they are emitted. A row is cut into S sections.

    Attributes:
        stands: (C, S) int64, where the running sum stands at the beginning of each section, in fixed point.
        starts: (C * S + 1,) int64, the entries of earlier sections, row by row.
        told: (2,) fp64, entries of all rows: how many, and in the mean over the uniforms.
    """

    stands: Tensor
    starts: Tensor
    told: Tensor


def sparse_gradient(
    products: Tensor, targets: Tensor, tiles: Tiles, rows: RowStatistics, wanted: Coefficients, transform: Transform,
    threshold: float, uniforms: Tensor,
) -> Callable[[], Entries | None]:  # fmt: skip
    """As in ``SparseBlocks``. What it returns waits for the device, to know how many entries there are."""
    walk = (products, targets, tiles, rows, wanted, transform, threshold)
    plan = count(*walk, uniforms)
    read = _read_later(plan.told)

    def entries() -> Entries | None:
        num_entries, expected = read()
        # By the mean, which does not look at the uniforms: a choice that did would bias the sample.
        if expected > DENSE_SHARE * products.numel():
            return None
        return emit(*walk, plan, int(num_entries))

    return entries


def row_uniforms(seed: int, rows: Tensor) -> Tensor:
    """As ``uniforms.row_uniforms``, the same bits."""
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    if rows.numel():
        signed = (seed + 2**63) % 2**64 - 2**63
        with torch.cuda.device_of(out):
            uniforms_kernel[(triton.cdiv(rows.numel(), 256),)](rows, signed, out, rows.numel(), BLOCK=256)
    return out


def _read_later(numbers: Tensor) -> Callable[[], list[float]]:
    """Numbers on the way to the host, which waits for what is queued by now, and not for what is queued later."""
    if not numbers.is_cuda:
        return numbers.tolist
    room = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    room.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(numbers.device))

    def read() -> list[float]:
        arrived.synchronize()
        return room.tolist()

    return read


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
    stands, numbers = torch.empty_like(dusts), torch.empty_like(dusts)
    starts = dusts.new_empty(dusts.numel() + 1)
    expected = torch.empty(shape[0] + 2, dtype=torch.float64, device=products.device)
    with torch.cuda.device_of(products):
        plan_kernel[(shape[0],)](
            counts, dusts, uniforms.contiguous(), shape[1], stands, numbers, expected,
            SECTIONS=triton.next_power_of_2(shape[1]), num_warps=1,
        )  # fmt: skip
        told = expected[shape[0] :]
        scan_kernel[(1,)](numbers, numbers.numel(), expected, shape[0], starts, told, BLOCK=4096, num_warps=8)
    return Plan(stands, starts, told)


def emit(
    products: Tensor, targets: Tensor, tiles: Tiles, rows: RowStatistics, wanted: Coefficients, transform: Transform,
    threshold: float, plan: Plan, num_entries: int,
) -> Entries:  # fmt: skip
    """The entries that were counted: int32, int32, fp32, row by row. ``num_entries``: ``plan.starts[-1]``."""
    row, column, bits = torch.zeros(3, num_entries, dtype=torch.int32, device=products.device)
    value = bits.view(torch.float32)
    given = (products, targets, tiles, rows, wanted, transform, threshold)
    _walk(emit_kernel, *given, plan.stands, plan.starts, row, column, value)
    return Entries(row, column, value)


def _walk(
    kernel: Any, products: Tensor, targets: Tensor, tiles: Tiles, rows: RowStatistics, wanted: Coefficients,
    transform: Transform, threshold: float, *results: Tensor,
) -> None:  # fmt: skip
    # Both kernels round alike (``launch`` fuses nothing), and find the same entries. One warp a section: it waits for
    # memory, again and again, and many wait at a time.
    launch(
        kernel, products, targets, transform, *row_vectors(rows, wanted), *tiles, tiles.mass.stride(0),
        float(threshold), *results, ENTROPY=wanted.entropy is not None, LOGSUMEXP=wanted.logsumexp is not None,
        TILE=TILE, SECTION=SECTION, num_warps=1,
        programs_a_row=triton.cdiv(tiles.mass.shape[1], SECTION),
    )  # fmt: skip


def add_times_weight(entries: Entries, weight: Tensor, out: Tensor) -> None:
    """``out += S @ weight``: entries row by row, (V, H) of any dtype, (C, H) fp32. The order of the sums is fixed."""
    _gather(Segments(_starts(entries.row, len(out)), entries.column, entries.value), weight, out, WHOLE_ROWS)


def add_transposed_times(entries: Entries, hidden: Tensor, out: Tensor) -> None:
    """``out += S.T @ hidden``: (C, H) of any dtype, (V, H) fp32. The order of the sums is fixed."""
    _gather(transposed(entries, len(out)), hidden, out, COLUMNS)


class Segments(NamedTuple):
    """Sparse rows: those of line s are entries [starts[s], starts[s + 1]), ``value`` at ``place``."""

    starts: Tensor
    place: Tensor
    value: Tensor


def transposed(entries: Entries, num_columns: int) -> Segments:
    """S.T, its lines the columns of S, each in the order of the rows."""
    column, order = torch.sort(entries.column, stable=True)
    return Segments(_starts(column, num_columns), entries.row[order], entries.value[order])


def made(product: SparseProduct, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(lines, H) of ``dtype``: ``scale * (S @ source)``, rounded once."""
    *segments, source = product
    kernel_dtype = dtype if source.is_cuda else torch.float32  # the interpreter cuts bf16 off instead of rounding
    out = torch.empty(product.starts.numel() - 1, source.shape[1], dtype=kernel_dtype, device=source.device)
    _gather(Segments(*segments), source, out, COLUMNS, scale)
    return out.to(dtype)


def _starts(line: Tensor, num_lines: int) -> Tensor:
    """(num_lines + 1,) of lines in ascending order."""
    return torch.searchsorted(line, torch.arange(num_lines + 1, dtype=line.dtype, device=line.device))


def _gather(
    segments: Segments, source: Tensor, out: Tensor, held: tuple[int, int], scale: Tensor | None = None
) -> None:
    lines, width = out.shape
    if lines == 0 or width == 0:
        return
    source = source if source.stride(1) == 1 else source.contiguous()
    group, columns = held
    if triton.cdiv(width, columns) * columns > 1.13 * width:
        columns //= 2
    with torch.cuda.device_of(out):
        gather_kernel[lines, triton.cdiv(width, columns)](
            *segments, source, source.stride(0), width, segments.value if scale is None else scale, out, out.stride(0),
            ADD=scale is None, GROUP=group, WIDTH=columns, num_warps=4,
        )  # fmt: skip
