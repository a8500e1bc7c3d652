"""The three matrix products of the pass, with results in the compute dtype (fp32, or fp64 for fp64 inputs).

Three roads, by what the operands are and what the hardware offers:

- SAME: operands in the compute dtype. The vendor's GEMM, accumulating in place.
- FP32_OUTPUT: both operands bf16 on CUDA. The vendor's GEMM with fp32 output (``out_dtype``), so that logits are not
  rounded; the gradient rows are rounded once to bf16 before the two products that consume them.
- WIDEN: anything else (low precision on the CPU, mixed dtypes, fp16, in which gradient rows divided by many tokens
  would underflow). Slabs of the vocabulary are widened to the compute dtype: slower, no less accurate.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import torch
from torch import Tensor

SLAB_ROWS = 8192


class Road(Enum):
    SAME = "same"
    FP32_OUTPUT = "fp32 output"
    WIDEN = "widen"


def choose_road(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Road:
    """The road for these operands and the compute dtype ``dtype``."""
    if hidden.dtype == weight.dtype == dtype:
        return Road.SAME
    if hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16 and dtype == torch.float32:
        return Road.FP32_OUTPUT
    return Road.WIDEN


def head_products(x: Tensor, weight: Tensor, out: Tensor, road: Road) -> Tensor:
    """``out = x @ weight.T``: (C, H) and (V, H) to (C, V)."""
    if road is Road.SAME:
        return torch.mm(x, weight.t(), out=out)
    if road is Road.FP32_OUTPUT:
        return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
    wide = x.to(out.dtype)
    for part, slab in _slabs(weight, out.dtype):
        torch.mm(wide, slab.t(), out=out[:, part])
    return out


def hidden_gradient(d: Tensor, weight: Tensor, out: Tensor, road: Road) -> Tensor:
    """``out = d @ weight``: (C, V) and (V, H) to (C, H), in the compute dtype."""
    if road is Road.SAME:
        return torch.mm(d, weight, out=out)
    if road is Road.FP32_OUTPUT:
        return torch.mm(d.to(weight.dtype), weight, out_dtype=torch.float32, out=out)
    out.zero_()
    for part, slab in _slabs(weight, d.dtype):
        out.addmm_(d[:, part], slab)
    return out


def add_weight_gradient(d: Tensor, x: Tensor, out: Tensor, road: Road) -> Tensor:
    """``out += d.T @ x``: (C, V) and (C, H) to (V, H), accumulated in the compute dtype."""
    if road is Road.FP32_OUTPUT:
        return torch.addmm(out, d.to(x.dtype).t(), x, out_dtype=torch.float32, out=out)
    return out.addmm_(d.t(), x.to(d.dtype))


def _slabs(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, weight.shape[0], SLAB_ROWS):
        part = slice(start, start + SLAB_ROWS)
        yield part, weight[part].to(dtype)
