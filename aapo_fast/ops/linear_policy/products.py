"""The three matrix products of the pass, with results in the compute dtype (fp32, or fp64 for fp64 inputs).

Four roads, by what the operands are and what the hardware offers:

- SAME: operands in the compute dtype. The vendor's GEMM, accumulating in place.
- FP32_OUTPUT: both operands bf16 on CUDA. The vendor's GEMM with fp32 output (``out_dtype``), so that logits are not
  rounded; the gradient rows are rounded once to bf16 before the two products that consume them.
- BF16_INSIDE: both operands bf16 on a CPU with AMX. They are widened, and oneDNN is told that it may round fp32
  operands to bf16 inside a product. That brings widened operands back as they were; accumulation and output are fp32,
  and gradient rows are rounded as above. Twice as quick as WIDEN.
- WIDEN: anything else (low precision on the CPU, mixed dtypes, fp16, in which gradient rows divided by many tokens
  would underflow). The weight is widened to the compute dtype, slower and no less accurate: once on the CPU, slab by
  slab on a GPU, where memory is scarce.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from aapo_fast.ops.linear_policy import memory

SLAB_ROWS = 8192


class Road(Enum):
    SAME = "same"
    FP32_OUTPUT = "fp32 output"
    BF16_INSIDE = "bf16 inside"
    WIDEN = "widen"


def choose_road(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Road:
    """The road for these operands and the compute dtype ``dtype``."""
    if hidden.dtype == weight.dtype == dtype:
        return Road.SAME
    if hidden.dtype == weight.dtype == torch.bfloat16 and dtype == torch.float32:
        if hidden.is_cuda:
            return Road.FP32_OUTPUT
        if hidden.device.type == "cpu" and cpu_has_amx():
            return Road.BF16_INSIDE
    return Road.WIDEN


@functools.cache
def cpu_has_amx() -> bool:
    """Whether oneDNN has tiles for bf16 numbers here. By AVX512-BF16 alone it would round no operand that is fp32."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


class _BF16Inside:
    """A context in which oneDNN may round the operands of fp32 products to bf16.

    PyTorch has this as a setting of the process, not of a call: a thread that multiplies fp32 matrices on the CPU
    meanwhile has it too. It is put back when no thread is inside any more. An own value that was equal to the wider
    setting's (``torch.backends.fp32_precision``) is left to that one then: PyTorch does not tell them apart.
    """

    def __init__(self) -> None:
        self._lock, self._num_inside, self._before = threading.Lock(), 0, "none"

    def __enter__(self) -> None:
        with self._lock:
            self._num_inside += 1
            if self._num_inside == 1:
                self._before = self._setting().fp32_precision
                self._set("bf16")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0 and self._before != "bf16":
                self._set("none")  # which is what the wider setting says
                self._set(self._before)

    def _set(self, precision: str) -> None:
        if self._setting().fp32_precision != precision:
            self._setting().fp32_precision = precision

    @staticmethod
    def _setting() -> Any:
        return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


bf16_inside = _BF16Inside()


class Products:
    """The products of one run over the rows.

    Args:
        hidden: (N, H).
        weight: (V, H).
        dtype: the compute dtype.

    Attributes:
        gradient_dtype: what gradient rows are kept in until they are multiplied.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
        self.road, self.dtype, self.hidden = choose_road(hidden, weight, dtype), dtype, hidden
        widens = self.road in (Road.WIDEN, Road.BF16_INSIDE) and not weight.is_cuda
        self.weight = memory.widened(weight, dtype) if widens else weight
        self.gradient_dtype = torch.bfloat16 if self.road is Road.FP32_OUTPUT else dtype

    def logits(self, rows: slice, out: Tensor) -> None:
        """``out = hidden[rows] @ weight.T``, (C, V)."""
        x = self.hidden[rows]
        if self.road is Road.FP32_OUTPUT:
            torch.mm(x, self.weight.t(), out_dtype=torch.float32, out=out)
            return
        with self._precision():
            for part, slab in self._slabs():
                torch.mm(x.to(self.dtype), slab.t(), out=out[:, part])

    def hidden_gradient(self, d: Tensor, out: Tensor) -> None:
        """``out = d @ weight``: (C, V) and (V, H) to (C, H), in the compute dtype."""
        if self.road is Road.FP32_OUTPUT:
            torch.mm(d.to(self.weight.dtype), self.weight, out_dtype=torch.float32, out=out)
            return
        with self._precision():
            for part, slab in self._slabs():
                if part.start == 0:
                    torch.mm(d[:, part], slab, out=out)
                else:
                    out.addmm_(d[:, part], slab)

    def weight_gradient(self, d: Tensor, rows: slice, out: Tensor, add: bool) -> None:
        """``out = d.T @ hidden[rows]``, or added to ``out``: (C, V) and (C, H) to (V, H), in the compute dtype."""
        x = self.hidden[rows]
        if self.road is Road.FP32_OUTPUT:
            d = d.to(x.dtype).t()
            if add:
                torch.addmm(out, d, x, out_dtype=torch.float32, out=out)
            else:
                torch.mm(d, x, out_dtype=torch.float32, out=out)
            return
        with self._precision():
            if add:
                out.addmm_(d.t(), x.to(self.dtype))
            else:
                torch.mm(d.t(), x.to(self.dtype), out=out)

    def _precision(self) -> AbstractContextManager[None]:
        return bf16_inside if self.road is Road.BF16_INSIDE else nullcontext()

    def _slabs(self) -> Iterator[tuple[slice, Tensor]]:
        if self.weight.dtype == self.dtype:
            yield slice(0, self.weight.shape[0]), self.weight
            return
        for start in range(0, self.weight.shape[0], SLAB_ROWS):
            part = slice(start, start + SLAB_ROWS)
            yield part, self.weight[part].to(self.dtype)
