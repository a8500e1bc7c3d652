"""Token-local objectives: the loss of one token as a function of that token's own log-probability.

An objective is any callable that maps ``Tokens`` (vectors over the C rows of a chunk) to C losses; the total loss is
their sum. The fused pass calls it part by part, or once where ``linear`` says enough, and takes the gradient
coefficients from autograd on these vectors, so a new objective is one small function and no kernel knows its name:

    def reinforce(tokens):
        return -advantage[tokens.rows] * tokens.logps / num_tokens

Three methods are optional:

    active() -> (N,) bool or None     rows for which it is False have no loss and no gradient whatever their
                                      log-probability is; they are dropped before the first matrix product. On the CPU,
                                      it spares a GPU's host the wait
    linear() -> LinearWeights or None a loss ``weights[sequence_index[row]] * logp`` is known before its row: a kernel
                                      can sweep it twice in one launch
    num_rows() -> int or None         N of the tensors it was built with, checked against the call's

Under ``torch.compile`` an objective that is a dataclass of tensors, numbers and other such objectives (all of those
here) stays in one visit; any other callable is right but costs a fourth matrix product, and tensors that it closes over
get gradients if they ask for them, as they do nowhere else. (torch 2.10 traces those here, and breaks the graph at one
of your own.)

Advantages of tokens in place of sequences (a critic's, turns', a length normalisation by 1 / |o_i|) are those of N
sequences of one token: ``AAPO(advantages, torch.arange(N), num_tokens)``.

Letters: N rows (tokens), C rows of one chunk, B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aapo_fast.objective_checks import (
    check_clip,
    check_num_tokens,
    check_rows,
    check_sequences,
    check_tensor,
    is_number,
)
from aapo_fast.transfer import to_device


class Tokens(NamedTuple):
    """What an objective sees of a chunk of C tokens. All but ``rows`` are differentiable.

    Attributes:
        logps: (C,) fp32 log-probabilities of the sampled tokens.
        entropy: (C,) fp32 entropies of the rows, in nats.
        rows: (C,) int64 indices of these rows among the N rows of the call.
        logsumexp: (C,) fp32 log-sum-exp of the logits (after soft-cap and temperature).
    """

    logps: Tensor
    entropy: Tensor
    rows: Tensor
    logsumexp: Tensor


Objective = Callable[[Tokens], Tensor]
"""``Tokens`` -> (C,) losses. Tensors it closes over get no gradient."""


LARGEST_LOG_RATIO = 80.0
"""Of two policies' probabilities of a token, in nats: e^80 = 5.5e34."""


class LinearWeights(NamedTuple):
    """A loss linear in the log-probability: that of row n is ``weights[sequence_index[n]] * logp_n``.

    Attributes:
        weights: (B,).
        sequence_index: (N,) int64 or int32.
    """

    weights: Tensor
    sequence_index: Tensor


@dataclass(frozen=True, eq=False)
class _OfSequences:
    """One advantage a sequence, and a loss divided by the tokens of the whole optimizer step."""

    advantages: Tensor
    sequence_index: Tensor
    num_tokens: float | Tensor

    def __post_init__(self) -> None:
        check_sequences(type(self).__name__, self.advantages, self.sequence_index, self.num_tokens)

    def active(self) -> Tensor:
        """(N,) bool: rows whose sequence has an advantage other than zero."""
        return (self.advantages != 0)[self.sequence_index]

    def num_rows(self) -> int:
        """N, which the call's rows must agree with."""
        return self.sequence_index.numel()

    def _advantage(self, tokens: Tokens) -> Tensor:
        """(C,) at least fp32: divided by the tokens of a step it would be subnormal or zero in fp16."""
        return _at_least_fp32(self.advantages[self.sequence_index[tokens.rows]])

    def _ratio(self, tokens: Tokens, other_logps: Tensor | None) -> Tensor:
        """(C,) pi / other policy, differentiable; without another policy one, of which only the gradient counts."""
        other = tokens.logps.detach()
        if other_logps is not None:
            # Where there is no advantage an earlier call may have left NaN; it must not reach the sum as 0 * NaN.
            other = torch.where(self._advantage(tokens) == 0, other, other_logps[tokens.rows])
        # exp is infinite in fp32 from 88.7 on, and the gradient of a clipped ratio then 0 * inf.
        return torch.exp((tokens.logps - other).clamp(max=LARGEST_LOG_RATIO))


