"""The plain truth: materialise all logits and let autograd do the rest. For tests; memory grows with N x V."""

from __future__ import annotations

import torch
from torch import Tensor

from aapo_fast.objectives import Objective, Tokens
from aapo_fast.ops.linear_policy.logits import LogitTransform, compute_dtype


def logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """(N,) log-probabilities of the targets and (N,) entropies, both on the autograd tape."""
    dtype = compute_dtype(hidden, weight, bias)
    x = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        x = x + bias.to(dtype)
    if transform.softcap is not None:
        x = transform.softcap * torch.tanh(x / transform.softcap)
    log_probs = torch.log_softmax(x / transform.temperature, dim=-1)
    probs = log_probs.exp()
    # A bias of -inf rules a token out: 0 log 0 counts as 0, in the gradient too.
    entropy = -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(-1)
    return log_probs.gather(1, targets[:, None]).squeeze(1), entropy


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    objective: Objective,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss with gradient, (N,) log-probabilities and (N,) entropies without."""
    logps, entropy = logprobs(hidden, weight, bias, targets, transform)
    loss = objective(Tokens(logps, entropy, rows)).sum()
    return loss, logps.detach(), entropy.detach()
