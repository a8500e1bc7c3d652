"""The targets' own entries in Triton: ``targets.py`` without its fp64 buffers, one launch for each of dX and dW.

Letters: M rows, H hidden, V vocabulary.
"""
# ruff: noqa: N803  (Triton writes its compile-time constants in capitals)
# mypy: allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 1024
"""Columns of a program."""

GROUP, GROUP_WIDTH = 2, 1024
"""Rows and columns that a program of the transposed product holds at a time: rows of one target go by in a loop."""


@triton.jit
def add_times_weight_kernel(value, target, weight, weight_stride, width, out, out_stride, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor, line = tl.load(value + row), tl.load(target + row).to(tl.int64)
    if (factor == 0.0) | (line < 0):
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    held = column < width
    gathered = tl.load(weight + line * weight_stride + column, mask=held, other=0.0).to(tl.float64)
    out += row * out_stride + column
    tl.store(out, (factor * gathered + tl.load(out, mask=held).to(tl.float64)).to(tl.float32), mask=held)


@triton.jit
def add_transposed_times_kernel(
    sorted_target, ends, order, value, source, source_stride, width, out, out_stride,
    GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The rows of one target belong to the program of the first of them, in the order of the rows."""
    place = tl.program_id(0).to(tl.int64)
    line, end = tl.load(sorted_target + place).to(tl.int64), tl.load(ends + place)
    before = tl.load(sorted_target + place - 1, mask=place > 0, other=-1)
    if (line < 0) | (line == before):
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    held = column < width
    total = tl.zeros([GROUP, WIDTH], tl.float64)
    for first in range(place, end, GROUP):
        entry = first + tl.arange(0, GROUP)
        row = tl.load(order + entry, mask=entry < end, other=0).to(tl.int64)
        factor = tl.load(value + row, mask=entry < end, other=0.0)
        part = tl.load(
            source + row[:, None] * source_stride + column[None, :],
            mask=(factor != 0.0)[:, None] & held[None, :], other=0.0,
        )  # fmt: skip
        total += factor[:, None] * part.to(tl.float64)
    out += line * out_stride + column
    tl.store(out, (tl.sum(total, 0) + tl.load(out, mask=held).to(tl.float64)).to(tl.float32), mask=held)


def add_times_weight(value: Tensor, target: Tensor, weight: Tensor, out: Tensor) -> None:
    """As ``targets.add_times_weight``, into fp32."""
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows, width = out.shape
    if rows == 0:
        return
    with torch.cuda.device_of(out):
        add_times_weight_kernel[rows, triton.cdiv(width, WIDTH)](
            value, target, weight, weight.stride(0), width, out, out.stride(0), WIDTH=WIDTH
        )


def add_transposed_times(value: Tensor, target: Tensor, hidden: Tensor, out: Tensor) -> None:
    """As ``targets.add_transposed_times``, into fp32."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    rows, width = hidden.shape
    if rows == 0:
        return
    line, order = torch.sort(target, stable=True)
    ends = torch.searchsorted(line, line, right=True)
    with torch.cuda.device_of(out):
        add_transposed_times_kernel[rows, triton.cdiv(width, GROUP_WIDTH)](
            line,
            ends,
            order,
            value,
            hidden,
            hidden.stride(0),
            width,
            out,
            out.stride(0),
            GROUP=GROUP,
            WIDTH=GROUP_WIDTH,
        )
