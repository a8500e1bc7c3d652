"""Small tensors on their way between the host and a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. From the host to a GPU it is queued behind what the GPU has to do, and nothing waits:
    it goes by pinned memory, without which the host stands still until it is there. By a copy: ``tensor`` may be pinned
    itself, and written anew before the GPU has come to read it.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        pinned = torch.empty_like(tensor, memory_format=torch.contiguous_format, pin_memory=True)
        return pinned.copy_(tensor).to(device, non_blocking=True)
    return tensor.to(device)


def check_may_wait(device: torch.device, why: str) -> None:
    """The host is about to wait for a number from ``device``.

    Raises:
        RuntimeError: a CUDA graph is being captured, in which it cannot; ``why`` says what for and what to do.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"cannot be captured in a CUDA graph: {why}")
