"""aapo-fast: a fused policy loss for RL post-training of language models, and a lean AAPO trainer around it.

    import aapo_fast as af

    adv = af.aapo_advantages(rewards, reference_rewards, group_size=8)
    out = af.linear_policy_loss(hidden, head_weight, targets,
                                objective=af.AAPO(adv, sequence_index, num_tokens))
    out.loss.backward()

Importing this package does not import torch; the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aapo_fast.advantages import aapo_advantages as aapo_advantages
    from aapo_fast.objectives import AAPO as AAPO
    from aapo_fast.objectives import CISPO as CISPO
    from aapo_fast.objectives import GRPO as GRPO
    from aapo_fast.objectives import REINFORCE as REINFORCE
    from aapo_fast.objectives import SFT as SFT
    from aapo_fast.objectives import LinearWeights as LinearWeights
    from aapo_fast.objectives import Regularized as Regularized
    from aapo_fast.objectives import Tokens as Tokens
    from aapo_fast.ops.linear_policy import IGNORE_INDEX as IGNORE_INDEX
    from aapo_fast.ops.linear_policy import LogProbs as LogProbs
    from aapo_fast.ops.linear_policy import PolicyLoss as PolicyLoss
    from aapo_fast.ops.linear_policy import VocabularyShard as VocabularyShard
    from aapo_fast.ops.linear_policy import linear_logprobs as linear_logprobs
    from aapo_fast.ops.linear_policy import linear_policy_loss as linear_policy_loss

__version__ = "0.1.0"

_HOME = {
    "aapo_advantages": "aapo_fast.advantages",
    "AAPO": "aapo_fast.objectives",
    "CISPO": "aapo_fast.objectives",
    "GRPO": "aapo_fast.objectives",
    "REINFORCE": "aapo_fast.objectives",
    "Regularized": "aapo_fast.objectives",
    "SFT": "aapo_fast.objectives",
    "LinearWeights": "aapo_fast.objectives",
    "Tokens": "aapo_fast.objectives",
    "IGNORE_INDEX": "aapo_fast.ops.linear_policy",
    "LogProbs": "aapo_fast.ops.linear_policy",
    "PolicyLoss": "aapo_fast.ops.linear_policy",
    "VocabularyShard": "aapo_fast.ops.linear_policy",
    "linear_logprobs": "aapo_fast.ops.linear_policy",
    "linear_policy_loss": "aapo_fast.ops.linear_policy",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'aapo_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