@dataclass(frozen=True, eq=False)
class REINFORCE(_OfSequences):
    """``-w_t A[s(t)] * logp_t / num_tokens``: no clipping, no KL term (Williams, 1992).

    With ``rollout_logps`` the weight ``w_t = min(pi_t / rollout_t, max_ratio)``, a constant for the gradient, corrects
    for an engine that samples from slightly other probabilities than the trainer computes (truncated importance
    sampling, Ionides, 2008; for rollout engines Yao et al., 2025). Without, w_t = 1.

    Args:
        advantages: (B,) one a sequence.
        sequence_index: (N,) int64, the sequence of each row.
        num_tokens: completion tokens of the whole optimizer step, over all microbatches and ranks. Only so is the
            gradient independent of how the step is cut up.
        rollout_logps: (N,) log-probabilities that the rollout engine gives for the tokens it sampled, or None.
        max_ratio: bound of the importance weights.
    """

    rollout_logps: Tensor | None = None
    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rows(type(self).__name__, "rollout_logps", self.rollout_logps, self.sequence_index)
        if not (is_number(self.max_ratio) and self.max_ratio > 0):
            raise ValueError(f"{type(self).__name__}: max_ratio={self.max_ratio!r}; it must be a positive number")

    def linear(self) -> LinearWeights | None:
        if self.rollout_logps is not None:
            return None
        return LinearWeights(-_at_least_fp32(self.advantages) / self.num_tokens, self.sequence_index)

    def __call__(self, tokens: Tokens) -> Tensor:
        weight = self._advantage(tokens) / self.num_tokens
        if self.rollout_logps is not None:
            weight = weight * self._ratio(tokens, self.rollout_logps).detach().clamp(max=self.max_ratio)
        return -weight * tokens.logps


@dataclass(frozen=True, eq=False)
class AAPO(REINFORCE):
    """Advantage-weighted cross entropy: ``-A[s(t)] * logp_t / num_tokens`` (AAPO, arXiv 2505.14264, eq. 7).

    No importance ratio, no clipping, no KL term: REINFORCE, with the augmented advantages of ``aapo_advantages``.
    Arguments as in ``REINFORCE``; the importance weights are its too, and off unless ``rollout_logps`` is given.
    """


@dataclass(frozen=True, eq=False)
class GRPO(_OfSequences):
    """The clipped surrogate on each token's own ratio (GRPO, arXiv 2402.03300; token mean as in DAPO, 2503.14476).

    ``-min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) / num_tokens`` with ``r_t = exp(logp_t - old_logp_t)``.

    Args:
        advantages: (B,) one a sequence.
        sequence_index: (N,) int64, the sequence of each row.
        num_tokens: completion tokens of the whole optimizer step.
        old_logps: (N,) log-probabilities under the policy that sampled. None: on-policy, every ratio is one and only
            its gradient counts.
        clip_low, clip_high: distances of the clip bounds from one; DAPO's "clip higher" is 0.2 and 0.28.
        dual_clip: c: where A is negative a token loses at most ``-c A``, however large its ratio is (dual-clip PPO,
            arXiv 1912.09729; verl's ``clip_ratio_c``, 3 there; above ``1 + clip_high`` TRL's ``delta``). None: no such
            bound.
    """

    old_logps: Tensor | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rows("GRPO", "old_logps", self.old_logps, self.sequence_index)
        check_clip("GRPO", self.clip_low, self.clip_high)
        if self.dual_clip is None or torch.compiler.is_compiling():
            return
        if not (is_number(self.dual_clip) and self.dual_clip > 1):
            raise ValueError(f"GRPO: dual_clip={self.dual_clip!r}; give a ratio above one, or None")

    def __call__(self, tokens: Tokens) -> Tensor:
        advantage, ratio = self._advantage(tokens), self._ratio(tokens, self.old_logps)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        if self.dual_clip is not None:
            gain = torch.where(advantage < 0, gain.maximum(self.dual_clip * advantage), gain)
        return -gain / self.num_tokens


