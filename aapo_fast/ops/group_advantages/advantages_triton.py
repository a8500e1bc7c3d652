"""Group mean, standard deviation and momentum in one Triton kernel, in float64 as ``aapo_advantages`` computes them:
of the order of the sums, which is another one here, the float32 result shows the last digit's rounding at most.

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

WARP_MEMBERS = 256
"""Members of a group that a warp holds: eight float64 a thread, several times over, are within its registers."""


@triton.jit
def group_advantages_kernel(
    rewards, reference, out, group_size, delta_low: tl.float64, delta_high: tl.float64,
    SCALE: tl.constexpr, MOMENTUM: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program a group of ``group_size`` <= GROUP, a power of two."""
    member = tl.arange(0, GROUP)
    held = member < group_size
    place = tl.program_id(0).to(tl.int64) * group_size + member
    reward = tl.load(rewards + place, mask=held, other=float("nan")).to(tl.float64)
    present = reward == reward
    count = tl.sum(present.to(tl.int32), 0)
    # Shifting by one member first makes "all equal" exact: the differences are zero, not rounding.
    first = tl.min(tl.where(present, member, GROUP), 0)
    shift = tl.sum(tl.where(member == first, reward, 0.0), 0)
    shifted = tl.where(present, reward - shift, 0.0)
    # Of float64 these are the correctly rounded ones; the functions that say so take float32 alone.
    mean = tl.sum(shifted, 0) / tl.maximum(count, 1).to(tl.float64)
    advantage = tl.where(present, shifted - mean, 0.0)
    if SCALE:
        variance = tl.sum(advantage * advantage, 0) / tl.maximum(count - 1, 1).to(tl.float64)
        advantage = advantage / (tl.sqrt(variance) + tl.full((), _STD_EPSILON, tl.float64))
    if MOMENTUM:
        gap = reward - tl.load(reference + place, mask=held, other=float("nan")).to(tl.float64)
        momentum = tl.minimum(tl.maximum(gap, delta_low), delta_high)
        advantage += tl.where(gap == gap, momentum, 0.0)
    tl.store(out + place, advantage.to(tl.float32), mask=held)


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
    group = triton.next_power_of_2(group_size)
    out = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    with torch.cuda.device_of(rewards):
        group_advantages_kernel[(rewards.numel() // group_size,)](
            rewards, reference, out, group_size, float(delta_low), float(delta_high), SCALE=scale_rewards,
            MOMENTUM=reference_rewards is not None, GROUP=group, num_warps=max(1, group // WARP_MEMBERS),
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
