"""The plain truth: materialise all logits and let autograd do the rest. For tests; memory grows with N x V."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aapo_fast.objectives import Objective, Tokens, active_rows
from aapo_fast.ops.linear_policy.autograd import (
    IGNORE_INDEX,
    objective_on_device,
    rows_to_visit,
    scattered,
)
from aapo_fast.ops.linear_policy.call import Call
from aapo_fast.ops.linear_policy.statistics import compute_dtype
from aapo_fast.transfer import to_device


def logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) log-probabilities of the targets, entropies and log-sum-exps on the autograd tape; zero without a target."""
    dtype = compute_dtype(hidden, weight, bias)
    if call.autocast is not None:
        hidden, weight = hidden.to(call.autocast), weight.to(call.autocast)
    with torch.autocast(hidden.device.type, enabled=False):
        x = hidden.to(dtype) @ weight[: call.vocab_size].to(dtype).t()
        if bias is not None:
            x = x + bias[: call.vocab_size].to(dtype)
        x = x * call.transform.scale
        if call.transform.softcap is not None:
            x = call.transform.softcap * torch.tanh(x / call.transform.softcap)
        z = x / call.transform.column()
        log_probs = torch.log_softmax(z, dim=-1)
        probs = log_probs.exp()
        # A bias of -inf rules a token out: 0 log 0 counts as 0, in the gradient too.
        entropy = -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(-1)
        has_target = targets != IGNORE_INDEX
        logps = log_probs.gather(1, targets.where(has_target, 0)[:, None]).squeeze(1)
        found = (logps, entropy, z.logsumexp(-1))
    logps, entropy, logsumexp = (values.where(has_target, 0.0) for values in found)
    return logps, entropy, logsumexp


def policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, objective: Objective, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss with gradient; (N,) log-probabilities and entropies without, NaN in rows without target or weight."""
    logps, entropy, logsumexp = logprobs(hidden, weight, bias, targets, call)
    active, objective = active_rows(objective), objective_on_device(objective, targets.device)
    visited = rows_to_visit(targets, active, call)
    active = None if active is None else to_device(active, targets.device)
    rows = torch.arange(targets.numel(), device=targets.device) if visited is None else visited
    losses = objective(Tokens(logps[rows], entropy[rows], rows, logsumexp[rows]))
    loss = (losses if active is None else losses.where(active[rows], 0.0)).sum().to(logps.dtype)
    logps, entropy = (scattered(v.detach()[rows], visited, targets.numel(), math.nan) for v in (logps, entropy))
    return loss, logps, entropy
