"""From the head's raw products to the logits of the policy: soft-cap, then temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """``z = softcap * tanh(x / softcap) / temperature``; without soft-cap ``z = x / temperature``."""

    temperature: float = 1.0
    softcap: float | None = None

    def apply_(self, x: Tensor) -> Tensor:
        """In place, raw products to logits."""
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.temperature != 1.0:
            x.div_(self.temperature)
        return x

    def slope(self, shifted: Tensor, row_max: Tensor) -> Tensor | None:
        """What of d z / d x differs from entry to entry: ``1 - tanh(x / softcap)^2``; None without soft-cap.

        The logits are ``z = shifted + row_max``, and ``tanh(x / softcap) = z * temperature / softcap``.
        """
        if self.softcap is None:
            return None
        tanh = (shifted + row_max).mul_(self.temperature / self.softcap)
        return tanh.square_().neg_().add_(1.0)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any operand is fp64, else fp32: the dtype of statistics and of accumulated gradients."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
