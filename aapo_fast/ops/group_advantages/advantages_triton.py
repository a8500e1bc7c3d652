"""Group mean, standard deviation and momentum in one Triton kernel.

Letters: B sequences, G sequences a group.
"""
# ruff: noqa: N803, PLR0124  (Triton writes compile-time constants in capitals; NaN is what differs from itself)
# mypy: allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_STD_EPSILON = tl.constexpr(1e-4)


@triton.jit
def group_advantages_kernel(
    rewards, reference, out, group_size, delta_low, delta_high,
    SCALE: tl.constexpr, MOMENTUM: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program a group of ``group_size`` <= GROUP, a power of two."""
    member = tl.arange(0, GROUP)
    held = member < group_size
    place = tl.program_id(0).to(tl.int64) * group_size + member
    reward = tl.load(rewards + place, mask=held, other=float("nan")).to(tl.float32)
    present = reward == reward
    count = tl.sum(present.to(tl.int32), 0)
    # Shifting by one member first makes "all equal" exact: the differences are zero, not rounding.
    first = tl.min(tl.where(present, member, GROUP), 0)
    shift = tl.sum(tl.where(member == first, reward, 0.0), 0)
    shifted = tl.where(present, reward - shift, 0.0)
    mean = tl.div_rn(tl.sum(shifted, 0), tl.maximum(count, 1).to(tl.float32))
    advantage = tl.where(present, shifted - mean, 0.0)
    if SCALE:
        variance = tl.div_rn(tl.sum(advantage * advantage, 0), tl.maximum(count - 1, 1).to(tl.float32))
        advantage = tl.div_rn(advantage, tl.zeros_like(advantage) + (tl.sqrt_rn(variance) + _STD_EPSILON))
    if MOMENTUM:
        gap = reward - tl.load(reference + place, mask=held, other=float("nan")).to(tl.float32)
        momentum = tl.minimum(tl.maximum(gap, delta_low), delta_high)
        advantage += tl.where(gap == gap, momentum, 0.0)
    tl.store(out + place, advantage, mask=held)


def launch(
    rewards: Tensor,
    reference_rewards: Tensor | None,
    group_size: int,
    delta_low: float,
    delta_high: float,
    scale_rewards: bool,
) -> Tensor:
    """(B,) fp32; see ``group_advantages``."""
    rewards = rewards.contiguous()
    reference = rewards if reference_rewards is None else reference_rewards.contiguous()
    out = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    with torch.cuda.device_of(rewards):
        group_advantages_kernel[(rewards.numel() // group_size,)](
            rewards, reference, out, group_size, float(delta_low), float(delta_high), SCALE=scale_rewards,
            MOMENTUM=reference_rewards is not None, GROUP=triton.next_power_of_2(group_size), num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
