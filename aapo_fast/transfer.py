"""Small tensors on their way between the host and a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. From the host to a GPU it is queued behind what the GPU has to do, and nothing waits:
    it goes by pinned memory, without which the host stands still until it is there. By a copy: ``tensor`` may be pinned
    itself, and written anew before the GPU has come to read it.

    Raises:
        RuntimeError: a CUDA graph is being captured, whose replays would have what ``tensor`` holds now.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        check_not_captured(device, "what is on the CPU is read once; put it on the device")
        pinned = torch.empty_like(tensor, memory_format=torch.contiguous_format, pin_memory=True)
        return pinned.copy_(tensor).to(device, non_blocking=True)
    return tensor.to(device)


def check_not_captured(device: torch.device, why: str) -> None:
    """Before what a CUDA graph cannot hold: the host waits for a number, or gives one.

    Raises:
        RuntimeError: one is being captured; ``why`` says what it cannot hold and what to do.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"cannot be captured in a CUDA graph: {why}")
