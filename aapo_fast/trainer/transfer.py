"""Batches on their way to the device."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch

from aapo_fast.transfer import to_device

Part = TypeVar("Part")


def batch_to_device(part: Part, device: torch.device) -> Part:
    """A batch, or what one is made of, with its tensors on ``device``. A GPU's host does not wait for them: it prepares
    the next microbatch while the device computes the one before.
    """
    found: Any = part
    if isinstance(part, torch.Tensor):
        found = to_device(part, device)
    elif isinstance(part, tuple):
        found = tuple(batch_to_device(inner, device) for inner in part)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        found = dataclasses.replace(part, **{name: batch_to_device(value, device) for name, value in fields.items()})
    result: Part = found
    return result
