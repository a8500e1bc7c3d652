"""One uniform number a row from a counter: the same for the same seed and row, on any device, in any chunk."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_TO_UNIT = 4.6566127342e-10


def row_uniforms(seed: int, rows: Tensor) -> Tensor:
    """Philox-4x32-10 (Salmon et al., 2011) with counter (row, 0, 0, 0): the stream of Triton's ``tl.rand(seed, row)``.

    Args:
        seed: any integer; its low 64 bits count.
        rows: (C,) int64 row numbers below 2^32.

    Returns:
        (C,) fp32 in [0, 1).
    """
    counter = [rows & _MASK, *(torch.zeros_like(rows) for _ in range(3))]
    key_a, key_b = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        high_a, low_a = _multiply(counter[0], _ROUND_A)
        high_b, low_b = _multiply(counter[2], _ROUND_B)
        counter = [high_b ^ counter[1] ^ key_a, low_b, high_a ^ counter[3] ^ key_b, low_a]
        key_a, key_b = (key_a + _KEY_A) & _MASK, (key_b + _KEY_B) & _MASK
    # As Triton does it: the 32 bits as a signed number, folded onto its non-negative half.
    signed = torch.where(counter[0] >= 2**31, counter[0] - 2**32, counter[0])
    folded = torch.where(signed < 0, -signed - 1, signed)
    return folded.to(torch.float32) * _TO_UNIT


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of 32-bit numbers, within signed 64 bits."""
    low_part = (a & 0xFFFF) * b
    high_part = (a >> 16) * b + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)
