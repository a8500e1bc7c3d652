"""One optimizer step: microbatches under one global denominator, clipping, a guard against non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from aapo_fast.config import TrainConfig
from aapo_fast.data.packing import Weighted
from aapo_fast.ops.linear_policy.sharded import whole
from aapo_fast.trainer.gradient import accumulate
from aapo_fast.trainer.mismatch import Mismatch
from aapo_fast.trainer.offload import OffloadedAdamW
from aapo_fast.trainer.policy import Policy
from aapo_fast.types import UserError


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: the objective, over all tokens of the step.
        entropy: mean over trained tokens, in nats; NaN if none was trained.
        grad_norm: before clipping.
        trained_tokens: completion tokens with a loss: those with an advantage; all, under an entropy bonus or z-loss.
        saved_token_share: tokens that shared prompts spared the forward passes, less padding, as a share of one row a
            completion.
        waiting_share: of the ranks' time, in which they wait for the longest microbatch of each round; computed from
            what microbatches have to compute, not measured. 0 for one rank.
        microbatch_tokens: limit of a microbatch, as it was in the end ...
        ran_out_of_memory: ... and whether it had to be lowered for the memory of the GPU.
        updated: False if the weights stayed as they were: no token had a weight, or the gradient was not finite.
        finite: False if loss or gradient was NaN or infinite.
        mismatch: of the rollout engine's log-probabilities and the trainer's, over the trained tokens.
    """

    loss: float
    entropy: float
    grad_norm: float
    trained_tokens: int
    saved_token_share: float
    waiting_share: float
    microbatch_tokens: int
    ran_out_of_memory: bool
    updated: bool
    finite: bool
    mismatch: Mismatch


def make_optimizer(policy: Policy, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters, by name; decay, where wanted, on matrices only. Raises UserError if there are none."""
    parameters = [(name, p) for name, p in policy.trained.named_parameters() if p.requires_grad]
    if not parameters:
        raise UserError(
            "the policy has no parameter to train: all of its model's have requires_grad=False; set it for some, or "
            "train an adapter (lora.rank)"
        )
    groups = [
        {"params": [(name, p) for name, p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(name, p) for name, p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # an adapter has no vectors
    adamw: Any = OffloadedAdamW if config.offload_optimizer else partial(torch.optim.AdamW, fused=True)
    made: torch.optim.Optimizer = adamw(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))
    return made


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then the schedule down to its floor at the last step's end."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    share = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1.0 - floor) * share)


def optimizer_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Weighted],
    config: TrainConfig,
    lr: float,
    seed: int = 0,
    max_logprob_gap: float = math.inf,
) -> StepResult:
    """Accumulate the gradient of all samples and apply it.

    The denominator is the completion tokens of all ``samples``, those without weight included; samples without weight
    are then left out of the forward pass, where nothing depends on them. ``seed`` is that of sparse gradient rows.

    Every rank is given all ``samples`` and trains on its share of them; the result is that of all.

    Raises:
        UserError: the samples' log-probabilities are on average further than ``max_logprob_gap`` nats from the
            policy's: they come from other weights or another distribution. The weights are as they were.
    """
    num_tokens = sum(len(w.sample.token_ids) for w in samples)
    live = [w for w in samples if w.advantage != 0.0 or policy.how.regularizes]
    wanted = min(config.max_microbatch_tokens, policy.max_microbatch_tokens)
    sums, fitted = accumulate(policy, live, num_tokens, seed, wanted)
    policy.max_microbatch_tokens = fitted
    loss, entropy, *counts = policy.ranks.total(
        sums.loss, sums.entropy, sums.trained_tokens, sums.computed_tokens, sums.separate_tokens
    )
    trained, computed, separate = (int(count) for count in counts)
    pieces = policy.ranks.pieces
    mismatch = Mismatch.of(pieces(sums.logps), pieces(sums.rollout_logps), policy.how.max_importance_weight)
    nothing = StepResult(
        loss=0.0,
        entropy=math.nan,
        grad_norm=0.0,
        trained_tokens=0,
        saved_token_share=0.0,
        waiting_share=sums.waiting_share,
        microbatch_tokens=fitted,
        ran_out_of_memory=fitted < wanted,
        updated=False,
        finite=True,
        mismatch=mismatch,
    )
    if not trained:
        return nothing
    try:
        mismatch.check(max_logprob_gap)
    except UserError:
        optimizer.zero_grad(set_to_none=True)
        raise
    limit = config.max_grad_norm or math.inf
    norm = whole(torch.nn.utils.clip_grad_norm_(policy.trained.parameters(), limit)).item()
    finite = math.isfinite(norm) and math.isfinite(loss)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        try:
            optimizer.step()
        except torch.OutOfMemoryError as error:  # at the first, which makes the moments
            raise UserError(
                f"{str(error).split('. ')[0]} in the optimizer, which takes 8 bytes a trained parameter; put it into "
                "the host's memory (train.offload_optimizer=true), train an adapter (lora.rank), or on several GPUs "
                "(docs/scaling.md)"
            ) from error
        policy.collect()
    optimizer.zero_grad(set_to_none=True)
    return replace(
        nothing,
        loss=loss,
        entropy=entropy / trained,
        grad_norm=norm,
        trained_tokens=trained,
        saved_token_share=1 - computed / separate,
        updated=finite,
        finite=finite,
    )
