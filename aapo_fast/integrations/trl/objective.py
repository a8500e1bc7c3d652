"""The token-local losses of TRL's ``GRPOTrainer`` (trl 1.16) as one objective of the fused pass.

    l_t = w_t (c_t s(r_t, A_t, logp_t) + beta k_t) - e_t H_t

    r_t = exp(logp_t - old_t)                       without old log-probabilities one, of which only the gradient counts
    k_t = exp(ref_t - logp_t) - (ref_t - logp_t) - 1        times r_t with the bias correction (arXiv 2512.02556)
    w_t = mask over the denominator of the loss type; c_t a constant importance weight; e_t the entropy bonus

The surrogates s:

    clipped   -min(min(r, delta) A, clip(r, 1 - low, 1 + high) A)     GRPO (arXiv 2402.03300) and what only divides by
                                                                      something else: BNPO, Dr. GRPO, DAPO, LUSPO
    cispo     -min(r, high) A logp, the ratio a constant              arXiv 2506.13585, with the bound of 2510.13786
    sapo      -4 / tau  sigmoid(tau (r - 1)) A, tau by the sign of A  arXiv 2511.20347

Letters: N rows (completion tokens of a microbatch), C rows of one chunk, B sequences, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aapo_fast import Tokens


@dataclass(frozen=True)
class Settings:
    """Numbers of ``GRPOConfig``, by its names."""

    loss_type: str
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    beta: float
    use_bias_correction_kl: bool


def clipped(ratio: Tensor, advantages: Tensor, logps: Tensor, settings: Settings) -> Tensor:
    """Losses (C,) of the clipped surrogate; ``delta`` bounds all ratios from above."""
    inside = ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)
    bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    return -torch.minimum(bounded * advantages, inside * advantages)


def cispo(ratio: Tensor, advantages: Tensor, logps: Tensor, settings: Settings) -> Tensor:
    """Losses (C,) with the truncated ratio as a constant weight."""
    return -ratio.detach().clamp(max=settings.epsilon_high) * advantages * logps


def sapo(ratio: Tensor, advantages: Tensor, logps: Tensor, settings: Settings) -> Tensor:
    """Losses (C,) with a sigmoid gate in place of the clip."""
    rising, falling = settings.sapo_temperature_pos, settings.sapo_temperature_neg
    temperature = torch.where(advantages > 0, rising, falling)
    return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, Settings], Tensor]] = {
    "grpo": clipped,
    "bnpo": clipped,
    "dr_grpo": clipped,
    "dapo": clipped,
    "luspo": clipped,
    "cispo": cispo,
    "sapo": sapo,
}
"""By TRL's ``loss_type``. VESPO is not among them: its weights are those of whole sequences."""


def token_weights(
    loss_type: str, mask: Tensor, accumulation: float, max_completion_length: int, tokens_a_rank: float | Tensor
) -> Tensor:
    """(B, T) fp32: what each token's loss is multiplied by before all are summed.

    Args:
        loss_type: one of ``SURROGATES``.
        mask: (B, T) one at tokens that count.
        accumulation: microbatches of the optimizer step, over which per-microbatch means are averaged.
        max_completion_length: Dr. GRPO divides by it in place of the length.
        tokens_a_rank: tokens of the optimizer step over all ranks, divided by the number of ranks.
    """
    mask = mask.float()
    if loss_type in ("grpo", "sapo"):
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * mask.shape[0] * accumulation)
    if loss_type == "bnpo":
        return mask / (mask.sum().clamp(min=1) * accumulation)
    if loss_type == "dr_grpo":
        return mask / (mask.shape[0] * max_completion_length * accumulation)
    if loss_type == "luspo":
        return mask / (mask.shape[0] * accumulation)
    return mask / tokens_a_rank


class TokenLoss:
    """An objective (``aapo_fast.objectives``) from (N,) vectors, one entry a completion token.

    Args:
        settings: of the loss.
        weights: w, see the top of this file.
        advantages: one a token.
        old_logps: under the policy that sampled, or None where that is the present one.
        ref_logps: under the reference; None without a KL term.
        corrections: c, or None for one.
        entropy_weights: e, or None for no bonus.
    """

    def __init__(
        self,
        settings: Settings,
        weights: Tensor,
        advantages: Tensor,
        old_logps: Tensor | None = None,
        ref_logps: Tensor | None = None,
        corrections: Tensor | None = None,
        entropy_weights: Tensor | None = None,
    ) -> None:
        self.settings, self.surrogate = settings, SURROGATES[settings.loss_type]
        self.weights, self.advantages = weights, advantages
        self.old_logps, self.ref_logps = old_logps, ref_logps
        self.corrections, self.entropy_weights = corrections, entropy_weights

    def num_rows(self) -> int:
        """N, which the call's rows must agree with."""
        return self.weights.numel()

    def active(self) -> Tensor | None:
        """(N,) bool: rows that have a gradient; None where a KL term or an entropy bonus gives one to all."""
        if self.ref_logps is not None or self.entropy_weights is not None:
            return None
        return (self.weights != 0) & (self.advantages != 0)

    def __call__(self, tokens: Tokens) -> Tensor:
        rows, logps = tokens.rows, tokens.logps
        ratio = torch.exp(logps - (logps.detach() if self.old_logps is None else self.old_logps[rows]))
        losses = self.surrogate(ratio, self.advantages[rows], logps, self.settings)
        if self.corrections is not None:
            losses = losses * self.corrections[rows]
        if self.ref_logps is not None:
            gap = self.ref_logps[rows] - logps
            kl = torch.exp(gap) - gap - 1
            losses = losses + self.settings.beta * (kl * ratio if self.settings.use_bias_correction_kl else kl)
        losses = losses * self.weights[rows]
        return losses if self.entropy_weights is None else losses - self.entropy_weights[rows] * tokens.entropy
