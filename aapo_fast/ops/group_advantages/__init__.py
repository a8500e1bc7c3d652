"""The AAPO estimator as one GPU kernel: a program a group, instead of a dozen launches on (B,) vectors.

The truth, its formula and its checks are ``aapo_fast.advantages.aapo_advantages``; this gives the same numbers.

Letters: B sequences lying group by group, G sequences a group.
"""

from __future__ import annotations

from torch import Tensor

LARGEST_GROUP = 1024


def group_advantages(
    rewards: Tensor,
    reference_rewards: Tensor | None,
    group_size: int,
    delta_low: float = -0.2,
    delta_high: float = 0.28,
    scale_rewards: bool = True,
) -> Tensor:
    """(B,) fp32 advantages; arguments as in ``aapo_advantages``, and not checked again. Needs triton.

    Args:
        rewards: (B,) of any floating-point dtype; NaN where missing.
        reference_rewards: (B,) likewise, or None for no momentum.
        group_size: G, at most ``LARGEST_GROUP``; divides B.

    Raises:
        ValueError: a larger group.
    """
    from aapo_fast.ops.group_advantages.advantages_triton import launch

    if group_size > LARGEST_GROUP:
        raise ValueError(f"group_size={group_size}; the kernel holds a group at once and takes {LARGEST_GROUP} at most")
    return launch(rewards, reference_rewards, group_size, delta_low, delta_high, scale_rewards)
