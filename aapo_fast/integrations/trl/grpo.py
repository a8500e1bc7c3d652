"""``fuse``: a plain ``GRPOTrainer`` whose own loss runs through the fused head."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from aapo_fast.integrations.trl.aapo import AAPOTrainer
from aapo_fast.integrations.trl.head import WithObjective, fuse_heads, refuse, seed, unsupported, wrong_settings
from aapo_fast.integrations.trl.objective import SURROGATES, Settings, TokenLoss, token_weights
from aapo_fast.types import UserError


def fuse(
    trainer: GRPOTrainer,
    *,
    through: str = "loss",
    backward: str = "exact",
    sparsity_threshold: float = 2**-13,
    implementation: str = "auto",
) -> None:
    """Make a ``GRPOTrainer`` compute its own loss through the fused head. Call it before ``train()``.

    Args:
        trainer: a ``GRPOTrainer`` of trl 1.16.
        through: "loss" computes loss and gradients in one pass over the head (three matrix products, the logits never
            materialised); its loss must be token-local. "logprobs" gives TRL differentiable log-probabilities (four
            products, as TRL's own): right for every loss, those of subclasses too.
        backward, sparsity_threshold, implementation: as in ``linear_policy_loss``.

    Raises:
        UserError: the trainer does something that the fused loss does not; the message names the setting.
    """
    if through not in ("loss", "logprobs"):
        raise UserError(f"fuse: through={through!r} is unknown; use 'loss' or 'logprobs'")
    if not isinstance(trainer, GRPOTrainer) or isinstance(trainer, AAPOTrainer):
        raise UserError(f"fuse: this is for a GRPOTrainer, not for a {type(trainer).__name__}")
    if getattr(trainer, "_is_fused", False):
        raise UserError("fuse: this trainer is fused already; call it once")
    refuse("fuse", wrong_settings(backward, sparsity_threshold, implementation, trainer.accelerator.device))
    refuse("fuse", unsupported(trainer))
    if through == "loss":
        refuse("fuse", _not_token_local(trainer))
    how = {"backward": backward, "sparsity_threshold": sparsity_threshold, "implementation": implementation}
    fuse_heads(trainer, how)
    if through == "loss":
        trainer._compute_loss = functools.partial(_fused_loss, trainer)
    trainer._is_fused = True


def _fused_loss(trainer: GRPOTrainer, model: Any, inputs: dict[str, Any]) -> Tensor:
    """TRL's loss with gradient. Its own code runs too, on log-probabilities without one, and logs its metrics."""
    policy = WithObjective(model, _token_loss(trainer, inputs), seed(trainer))
    GRPOTrainer._compute_loss(trainer, policy, inputs)
    return policy.loss


def _token_loss(trainer: GRPOTrainer, inputs: dict[str, Any]) -> TokenLoss:
    """What ``GRPOTrainer._compute_loss`` minimises on this microbatch, as an objective."""
    args, training = trainer.args, trainer.model.training
    settings = Settings(
        trainer.loss_type, trainer.epsilon_low, trainer.epsilon_high, args.delta, args.sapo_temperature_pos,
        args.sapo_temperature_neg, trainer.beta, args.use_bias_correction_kl,
    )  # fmt: skip
    keep = inputs["completion_mask"].bool()
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    accumulation = trainer.current_gradient_accumulation_steps if training else 1
    tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    if training:
        tokens = tokens * accumulation / args.steps_per_generation
    weights = token_weights(settings.loss_type, mask, accumulation, trainer.max_completion_length, tokens)

    def per_token(values: Tensor) -> Tensor:
        return (values if values.ndim == 2 else values[:, None]).expand(keep.shape)[keep]

    old = inputs.get("old_per_token_logps")
    entropy_coef = _entropy_coef(trainer)
    corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return TokenLoss(
        settings,
        weights[keep],
        per_token(inputs["advantages"]),
        None if old is None else per_token(old),
        per_token(inputs["ref_per_token_logps"]) if trainer.beta != 0.0 else None,
        per_token(inputs["importance_sampling_ratio"]) if corrects else None,
        entropy_coef * token_weights("bnpo", mask, accumulation, 0, 0)[keep] if entropy_coef else None,
    )


def _entropy_coef(trainer: GRPOTrainer) -> float:
    """What TRL multiplies the mean entropy by in this microbatch."""
    if not trainer._entropy_bonus_enabled:
        return 0.0
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    return float(trainer.entropy_coef)


def _not_token_local(trainer: GRPOTrainer) -> Iterator[str]:
    remedy = "use fuse(trainer, through='logprobs')"
    if type(trainer)._compute_loss is not GRPOTrainer._compute_loss:
        yield f"{type(trainer).__name__} has a loss of its own (_compute_loss); {remedy}"
    if trainer.loss_type not in SURROGATES:
        yield f"loss_type={trainer.loss_type!r} is not token-local; {remedy}, or one of {', '.join(SURROGATES)}"
    if trainer.importance_sampling_level != "token":
        yield f"importance_sampling_level={trainer.importance_sampling_level!r} is not token-local; {remedy}"
    if trainer.top_entropy_quantile < 1.0:
        yield f"top_entropy_quantile={trainer.top_entropy_quantile} compares a token with all others; {remedy}"
    if trainer.off_policy_mask_threshold is not None:
        yield f"off_policy_mask_threshold={trainer.off_policy_mask_threshold} is not token-local; {remedy}"
