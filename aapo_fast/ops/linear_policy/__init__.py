"""The fused policy loss: hidden states, head weight and sampled tokens in; loss and gradients out.

The (tokens x vocabulary) matrix of logits never exists: rows are visited in chunks, and for a token-local objective
the gradient is computed in the same visit (three matrix products, no recompute).

    z_tv = softcap(hidden_t . weight_v + bias_v) / temperature        softcap(x) = c tanh(x / c)
    logp_t = z_t,target(t) - log sum_v exp(z_tv)
    entropy_t = -sum_v p_tv log p_tv                                  p_t = softmax(z_t)

Letters: N rows (tokens), H hidden, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aapo_fast.objectives import Objective
from aapo_fast.ops import dispatch
from aapo_fast.ops.linear_policy import chunked, reference
from aapo_fast.ops.linear_policy.logits import LogitTransform

IGNORE_INDEX = -100
"""A target with this value has no loss and no log-probability, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class PolicyLoss:
    """Result of ``linear_policy_loss``.

    Attributes:
        loss: scalar fp32 (fp64 for fp64 inputs) with gradient: the sum of the objective's token losses.
        logps: (N,) log-probabilities of the targets, no gradient. NaN in rows that were dropped.
        entropy: (N,) entropies in nats, no gradient. NaN in rows that were dropped.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class LogProbs:
    """Result of ``linear_logprobs``: (N,) ``logps`` and (N,) ``entropy`` in nats, fp32, both with gradient.

    Rows whose target is ``IGNORE_INDEX`` hold zero and get no gradient.
    """

    logps: Tensor
    entropy: Tensor


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backward: str = "exact",
    sparsity_threshold: float = 2**-13,
    seed: int = 0,
    implementation: str = "auto",
    all_logps: bool = False,
) -> PolicyLoss:
    """Loss of a token-local objective on the log-probabilities of ``targets``, without materialising the logits.

    Rows for which the objective is not active (zero advantage) and rows whose target is ``IGNORE_INDEX`` are dropped
    before the first matrix product; their ``logps`` and ``entropy`` are NaN. ``all_logps=True`` computes them for every
    row with a target, at the price of the first matrix product.

    Gradients reach ``hidden``, ``weight`` and ``bias``, each only if it requires one; they are computed here, in the
    forward, and handed out in the backward. Statistics and weight gradients are kept in fp32 (fp64 for fp64 inputs)
    and rounded once, in the backward, to the dtype of their tensor.

    Args:
        hidden: (N, H) fp64, fp32, bf16 or fp16.
        weight: (V, H) head weight, any of the same dtypes.
        targets: (N,) int64 sampled tokens in [0, V), or ``IGNORE_INDEX``.
        objective: ``AAPO``, ``GRPO``, ``SFT`` or any callable from ``Tokens`` to (C,) losses.
        bias: (V,) or None.
        temperature: the logits are divided by it; use the sampling temperature.
        softcap: c of the final soft-capping ``c tanh(x / c)``, or None.
        backward: "exact", or "sparse": gradient rows keep the entries with p >= ``sparsity_threshold`` and an unbiased
            sample of the rest (at most 1 / threshold + 1 entries a row), so that the two products of the backward are
            sparse ones. Not for the implementation "reference".
        sparsity_threshold: eps of the sparse rows, in (0, 1].
        seed: of the sample. Use another one at each step; the same one, on the same rows, gives the same gradient.
        implementation: "auto", "torch" (chunked, any device) or "reference" (materialises; for tests).
        all_logps: compute log-probabilities of rows without weight too.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit; the message names them.
        RuntimeError: ``implementation`` is known but cannot run here.
    """
    transform = _check(hidden, weight, targets, bias, temperature, softcap)
    chosen = dispatch.resolve(implementation, hidden.device)
    how = _check_backward(backward, sparsity_threshold, seed, chosen)

    num_rows = targets.numel()
    rows = _rows_to_visit(targets, None if all_logps else objective)
    if rows is None:
        rows = torch.arange(targets.numel(), device=targets.device)
    else:
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
    operands = (hidden, weight, bias, targets, rows, objective, transform)
    if chosen == "reference":
        loss, logps, entropy = reference.policy_loss(*operands)
    else:
        loss, logps, entropy = chunked.policy_loss(*operands, how)
    return PolicyLoss(loss, _scatter(logps, rows, num_rows), _scatter(entropy, rows, num_rows))


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    backward: str = "exact",
    sparsity_threshold: float = 2**-13,
    seed: int = 0,
    implementation: str = "auto",
) -> LogProbs:
    """Log-probabilities of ``targets`` and entropies, both differentiable, without materialising the logits.

    For losses that are not token-local and for other people's trainers: any upstream gradient is honoured. The
    backward recomputes the logits chunk by chunk (four matrix products in all).

    Args and errors as in ``linear_policy_loss``.
    """
    transform = _check(hidden, weight, targets, bias, temperature, softcap)
    chosen = dispatch.resolve(implementation, hidden.device)
    how = _check_backward(backward, sparsity_threshold, seed, chosen)
    num_rows = targets.numel()
    rows = _rows_to_visit(targets, None)
    if rows is None:
        rows = torch.arange(num_rows, device=targets.device)
    else:
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
    if chosen == "reference":
        logps, entropy = reference.logprobs(hidden, weight, bias, targets, transform)
    else:
        logps, entropy = chunked.logprobs(hidden, weight, bias, targets, rows, transform, how)
    if rows.numel() != num_rows:
        logps = logps.new_zeros(num_rows).index_copy(0, rows, logps)
        entropy = entropy.new_zeros(num_rows).index_copy(0, rows, entropy)
    return LogProbs(logps, entropy)


def _rows_to_visit(targets: Tensor, objective: Objective | None) -> Tensor | None:
    """(rows,) int64 indices of the rows that have a target and, where the objective says so, a weight; None is all."""
    keep = targets != IGNORE_INDEX
    active = getattr(objective, "active", None)
    mask = active() if active is not None else None
    if mask is not None:
        if mask.shape != targets.shape:
            raise ValueError(
                f"objective covers {tuple(mask.shape)} rows but targets has {tuple(targets.shape)}; "
                "build it with one entry a row"
            )
        keep = keep & mask
    rows = keep.nonzero().squeeze(1)
    return None if rows.numel() == targets.numel() else rows


def _scatter(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    if rows.numel() == num_rows:
        return values
    return values.new_full((num_rows,), math.nan).index_copy(0, rows, values)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> LogitTransform:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight has {tuple(weight.shape)}; they must be (N, H) and (V, H)"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype}; "
            f"give ({hidden.shape[0]},) int64, one token a row of hidden"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; give ({weight.shape[0]},), one entry a vocabulary entry")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; give fp64, fp32, bf16 or fp16")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden is on {hidden.device}; move them together")
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise ValueError(f"temperature={temperature!r}; it divides the logits and must be positive and finite")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap!r}; it must be positive and finite, or None")
    _check_targets(targets, weight.shape[0])
    return LogitTransform(float(temperature), None if softcap is None else float(softcap))


def _check_backward(backward: str, sparsity_threshold: float, seed: int, implementation: str) -> chunked.Backward:
    if backward not in ("exact", "sparse"):
        raise ValueError(f"backward={backward!r} is unknown; use 'exact' or 'sparse'")
    if backward == "sparse" and implementation == "reference":
        raise ValueError(
            "backward='sparse' is not for implementation='reference', which is the exact truth; use 'torch'"
        )
    if not 0 < sparsity_threshold <= 1:
        raise ValueError(f"sparsity_threshold={sparsity_threshold!r} must lie in (0, 1]")
    if not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} must be an int")
    return chunked.Backward(sparsity_threshold if backward == "sparse" else None, seed)


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    bad = ((targets < 0) | (targets >= vocab_size)) & (targets != IGNORE_INDEX)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])}, outside [0, {vocab_size}); "
            f"mark rows without a target with {IGNORE_INDEX}"
        )
