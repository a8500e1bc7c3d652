"""Memory of a pass: logits and gradient rows of a chunk, and dW."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections import deque

import torch
from torch import Tensor

from aapo_fast.ops import native

HUGE_PAGE = 2 * 2**20

MADV_FREE = getattr(mmap, "MADV_FREE", 8)
"""Some Pythons are built with headers that lack the name. Used on Linux alone."""

_kept: deque[mmap.mmap] = deque(maxlen=1)
"""The buffer of the last pass on a CPU, for the next one. Who takes it takes it out: append and pop are atomic."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_kept.clear)  # both processes would copy it page by page


def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns), uninitialised. On a GPU rows start at multiples of 256 bytes, for the vendor's fastest products.

    On a CPU it lies in pages of 2 MiB where Linux grants them to who asks ("madvise", its usual setting), for each tile
    that sparse rows open would be a miss of the TLB in pages of 4 KiB; and it is the memory of the pass before, for new
    pages have to be found and cleared, a tenth of a pass and more. Between passes the system may take it back at any
    time without writing it out (``MADV_FREE``).
    """
    if device.type == "cpu":
        return _in_huge_pages(rows * columns, dtype).view(rows, columns)
    unit = 256 // dtype.itemsize if device.type == "cuda" else 1
    return torch.empty(rows, -(-columns // unit) * unit, dtype=dtype, device=device)[:, :columns]


def weight_gradient(shape: torch.Size, like: Tensor, implementation: str, zeros: bool) -> Tensor:
    """dW, uninitialised or of zeros, in the dtype and on the device of ``like``. It outlives the call: ordinary memory.

    Where the native library is in use, pages for a product to write on are found at once: one after the other, at its
    first touches, they cost a twentieth of an exact pass at V = 151,936. (Zeros are quicker written on pages that the
    system has just cleared, which are still in the cache.)
    """
    if zeros:
        return like.new_zeros(shape)
    fresh = like.new_empty(shape)
    if implementation == "native" and fresh.nbytes >= HUGE_PAGE:
        native.operators().make_present(fresh.view(-1).view(torch.float32))
    return fresh


def _in_huge_pages(numel: int, dtype: torch.dtype) -> Tensor:
    """So many numbers; in ordinary memory if they are few or the system has no such pages."""
    size = numel * dtype.itemsize
    if size >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            return torch.frombuffer(_lease(size), dtype=dtype, count=numel)
        except OSError:  # a kernel without them, or no memory: PyTorch says that in its own words
            pass
    return torch.empty(numel, dtype=dtype, device="cpu")


def _lease(size: int) -> ctypes.Array[ctypes.c_char]:
    """So many bytes, of what is kept if that is enough; kept again when nobody has them any more."""
    try:
        memory = _kept.pop()
    except IndexError:
        memory = None
    if memory is None or len(memory) < size:
        del memory  # it goes back before more is asked for
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    lease = (ctypes.c_char * size).from_buffer(memory)
    weakref.finalize(lease, _keep, memory).atexit = False
    return lease


def _keep(memory: mmap.mmap) -> None:
    try:
        memory.madvise(MADV_FREE)
    except OSError:  # a kernel before 4.5: it goes back at once
        return
    _kept.append(memory)
