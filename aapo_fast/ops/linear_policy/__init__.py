"""The fused policy loss: hidden states, head weight and sampled tokens in; loss and gradients out.

The (tokens x vocabulary) matrix of logits never exists: rows are visited in chunks, and for a token-local objective
the gradient is computed in the same visit (three matrix products, no recompute).

    z_tv = softcap(scale (hidden_t . weight_v + bias_v)) / temperature        softcap(x) = c tanh(x / c)
    logp_t = z_t,target(t) - log sum_v exp(z_tv)
    entropy_t = -sum_v p_tv log p_tv                                  p_t = softmax(z_t)

Letters: N rows (tokens), H hidden, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aapo_fast.objectives import Objective
from aapo_fast.ops import dispatch
from aapo_fast.ops.linear_policy import autograd, checks, compiled, reference
from aapo_fast.ops.linear_policy.autograd import IGNORE_INDEX
from aapo_fast.ops.linear_policy.call import Call
from aapo_fast.ops.linear_policy.sharded import VocabularyShard, whole
from aapo_fast.ops.linear_policy.statistics import Transform, compute_dtype

__all__ = ["IGNORE_INDEX", "LogProbs", "PolicyLoss", "VocabularyShard", "linear_logprobs", "linear_policy_loss"]


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
    """Result of ``linear_logprobs``, (N,) each, fp32 (fp64 for fp64 inputs), all with gradient.

    Rows whose target is ``IGNORE_INDEX`` hold zero and get no gradient.

    Attributes:
        logps: log-probabilities of the targets.
        entropy: in nats.
        logsumexp: of the logits.
    """

    logps: Tensor
    entropy: Tensor
    logsumexp: Tensor


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    vocabulary_shard: VocabularyShard | None = None,
    backward: str = "exact",
    sparsity_threshold: float = 2**-13,
    seed: int = 0,
    implementation: str = "auto",
    all_logps: bool = False,
) -> PolicyLoss:
    """Loss of a token-local objective on the log-probabilities of ``targets``, without materialising the logits.

    ``hidden[t]`` is what the head multiplies to predict ``targets[t]``: the decoder's output, after its final norm, at
    the position before that token. So for a sequence ``ids``, ``hidden[:-1]`` goes with ``ids[1:]``.

    Rows for which the objective is not active (zero advantage) and rows whose target is ``IGNORE_INDEX`` (-100) are
    dropped before the first matrix product; their ``logps`` and ``entropy`` are NaN, so average with ``nanmean``.
    ``all_logps=True`` computes them for every row with a target, at the price of the first matrix product.

    On a GPU the host does not wait if ``backward="exact"`` and the rows to drop are known to it: with
    ``all_logps=True``, or where the objective's ``active()`` is on the CPU, as with vectors there, which are sent along
    (rows without a target are then masked, not dropped). Otherwise their number is read from the device. Sparse rows
    read a count a panel; after a sparse one, with Triton, while the products of the next panel are computed. Where the
    host does not wait, and the objective has nothing on the CPU, a CUDA graph can be captured; elsewhere that is
    refused, and ``torch.compile`` leaves this function out of its own.

    Gradients reach ``hidden``, ``weight`` and ``bias``, each only if it requires one; they are computed here, in the
    forward, and handed out in the backward: call ``backward`` for each microbatch, since every loss holds its (V, H)
    gradient until then, and evaluate under ``torch.no_grad()``, which saves two of the three products. With
    ``backward="sparse"`` on a GPU the weight's gradient is made in the backward, from ``hidden``, which has to be left
    alone until then. There is no second derivative, and no ``torch.func``. Statistics and weight gradients are kept in
    fp32 (fp64 for fp64 inputs) and rounded once, in the backward, to the dtype of their tensor. Under autocast the
    products are computed from operands in its dtype, and the gradients are still those of the tensors given, in their
    dtype. Hidden states of rows without a target must be finite where these are masked and not dropped, on a GPU:
    0 * NaN is NaN in the weight's gradient.

    On a CPU a large gradient lies in memory that is kept for the next one, and cannot be resized. On a CPU with AMX,
    fp32 matrix products of other threads are rounded to bf16 while one of this function's bf16 products runs.

    Args:
        hidden: (N, H) fp64, fp32, bf16 or fp16.
        weight: (V, H) head weight, any of the same dtypes. A DTensor (FSDP2) is gathered, its gradient summed over the
            mesh: divide the loss by the tokens of all ranks. (Tensor parallelism: ``vocabulary_shard``.)
        targets: (N,) int64 sampled tokens in [0, V), or ``IGNORE_INDEX`` (-100): no target.
        objective: ``AAPO``, ``GRPO``, ``CISPO``, ``REINFORCE``, ``SFT``, one of them ``Regularized``, or any callable
            from ``Tokens`` to (C,) losses. The vectors of a dataclass may be on the CPU, whatever ``hidden`` is on
            (under ``torch.compile`` of those that stay in one visit: ``aapo_fast.objectives``).
        bias: (V,) or None. One of -inf rules a token out: as a target it has the log-probability -1e30 (-inf by
            "reference"). Under a soft-cap, which makes it finite, it does not.
        temperature: the logits are divided by it; use the sampling temperature. A number, or (N,) one a row.
        softcap: c of the final soft-capping ``c tanh(x / c)``, or None.
        logit_scale: a factor on the products, before the soft-cap (Cohere, Granite).
        vocab_size: rows of ``weight`` that are tokens; those beyond are padding, without probability or gradient.
        vocabulary_shard: of a vocabulary-parallel head: ``weight`` and ``bias`` are this rank's part, ``hidden`` and
            ``targets`` are the same on all ranks, ``targets`` counting the whole vocabulary. A collective call.
        backward: "exact", or "sparse": gradient rows keep the entries with p >= ``sparsity_threshold`` and an unbiased
            sample of the rest (at most 1 / threshold + 1 entries a row), so that the two products of the backward are
            sparse ones. Not for the implementation "reference".
        sparsity_threshold: eps of the sparse rows, in (0, 1].
        seed: of the sample. Use another one at each step; the same one, on the same rows, gives the same gradient.
        implementation: of the row kernels: "auto", "torch" (any device with float64), "triton" (CUDA), "native" (C++,
            CPU) or "reference" (materialises; for tests).
        all_logps: compute log-probabilities of rows without weight too.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit; the message names them. Values of tensors are
            looked at on the CPU only; on a GPU a target out of range is a device-side assertion.
        RuntimeError: ``implementation`` is known but cannot run here.
    """
    weight, bias = whole(weight), None if bias is None else whole(bias)
    checks.check_tensors(hidden, weight, targets, bias)
    checks.check_objective(objective, targets)
    call = _call(hidden, weight, bias, targets, temperature, softcap, logit_scale, vocab_size, vocabulary_shard,
                 backward, sparsity_threshold, seed, implementation, not all_logps)  # fmt: skip
    operands = (hidden, weight, bias, targets)
    if torch.compiler.is_compiling():
        return PolicyLoss(*compiled.policy_loss(*operands, objective, call))
    checks.check_targets(targets, call.vocab_size if vocabulary_shard is None else vocabulary_shard.vocab_size)
    run = reference.policy_loss if call.implementation == "reference" else autograd.policy_loss
    return PolicyLoss(*run(*operands, objective, call))


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    vocabulary_shard: VocabularyShard | None = None,
    backward: str = "exact",
    sparsity_threshold: float = 2**-13,
    seed: int = 0,
    implementation: str = "auto",
) -> LogProbs:
    """Log-probabilities of ``targets``, entropies and log-sum-exps, differentiable, without materialising the logits.

    For losses that are not token-local and for other people's trainers: any upstream gradient is honoured. The
    backward recomputes the logits chunk by chunk (four matrix products in all). On a GPU the host never waits with
    ``backward="exact"``; rows whose target is ``IGNORE_INDEX`` are then computed and masked, so leave them out.

    Args and errors as in ``linear_policy_loss``.
    """
    weight, bias = whole(weight), None if bias is None else whole(bias)
    checks.check_tensors(hidden, weight, targets, bias)
    call = _call(hidden, weight, bias, targets, temperature, softcap, logit_scale, vocab_size, vocabulary_shard,
                 backward, sparsity_threshold, seed, implementation, drop_rows=False)  # fmt: skip
    operands = (hidden, weight, bias, targets)
    if torch.compiler.is_compiling():
        return LogProbs(*compiled.logprobs(*operands, call))
    checks.check_targets(targets, call.vocab_size if vocabulary_shard is None else vocabulary_shard.vocab_size)
    run = reference.logprobs if call.implementation == "reference" else autograd.logprobs
    return LogProbs(*run(*operands, call))


def _call(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    vocab_size: int | None,
    shard: VocabularyShard | None,
    backward: str,
    sparsity_threshold: float,
    seed: int,
    implementation: str,
    drop_rows: bool,
) -> Call:
    """The arguments that are not operands, checked."""
    checks.check_temperature(temperature, targets)
    dtype = compute_dtype(hidden, weight, bias)
    chosen = dispatch.resolve(implementation, hidden.device, dtype)
    checks.check_numbers(softcap, logit_scale, backward, sparsity_threshold, seed, chosen)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).where(targets != IGNORE_INDEX, 1.0)
    device = hidden.device.type
    # As PyTorch's own: autocast leaves fp64 alone.
    casts = torch.is_autocast_enabled(device) and dtype != torch.float64
    return Call(
        transform=Transform(
            temperature if isinstance(temperature, Tensor) else float(temperature),
            None if softcap is None else float(softcap),
            float(logit_scale),
        ),
        vocab_size=checks.live_rows(vocab_size, weight.shape[0], shard, chosen),
        shard=shard,
        threshold=sparsity_threshold if backward == "sparse" else None,
        seed=checks.as_int64(seed),
        implementation=chosen,
        drop_rows=drop_rows,
        autocast=torch.get_autocast_dtype(device) if casts else None,
    )
