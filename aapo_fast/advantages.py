"""Advantage estimators on (B,) tensors of rewards. B sequences lie group by group: B = groups x group_size."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from aapo_fast.objective_checks import is_number
from aapo_fast.ops import dispatch
from aapo_fast.ops.group_advantages import LARGEST_GROUP, group_advantages

STD_EPSILON = 1e-4


def aapo_advantages(
    rewards: Tensor,
    reference_rewards: Tensor | None,
    group_size: int,
    delta_low: float = -0.2,
    delta_high: float = 0.28,
    scale_rewards: bool = True,
) -> Tensor:
    """Group-relative advantage plus clipped momentum against a frozen reference (AAPO, arXiv 2505.14264).

        A_i  = (r_i - mean_group(r)) / (std_group(r) + 1e-4)      std unbiased; no division if not scale_rewards
        m_i  = clip(r_i - r_ref_i, delta_low, delta_high)
        A*_i = A_i + m_i

    A NaN in ``rewards`` is a missing reward: it is left out of its group's statistics and its advantage is zero. A NaN
    in ``reference_rewards`` leaves that sequence without momentum. A group with one reward, or with equal rewards, has
    A = 0, so momentum alone remains.

    Args:
        rewards: (B,) of any floating-point dtype, group by group.
        reference_rewards: (B,) the reward that r_i is set against (a reference sample's, or the reference mean), or
            None for no momentum, which is GRPO's estimator.
        group_size: G, sequences a group; must divide B.
        delta_low, delta_high: bounds of the momentum, in units of reward.
        scale_rewards: divide by the group's standard deviation.

    Returns:
        (B,) fp32. Computed in float64, which MPS devices do not have, and rounded once.

    Raises:
        ValueError: shapes that do not fit, ``delta_low > delta_high``, an infinite reward (checked on the CPU only).
    """
    for name, values in (("rewards", rewards), ("reference_rewards", reference_rewards)):
        if values is not None and (not isinstance(values, Tensor) or values.is_complex()):
            what = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{name} is a {what}; give a torch.Tensor of real numbers")
    if not is_number(group_size, numbers.Integral):
        raise ValueError(f"group_size={group_size!r}; give an int, the sequences of a group")
    for name, bound in (("delta_low", delta_low), ("delta_high", delta_high)):
        if not is_number(bound):
            raise ValueError(f"{name}={bound!r}; give a number, in units of reward")
    if rewards.ndim != 1 or group_size < 1 or rewards.numel() % group_size:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}, group_size={group_size}; "
            "give a vector whose length is a multiple of a positive group_size"
        )
    if reference_rewards is not None and reference_rewards.shape != rewards.shape:
        raise ValueError(
            f"reference_rewards has shape {tuple(reference_rewards.shape)}, rewards has {tuple(rewards.shape)}; "
            "give one reference reward a sequence"
        )
    if not delta_low <= delta_high:
        raise ValueError(f"delta_low={delta_low} is not below delta_high={delta_high}")
    _refuse_infinite("rewards", rewards)
    if reference_rewards is not None:
        _refuse_infinite("reference_rewards", reference_rewards)
    if _in_one_kernel(rewards, group_size):
        return group_advantages(rewards, reference_rewards, group_size, delta_low, delta_high, scale_rewards)

    # In fp64, rounded once at the end: no order of the sums is seen in the result, and any dtype keeps its digits until
    # the differences are taken.
    grouped = rewards.double().view(-1, group_size)
    present = ~grouped.isnan()
    count = present.sum(1, keepdim=True)
    # Shifting by one member first makes "all equal" exact: the differences are zero, not rounding.
    shifted = torch.where(present, grouped - _first_present(grouped, present), 0.0)
    centred = torch.where(present, shifted - shifted.sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    advantages = centred
    if scale_rewards:
        std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        advantages = centred / (std + STD_EPSILON)
    if reference_rewards is not None:
        gap = grouped - reference_rewards.double().view(-1, group_size)
        # NaN survives clamp and becomes "no momentum" here.
        advantages = advantages + gap.clamp(delta_low, delta_high).nan_to_num(nan=0.0)
    return advantages.reshape(-1).float()


def _in_one_kernel(rewards: Tensor, group_size: int) -> bool:
    if not rewards.is_cuda or not rewards.is_floating_point() or rewards.itemsize > 4 or group_size > LARGEST_GROUP:
        return False
    return dispatch.resolve("auto", rewards.device) == "triton"


def _first_present(grouped: Tensor, present: Tensor) -> Tensor:
    """(groups, 1): the first reward of each group that is not missing."""
    return grouped.gather(1, present.int().argmax(1, keepdim=True))


def _refuse_infinite(name: str, values: Tensor) -> None:
    # Not on a GPU: the look would make the host wait for the device.
    if values.device.type == "cpu" and values.isinf().any():
        index = int(values.isinf().nonzero()[0])
        raise ValueError(f"{name}[{index}] is {values[index].item()}; rewards must be finite, or NaN where missing")


def pair_references(reference: Sequence[float], group_size: int, pairing: str) -> list[float]:
    """The reference reward that each of G samples is set against.

    Args:
        reference: K rewards, NaN where missing.
        group_size: G.
        pairing: "paired" (sample i with i mod K, as in the paper) or "mean" (all with the reference mean).
    """
    if pairing == "paired":
        return [reference[i % len(reference)] for i in range(group_size)]
    present = [r for r in reference if not math.isnan(r)]
    mean = sum(present) / len(present) if present else math.nan
    return [mean] * group_size
