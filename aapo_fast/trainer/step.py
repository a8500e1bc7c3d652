"""One optimizer step: microbatches under one global denominator, clipping, a guard against non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aapo_fast.config import TrainConfig
from aapo_fast.data.packing import Weighted, microbatches, shares
from aapo_fast.ops.linear_policy.sharded import whole
from aapo_fast.trainer.mismatch import Mismatch
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.ranks import Ranks
from aapo_fast.types import UserError


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: the objective, over all tokens of the step.
        entropy: mean over trained tokens, in nats; NaN if none was trained.
        grad_norm: before clipping.
        trained_tokens: completion tokens with a loss: those with an advantage; all, under an entropy bonus or z-loss.
        updated: False if the weights stayed as they were: no token had a weight, or the gradient was not finite.
        finite: False if loss or gradient was NaN or infinite.
        mismatch: of the rollout engine's log-probabilities and the trainer's, over the trained tokens.
    """

    loss: float
    entropy: float
    grad_norm: float
    trained_tokens: int
    updated: bool
    finite: bool
    mismatch: Mismatch


def make_optimizer(policy: Policy, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters; decay, where wanted, on matrices only."""
    parameters = [p for p in policy.trained.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


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
    loss, entropy, trained = 0.0, 0.0, 0
    logps: list[Tensor] = []
    rollout_logps: list[Tensor] = []
    for index, part in _microbatches(policy.ranks, live, config.max_microbatch_tokens):
        batch = policy.batch(part)
        out = policy.loss(batch, num_tokens, seed + index)
        out.loss.backward()
        loss += out.loss.item()
        entropy += out.entropy.sum().item()
        trained += out.entropy.numel()
        logps.append(out.logps)
        rollout_logps.append(batch.rollout_logps)
    loss, entropy, total = policy.ranks.total(loss, entropy, trained)
    trained = int(total)
    pieces = policy.ranks.pieces
    mismatch = Mismatch.of(pieces(logps), pieces(rollout_logps), policy.how.max_importance_weight)
    if not trained:
        return StepResult(0.0, math.nan, 0.0, 0, updated=False, finite=True, mismatch=mismatch)
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
        optimizer.step()
        policy.collect()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, entropy / trained, norm, trained, updated=finite, finite=finite, mismatch=mismatch)


def _microbatches(ranks: Ranks, live: Sequence[Weighted], max_tokens: int) -> Iterator[tuple[int, list[Weighted]]]:
    """This rank's microbatches, numbered apart from those of all others; as many on every rank, since each is a
    collective pass: a rank whose own are used up has empty ones.
    """
    cuts = [list(microbatches(share, max_tokens)) for share in shares(live, ranks.world)]
    mine = cuts[ranks.rank]
    for number in range(max(map(len, cuts))):
        yield number * ranks.world + ranks.rank, mine[number] if number < len(mine) else []
