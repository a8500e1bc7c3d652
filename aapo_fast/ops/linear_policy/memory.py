"""Memory of a pass: logits and gradient rows of a chunk, and dW."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections import deque

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20

MADV_FREE = getattr(mmap, "MADV_FREE", 8)
"""Some Pythons are built with headers that lack the name. Used on Linux alone."""


class _Kept:
    """Memory in huge pages that who used it last leaves to the next: one piece, which the system may take meanwhile.

    It comes back when its last tensor is gone, in whichever thread. Who takes it takes it out of the deque, whose
    append and pop are atomic.
    """

    def __init__(self) -> None:
        self.pieces: deque[mmap.mmap] = deque(maxlen=1)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self.pieces.clear)  # both processes would copy it page by page

    def numbers(self, numel: int, dtype: torch.dtype) -> Tensor:
        """So many, uninitialised; in ordinary memory if they are few or the system has no such pages."""
        size = numel * dtype.itemsize
        if size >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                return torch.frombuffer(self._lease(size), dtype=dtype, count=numel)
            except OSError:  # a kernel without them, or no memory: PyTorch says that in its own words
                pass
        return torch.empty(numel, dtype=dtype, device="cpu")

    def _lease(self, size: int) -> ctypes.Array[ctypes.c_char]:
        """So many bytes, of what is kept if that is enough."""
        try:
            memory = self.pieces.pop()
        except IndexError:
            memory = None
        if memory is None or len(memory) < size:
            del memory  # it goes back before more is asked for
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        lease = (ctypes.c_char * size).from_buffer(memory)
        weakref.finalize(lease, self._keep, memory).atexit = False
        return lease

    def _keep(self, memory: mmap.mmap) -> None:
        try:
            memory.madvise(MADV_FREE)
        except OSError:  # a kernel before 4.5: it goes back at once
            return
        self.pieces.append(memory)


_buffers, _weight_gradients = _Kept(), _Kept()


def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns), uninitialised. On a GPU rows start at multiples of 256 bytes, for the vendor's fastest products.

    On a CPU it lies in pages of 2 MiB where Linux grants them to who asks ("madvise", its usual setting), for each tile
    that sparse rows open would be a miss of the TLB in pages of 4 KiB; and it is the memory of the pass before, for new
    pages have to be found and cleared, a tenth of a pass and more. Between passes the system may take it back at any
    time without writing it out (``MADV_FREE``).
    """
    if device.type == "cpu":
        return _buffers.numbers(rows * columns, dtype).view(rows, columns)
    unit = 256 // dtype.itemsize if device.type == "cuda" else 1
    return torch.empty(rows, -(-columns // unit) * unit, dtype=dtype, device=device)[:, :columns]


def weight_gradient(shape: torch.Size, like: Tensor, zeros: bool) -> Tensor:
    """dW, uninitialised or of zeros, in the dtype and on the device of ``like``.

    On a CPU it is the memory of a dW before that nobody has any more, on the same terms as the buffer: of training
    that sets gradients to None, or adds them up in another. It outlives the call and cannot be resized.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape) if zeros else like.new_empty(shape)
    found = _weight_gradients.numbers(shape.numel(), like.dtype).view(shape)
    return found.zero_() if zeros else found
