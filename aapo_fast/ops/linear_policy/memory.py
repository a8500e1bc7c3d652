"""Memory of a pass: logits and gradient rows of a chunk, a widened weight, and gradients."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import operator
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20

MADV_FREE = getattr(mmap, "MADV_FREE", 8)
"""Some Pythons are built with headers that lack the name. Used on Linux alone."""


class _Lease(weakref.ref[Any]):
    """Memory, and a weak reference to what its tensors hold of it: when the last is gone the system may take the pages.

    That is said to it without a line of Python: where a dW dies in C++, at the end of a backward, such a line would be
    the first to see a Ctrl-C, and swallow it. The interpreter is locked until it is done, and so is who asks next.
    """

    __slots__ = ("madvise", "memory")
    madvise: Callable[[int], None]
    memory: mmap.mmap


_give_up = operator.methodcaller("madvise", MADV_FREE)

_KEEPS = hasattr(mmap, "MADV_HUGEPAGE") and getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether there are huge pages to ask for, and an interpreter that is locked while memory is given up."""


class _Kept:
    """Memory in huge pages: what nobody has any more is for who asks next, and the system may take it meanwhile.

    There are as many pieces as were held at a time, until somebody asks for more than each of those that are free.
    """

    def __init__(self) -> None:
        self._leases: dict[int, _Lease] = {}
        self._keys = itertools.count()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self.drop)  # both processes would copy it page by page

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of its own; in ordinary memory if it is small or the system has no such pages."""
        numel = math.prod(shape)
        size = numel * dtype.itemsize
        if size >= HUGE_PAGE and _KEEPS:
            try:
                return torch.frombuffer(self._bytes(size), dtype=dtype, count=numel).view(*shape).detach()
            except OSError:  # a kernel without them, or no memory: PyTorch says that in its own words
                pass
        return torch.empty(*shape, dtype=dtype, device="cpu")

    def drop(self) -> None:
        """All of it that nobody has goes back to the system."""
        for _, key in self._free():
            self._leases.pop(key, None)

    def _free(self) -> list[tuple[int, int]]:
        """Sizes, ascending, and keys."""
        return sorted((len(lease.memory), key) for key, lease in self._leases.copy().items() if lease() is None)

    def _bytes(self, size: int) -> ctypes.Array[ctypes.c_char]:
        """So many, of the smallest piece that is enough; if none is, they go back before more is asked for."""
        claims = (self._leases.pop(key, None) for length, key in self._free() if length >= size)
        found = next(filter(None, claims), None)  # one at a time: what another thread was quicker to take is None
        if found is None:
            self.drop()
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            memory.madvise(MADV_FREE)  # who refuses does it now
        else:
            memory = found.memory
        array = (ctypes.c_char * size).from_buffer(memory)
        lease = _Lease(array, _give_up)
        lease.memory, lease.madvise = memory, memory.madvise
        self._leases[next(self._keys)] = lease  # never the same twice: another thread may still think of it
        return array


_buffers, _gradients = _Kept(), _Kept()


def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns), uninitialised. On a GPU rows start at multiples of 256 bytes, for the vendor's fastest products.

    On a CPU it lies in pages of 2 MiB where Linux grants them to who asks ("madvise", its usual setting), for each tile
    that sparse rows open would be a miss of the TLB in pages of 4 KiB; and it is the memory of the pass before, for new
    pages have to be found and cleared, a tenth of a pass and more. Between passes the system may take it back at any
    time without writing it out (``MADV_FREE``).
    """
    if device.type == "cpu":
        return _buffers.empty((rows, columns), dtype)
    return torch.empty(rows, padded_columns(columns, dtype, device), dtype=dtype, device=device)[:, :columns]


def padded_columns(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """From the start of a row of ``aligned`` to that of the next."""
    unit = 256 // dtype.itemsize if device.type == "cuda" else 1
    return -(-columns // unit) * unit


def widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype``; if that is a copy and on a CPU, for one pass and in memory as of ``aligned``."""
    if weight.dtype == dtype or weight.device.type != "cpu":
        return weight.to(dtype)
    return _buffers.empty(weight.shape, dtype).copy_(weight)


def new_gradient(shape: torch.Size, dtype: torch.dtype, device: torch.device, zeros: bool = False) -> Tensor:
    """Uninitialised or of zeros, to be handed out.

    On a CPU a large one takes the memory of an earlier one that nobody holds any more, on the terms of ``aligned``:
    after ``zero_grad``, or when it was added to another. It cannot be resized, and PyTorch's profiler counts it not.
    """
    if device.type != "cpu":
        return (torch.zeros if zeros else torch.empty)(shape, dtype=dtype, device=device)
    found = _gradients.empty(shape, dtype)
    return found.zero_() if zeros else found
