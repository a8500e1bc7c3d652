"""AAPO's loss for prime-rl's trainer, a custom loss by import path (docs/integrations/prime-rl.md).

    [trainer.loss]
    type = "custom"
    import_path = "aapo_fast.integrations.prime_rl.aapo_loss"

prime-rl calls it once a sequence and divides the sum by the rl tokens of the step over all ranks. It reads ``loss`` and
``metrics`` of whatever it gets back, so nothing of prime-rl is imported here.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class LossInputs(Protocol):
    """What is used of prime-rl's ``LossInputs``: one sequence of N tokens."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None


class LossOutputs(NamedTuple):
    """What prime-rl reads.

    Attributes:
        loss: scalar with gradient, a sum over the sequence's tokens.
        metrics: scalars, averaged over sequences by prime-rl.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def aapo_loss(inputs: LossInputs, max_importance_weight: float | None = None) -> LossOutputs:
    """``-sum_t w_t A_t log pi(o_t)`` over the tokens of ``loss_mask`` (AAPO, arXiv 2505.14264, eq. 7).

    The advantages are those of prime-rl's orchestrator; this file does not change them. prime-rl's samples are a step
    old or more: with ``max_importance_weight`` (2.0, say) tokens are weighted by min(pi / inference, bound), a constant
    for the gradient; without, w_t is prime-rl's ``loss_weights`` alone, or one.

    Args:
        inputs: of one sequence; (N,) each, ``loss_mask`` bool.
        max_importance_weight: from ``[trainer.loss.kwargs]``; positive, or None for no correction.

    Raises:
        ValueError: a bound that is not positive.
    """
    if max_importance_weight is not None and not max_importance_weight > 0:
        raise ValueError(f"[trainer.loss.kwargs] max_importance_weight={max_importance_weight}; it must be positive")
    mask = inputs.loss_mask
    logps, advantages = inputs.trainer_logprobs[mask], inputs.advantages[mask]
    log_ratio = logps.detach() - inputs.inference_logprobs[mask]
    weights = advantages if inputs.loss_weights is None else advantages * inputs.loss_weights[mask]
    if max_importance_weight is not None:
        weights = weights * log_ratio.exp().clamp(max=max_importance_weight)
    num_tokens = max(advantages.numel(), 1)
    metrics = {
        "zero_advantage_share": (advantages == 0).sum() / num_tokens,
        "inference_gap": log_ratio.abs().sum() / num_tokens,
    }
    return LossOutputs(-(weights * logps).sum(), metrics)