@dataclass(frozen=True, eq=False)
class CISPO(_OfSequences):
    """Clipped importance weights, every token's gradient kept (CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    ``-clip(r_t, 1 - clip_low, 1 + clip_high) A * logp_t / num_tokens``, the clipped ratio a constant for the gradient.

    Args:
        advantages, sequence_index, num_tokens, old_logps: as in ``GRPO``.
        clip_low, clip_high: distances of the bounds of the weight from one. The defaults bound it from above only, at
            5, as is usual.
    """

    old_logps: Tensor | None = None
    clip_low: float = 1.0
    clip_high: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rows("CISPO", "old_logps", self.old_logps, self.sequence_index)
        check_clip("CISPO", self.clip_low, self.clip_high)

    def __call__(self, tokens: Tokens) -> Tensor:
        weight = self._ratio(tokens, self.old_logps).detach().clamp(1 - self.clip_low, 1 + self.clip_high)
        return -(weight * self._advantage(tokens) / self.num_tokens) * tokens.logps


@dataclass(frozen=True, eq=False)
class SFT:
    """Cross entropy, optionally weighted: ``-w_t * logp_t / num_tokens``.

    Args:
        num_tokens: what to divide by, usually the target tokens of the whole optimizer step.
        weights: (N,) one a row; None is one everywhere.
    """

    num_tokens: float | Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        check_num_tokens("SFT", self.num_tokens)
        check_tensor("SFT", "weights", self.weights)
        if self.weights is not None and self.weights.ndim != 1:
            raise ValueError(f"SFT: weights has shape {tuple(self.weights.shape)}; give one weight a row, (N,)")

    def active(self) -> Tensor | None:
        """(N,) bool: rows whose weight is not zero; None when all rows count."""
        return None if self.weights is None else self.weights != 0

    def linear(self) -> LinearWeights | None:
        if self.weights is None:
            return None
        every = torch.arange(self.weights.numel(), device=self.weights.device)
        return LinearWeights(_at_least_fp32(self.weights) * (-1.0 / self.num_tokens), every)

    def num_rows(self) -> int | None:
        """N, which the call's rows must agree with; None with equal weights."""
        return None if self.weights is None else self.weights.numel()

    def __call__(self, tokens: Tokens) -> Tensor:
        weight = 1.0 if self.weights is None else _at_least_fp32(self.weights[tokens.rows])
        return -(weight / self.num_tokens) * tokens.logps


