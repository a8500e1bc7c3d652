"""The three matrix products of the pass, with results in the compute dtype (fp32, or fp64 for fp64 inputs).

Three roads, by what the hardware offers:

- operands already in the compute dtype: the vendor's GEMM, accumulating in place;
- both operands bf16 (or both fp16) on CUDA: the vendor's GEMM with fp32 output (``out_dtype``), so that logits are not
  rounded; the gradient rows are rounded once to the operands' dtype before the two products that consume them;
- anything else (low precision on the CPU, mixed dtypes): slabs of the vocabulary are widened to the compute dtype,
  which costs speed and a slab of memory but no accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SLAB_ROWS = 8192


def _has_fp32_output(a: Tensor, b: Tensor, out: Tensor) -> bool:
    low = (torch.bfloat16, torch.float16)
    return a.is_cuda and a.dtype == b.dtype and a.dtype in low and out.dtype == torch.float32


def _slabs(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, weight.shape[0], SLAB_ROWS):
        part = slice(start, start + SLAB_ROWS)
        yield part, weight[part].to(dtype)


def head_products(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``out = x @ weight.T``: (C, H) and (V, H) to (C, V)."""
    if x.dtype == weight.dtype == out.dtype:
        return torch.mm(x, weight.t(), out=out)
    if _has_fp32_output(x, weight, out):
        return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
    wide = x.to(out.dtype)
    for part, slab in _slabs(weight, out.dtype):
        torch.mm(wide, slab.t(), out=out[:, part])
    return out


def hidden_gradient(d: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``out = d @ weight``: (C, V) and (V, H) to (C, H), in the compute dtype."""
    if d.dtype == weight.dtype:
        return torch.mm(d, weight, out=out)
    if _has_fp32_output(weight, weight, out):
        return torch.mm(d.to(weight.dtype), weight, out_dtype=torch.float32, out=out)
    out.zero_()
    for part, slab in _slabs(weight, d.dtype):
        out.addmm_(d[:, part], slab)
    return out


def add_weight_gradient(d: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """``out += d.T @ x``: (C, V) and (C, H) to (V, H), accumulated in the compute dtype."""
    if _has_fp32_output(x, x, out):
        return torch.addmm(out, d.to(x.dtype).t(), x, out_dtype=torch.float32, out=out)
    return out.addmm_(d.t(), x.to(d.dtype))
