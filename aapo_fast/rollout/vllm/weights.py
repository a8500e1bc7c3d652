"""The policy's weights as vLLM loads them: one (name, tensor) pair for each parameter of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from aapo_fast.models.lora import checkpoint_state

Weights = Iterator[tuple[str, Tensor]]


def named_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Weights:
    """Every tensor of the model's checkpoint, by its name there, without gradient; floating-point ones in ``dtype``.
    An adapter is merged into them.

    A tied head is sent under its own name besides: an engine that keeps a packed copy of it would otherwise go on
    sampling from the old one, silently.
    """
    for name, tensor in checkpoint_state(model):
        yield name, tensor.to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)


def frozen_copy(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The present weights, cloned on the CPU; tied tensors once."""
    copies: dict[int, Tensor] = {}
    every = list(named_weights(model))  # all alive at once: merged ones are made for this, and no two share a memory
    return [(name, copies.setdefault(t.data_ptr(), t.cpu().clone())) for name, t in every]


def size_bytes(weights: Iterable[tuple[str, Tensor]]) -> int:
    """What a sync of them sends."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in weights)
