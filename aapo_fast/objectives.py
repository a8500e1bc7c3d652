"""Token-local objectives: the loss of one token as a function of that token's own log-probability.

An objective is any callable that maps ``Tokens`` (vectors over the C rows of a chunk) to C losses; the total loss is
their sum. The fused pass calls it chunk by chunk and takes the gradient coefficients from autograd on these vectors,
so a new objective is one small function and no kernel knows its name:

    def reinforce(tokens):
        return -advantage[tokens.rows] * tokens.logps / num_tokens

An objective may also have a method ``active() -> (N,) bool``: rows for which it is False have no loss and no gradient
whatever their log-probability is, and are dropped before the first matrix product.

Letters: N rows (tokens), C rows of one chunk, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """What an objective sees of a chunk of C tokens.

    Attributes:
        logps: (C,) fp32 log-probabilities of the sampled tokens.
        entropy: (C,) fp32 entropies of the rows, in nats. Differentiable like ``logps``.
        rows: (C,) int64 indices of these rows among the N rows of the call.
    """

    logps: Tensor
    entropy: Tensor
    rows: Tensor


Objective = Callable[[Tokens], Tensor]
"""``Tokens`` -> (C,) losses. Tensors it closes over get no gradient."""


@dataclass(frozen=True, eq=False)
class AAPO:
    """Advantage-weighted cross entropy: ``-A[s(t)] * logp_t / num_tokens`` (AAPO, arXiv 2505.14264, eq. 7).

    No importance ratio, no clipping, no KL term.

    Args:
        advantages: (B,) augmented advantages, one a sequence (``aapo_advantages``).
        sequence_index: (N,) int64, the sequence of each row.
        num_tokens: completion tokens of the whole optimizer step, over all microbatches and ranks. Only so is the
            gradient independent of how the step is cut up.
    """

    advantages: Tensor
    sequence_index: Tensor
    num_tokens: float

    def __post_init__(self) -> None:
        _check_sequences(type(self).__name__, self.advantages, self.sequence_index, self.num_tokens)

    def active(self) -> Tensor:
        """(N,) bool: rows whose sequence has an advantage other than zero."""
        return (self.advantages != 0)[self.sequence_index]

    def __call__(self, tokens: Tokens) -> Tensor:
        return -(self.advantages[self.sequence_index[tokens.rows]] / self.num_tokens) * tokens.logps


@dataclass(frozen=True, eq=False)
class GRPO:
    """The clipped surrogate on each token's own ratio (GRPO, arXiv 2402.03300; token mean as in DAPO, 2503.14476).

    ``-min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) / num_tokens`` with ``r_t = exp(logp_t - old_logp_t)``.

    Args:
        advantages: (B,) one a sequence.
        sequence_index: (N,) int64, the sequence of each row.
        num_tokens: completion tokens of the whole optimizer step.
        old_logps: (N,) log-probabilities under the policy that sampled. None: on-policy, every ratio is one and only
            its gradient counts.
        clip_low, clip_high: distances of the clip bounds from one; DAPO's "clip higher" is 0.2 and 0.28.
    """

    advantages: Tensor
    sequence_index: Tensor
    num_tokens: float
    old_logps: Tensor | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        _check_sequences(type(self).__name__, self.advantages, self.sequence_index, self.num_tokens)
        if self.old_logps is not None and self.old_logps.shape != self.sequence_index.shape:
            raise ValueError(
                f"GRPO: old_logps has shape {tuple(self.old_logps.shape)}, sequence_index has "
                f"{tuple(self.sequence_index.shape)}; give one old log-probability a row"
            )
        if not (0 <= self.clip_low < 1 and self.clip_high >= 0):
            raise ValueError(
                f"GRPO: clip_low={self.clip_low}, clip_high={self.clip_high}; "
                "clip_low must lie in [0, 1) and clip_high must not be negative"
            )

    def active(self) -> Tensor:
        """(N,) bool: rows whose sequence has an advantage other than zero."""
        return (self.advantages != 0)[self.sequence_index]

    def __call__(self, tokens: Tokens) -> Tensor:
        advantage = self.advantages[self.sequence_index[tokens.rows]]
        old = tokens.logps.detach()
        if self.old_logps is not None:
            # Where there is no advantage an earlier call may have left NaN; it must not reach the sum as 0 * NaN.
            old = torch.where(advantage == 0, old, self.old_logps[tokens.rows])
        ratio = torch.exp(tokens.logps - old)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return -torch.minimum(ratio * advantage, clipped * advantage) / self.num_tokens


@dataclass(frozen=True, eq=False)
class SFT:
    """Cross entropy, optionally weighted: ``-w_t * logp_t / num_tokens``.

    Args:
        num_tokens: what to divide by, usually the target tokens of the whole optimizer step.
        weights: (N,) one a row; None is one everywhere.
    """

    num_tokens: float
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        _check_num_tokens("SFT", self.num_tokens)
        if self.weights is not None and self.weights.ndim != 1:
            raise ValueError(f"SFT: weights has shape {tuple(self.weights.shape)}; give one weight a row, (N,)")

    def active(self) -> Tensor | None:
        """(N,) bool: rows whose weight is not zero; None when all rows count."""
        return None if self.weights is None else self.weights != 0

    def __call__(self, tokens: Tokens) -> Tensor:
        weight = 1.0 if self.weights is None else self.weights[tokens.rows]
        return -(weight / self.num_tokens) * tokens.logps


def _check_num_tokens(name: str, num_tokens: float) -> None:
    if isinstance(num_tokens, (int, float)) and not 0 < num_tokens < float("inf"):
        raise ValueError(f"{name}: num_tokens={num_tokens}; it divides the loss and must be positive and finite")


def _check_sequences(name: str, advantages: Tensor, sequence_index: Tensor, num_tokens: float) -> None:
    if advantages.ndim != 1 or not advantages.is_floating_point():
        raise ValueError(
            f"{name}: advantages has shape {tuple(advantages.shape)} and dtype {advantages.dtype}; "
            "give a floating-point vector with one advantage a sequence, (B,)"
        )
    if sequence_index.ndim != 1 or sequence_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: sequence_index has shape {tuple(sequence_index.shape)} and dtype {sequence_index.dtype}; "
            "give an int64 vector with the sequence of each row, (N,)"
        )
    # On a GPU the look would wait for the device; an index out of range is caught there by the gather's own assertion.
    if sequence_index.device.type == "cpu" and sequence_index.numel():
        low, high = sequence_index.aminmax()
        if low < 0 or high >= advantages.numel():
            raise ValueError(
                f"{name}: sequence_index spans {low}..{high} but advantages has {advantages.numel()} sequences"
            )
    _check_num_tokens(name, num_tokens)
