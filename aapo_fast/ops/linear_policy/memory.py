"""The buffers of a pass: logits and gradient rows of a chunk."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20


def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns), uninitialised. On a GPU rows start at multiples of 256 bytes, for the vendor's fastest products.

    On a CPU it lies in pages of 2 MiB where Linux grants them to who asks ("madvise", its usual setting). It is new
    memory in every call: in pages of 4 KiB the first touch costs tens of thousands of faults, and each tile that sparse
    rows open a miss of the TLB. (dW does not: its pages outlive the call, and most of them may stay untouched.)
    """
    if device.type == "cpu":
        return _in_huge_pages(rows * columns, dtype).view(rows, columns)
    unit = 256 // dtype.itemsize if device.type == "cuda" else 1
    return torch.empty(rows, -(-columns // unit) * unit, dtype=dtype, device=device)[:, :columns]


def _in_huge_pages(numel: int, dtype: torch.dtype) -> Tensor:
    """So many numbers; in ordinary memory if they are few or the system has no such pages."""
    size = numel * dtype.itemsize
    if size >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=dtype)
        except OSError:  # a kernel without them, or no memory: PyTorch says that in its own words
            pass
    return torch.empty(numel, dtype=dtype, device="cpu")
