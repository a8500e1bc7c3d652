"""How far the rollout engine's log-probabilities are from the trainer's: the one comparison that sees stale weights,
stale caches, wrong names and another sampling distribution alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aapo_fast.types import UserError


@dataclass(frozen=True)
class Mismatch:
    """Of the tokens of some samples; NaN over none.

    Attributes:
        mean_gap, max_gap: of the absolute difference, in nats.
        ratio_mean, ratio_max: of pi / rollout.
        clipped_share: of tokens whose ratio exceeds ``loss.max_importance_weight``; 0 without it.
    """

    mean_gap: float
    max_gap: float
    ratio_mean: float
    ratio_max: float
    clipped_share: float

    @classmethod
    def of(cls, logps: Sequence[Tensor], rollout_logps: Sequence[Tensor], bound: float = 0.0) -> Mismatch:
        """From pieces of (N,) log-probabilities, NaN where there are none; a bound of 0 is no bound."""
        if not logps:
            return cls(*[math.nan] * 5)
        difference = (torch.cat([*logps]) - torch.cat([*rollout_logps])).double()
        difference = difference[~difference.isnan()]
        if not difference.numel():
            return cls(*[math.nan] * 5)
        gap, ratio = difference.abs(), difference.exp()
        clipped = (ratio > bound).double().mean() if bound else ratio.new_zeros(())
        figures = torch.stack([gap.mean(), gap.max(), ratio.mean(), ratio.max(), clipped])
        return cls(*figures.tolist())

    def check(self, limit: float) -> None:
        """Raises UserError if the mean gap exceeds ``limit`` nats."""
        if self.mean_gap > limit:
            raise UserError(
                f"the rollout engine's log-probabilities differ from the trainer's by {self.mean_gap:.3g} nats on "
                f"average (at most {self.max_gap:.3g}; pi / rollout {self.ratio_mean:.3g} on average), beyond "
                f"vllm.max_logprob_gap={limit:g}. Likely causes: weights that did not arrive (a stale tied head, other "
                "names), a stale prefix cache, another temperature or raw log-probabilities in the engine, its dtype; "
                "raise the limit only if the gap does not grow from step to step"
            )
