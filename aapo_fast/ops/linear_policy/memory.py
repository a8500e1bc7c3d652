"""Large tensors of a pass: chunks of logits, gradient rows, the accumulator of dW.

On a CPU they lie in pages of 2 MiB where Linux grants them to who asks ("madvise", its usual setting). They are new
memory in every call: in pages of 4 KiB their first touch costs tens of thousands of faults, and each tile and each row
of dW that sparse rows visit a miss of the TLB. docs/LOG.md has what that brings.

Such a tensor is one of `torch.frombuffer`: all that a tensor can but change the size of its storage. dW may become the
user's `.grad`; DDP and both FSDPs reduce it as it is.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20


def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns), uninitialised; on a GPU rows start at multiples of 256 bytes, for the vendor's fast products."""
    unit = 256 // dtype.itemsize if device.type == "cuda" else 1
    return empty((rows, -(-columns // unit) * unit), dtype, device)[:, :columns]


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    memory = _huge_pages(shape, dtype, device)
    return torch.empty(shape, dtype=dtype, device=device) if memory is None else memory


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    memory = _huge_pages(shape, dtype, device)  # the system hands out zeros
    return torch.zeros(shape, dtype=dtype, device=device) if memory is None else memory


def _huge_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Zeros in huge pages; None for what is small, for other devices and where there are none."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them, or no memory: PyTorch says that in its own words
        return None
    return torch.frombuffer(memory, dtype=dtype).view(shape)