@dataclass(frozen=True, eq=False)
class Regularized:
    """An objective with an entropy bonus, a z-loss and a penalty on the distance from a reference policy.

    ``l_t + (kl_penalty * k_t + z_loss * lse_t^2 - entropy_bonus * H_t) / num_tokens``

    H_t is the entropy of the row and lse_t the log-sum-exp of its logits (z-loss: ST-MoE, arXiv 2202.08906; PaLM,
    2204.02311). ``k_t = exp(d) - d - 1`` with ``d = reference_logp_t - logp_t`` is GRPO's (arXiv 2402.03300, eq. 4): on
    tokens that the policy sampled its mean is KL(policy || reference), and it is never negative; the mean of its
    gradient is that of KL(reference || policy). They count in every row that has a target, so no row is dropped for
    want of an advantage: mark padding with ``IGNORE_INDEX``.

    Args:
        objective: what to add to.
        num_tokens: completion tokens of the whole optimizer step.
        entropy_bonus: weight of the mean entropy, in nats; positive rewards it.
        z_loss: weight of the mean squared log-sum-exp; 1e-4 is usual.
        kl_penalty: weight of the mean divergence from the reference ("beta"); GRPO's is 0.04.
        reference_logps: (N,) log-probabilities of the targets under the reference, at the same temperature. Needed with
            ``kl_penalty``, and of every row with a target: as ``linear_logprobs`` gives them under ``no_grad``
            (``linear_policy_loss`` gives NaN where there is no advantage).
    """

    objective: Objective
    num_tokens: float | Tensor
    entropy_bonus: float = 0.0
    z_loss: float = 0.0
    kl_penalty: float = 0.0
    reference_logps: Tensor | None = None

    def __post_init__(self) -> None:
        check_num_tokens("Regularized", self.num_tokens)
        if not callable(self.objective) or isinstance(self.objective, type):
            kind = self.objective if isinstance(self.objective, type) else type(self.objective)
            what = "the class" if kind is self.objective else "a"
            raise ValueError(f"Regularized: objective is {what} {kind.__name__}; give an objective")
        check_tensor("Regularized", "reference_logps", self.reference_logps)
        for field in ("entropy_bonus", "z_loss", "kl_penalty"):
            weight = getattr(self, field)
            if not is_number(weight) or not (torch.compiler.is_compiling() or math.isfinite(weight)):
                raise ValueError(f"Regularized: {field}={weight!r}; give a finite number")
        if self.reference_logps is None:
            if self.kl_penalty:
                raise ValueError(f"Regularized: kl_penalty={self.kl_penalty!r} needs reference_logps, (N,)")
            return
        covered, own = self._covered(), self.reference_logps.shape
        if not self.reference_logps.is_floating_point():
            raise ValueError(f"Regularized: reference_logps is {self.reference_logps.dtype}; give log-probabilities")
        if len(own) != 1 or covered not in (None, own[0]):
            theirs = "" if covered is None else f", the objective covers {covered} rows"
            raise ValueError(
                f"Regularized: reference_logps has shape {tuple(own)}{theirs}; give one log-probability a row, (N,)"
            )

    def num_rows(self) -> int | None:
        """N of the objective or of ``reference_logps``; None if neither says."""
        return self._covered() if self.reference_logps is None else self.reference_logps.numel()

    def _covered(self) -> int | None:
        covered = getattr(self.objective, "num_rows", None)
        found: int | None = covered() if covered is not None else None
        return found

    def __call__(self, tokens: Tokens) -> Tensor:
        losses = self.objective(tokens)
        # Rows that it leaves out have no loss of its own here either; those of ours have none by their zero weight.
        if getattr(type(self.objective), "active", None) not in (_OfSequences.active, SFT.active):
            mask = active_rows(self.objective)
            if mask is not None:
                losses = losses.where(to_device(mask, tokens.rows.device)[tokens.rows], 0.0)
        if self.entropy_bonus:
            losses = losses - (self.entropy_bonus / self.num_tokens) * tokens.entropy
        if self.z_loss:
            losses = losses + (self.z_loss / self.num_tokens) * tokens.logsumexp.square()
        if self.kl_penalty and self.reference_logps is not None:
            distance = _at_least_fp32(self.reference_logps[tokens.rows]) - tokens.logps
            distance = distance.clamp(max=LARGEST_LOG_RATIO)  # beyond, without a gradient: e^d would soon be infinite
            divergence = torch.expm1(distance) - distance
            losses = losses + (self.kl_penalty / self.num_tokens) * divergence
        return losses


def active_rows(objective: Objective | None) -> Tensor | None:
    """(N,) bool: rows that have a loss at all; None is all. Raises ValueError if ``active()`` gives anything else."""
    active = getattr(objective, "active", None)
    mask: Tensor | None = active() if active is not None else None
    if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        got = mask.dtype if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(f"the objective's active() gave {got}; give an (N,) bool tensor, or None for all rows")
    return mask


def _at_least_fp32(values: Tensor) -> Tensor:
    return values if values.itemsize >= 4 else values.float()
