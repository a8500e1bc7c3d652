"""Whether batches of a policy are packed with shared prompts or right-padded, and if so, why: found out once, by trying
both on a few tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from aapo_fast.data.packing import Weighted, pack, pad
from aapo_fast.models.attention import UnpackableError
from aapo_fast.models.load import steers_attention
from aapo_fast.trainer.transfer import batch_to_device
from aapo_fast.types import Sample

if TYPE_CHECKING:
    from aapo_fast.trainer.policy import Policy

LAYOUT_TOLERANCE = 0.05
"""Largest relative difference of packed and padded hidden states; rounding of 16-bit models stays below it."""


@torch.no_grad()
def why_padded(policy: Policy) -> str:
    """What keeps batches of ``policy`` from being packed, for a log; empty where nothing does.

    Raises:
        Exception: whatever packed rows meet that is no refusal. It is a fault of ours: to fall back on padding would
            hide it, at several times the cost of a step.
    """
    if not steers_attention(policy.model):
        return "its attention cannot be told what a packed row holds"
    samples = _few_samples(policy.head.weight.shape[0])
    packed = batch_to_device(pack(samples, ragged=policy.flash is not None), policy.device)
    with policy.autocast():
        truth = policy.hidden_states(batch_to_device(pad(samples, 0), policy.device)).float()
        try:
            ours = policy.hidden_states(packed).float()
        except (TypeError, ValueError, RuntimeError) as error:
            if not _refuses(error, policy):
                raise
            return f"{type(error).__name__}: {(str(error).strip() or 'no more is said').splitlines()[0]}"
    gap, size = (ours - truth).norm().item(), truth.norm().item()
    if gap <= LAYOUT_TOLERANCE * size:  # NaN is no agreement
        return ""
    return f"its hidden states of packed rows are {gap / size if size else gap:.0%} off those of padded ones"


def _refuses(error: Exception, policy: Policy) -> bool:
    """Whether it says that this model, or this kernel, takes no packed rows."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, UnpackableError):
        return True
    # A decoder without position_ids, or with layers that hand nothing on to their attention.
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return True
    # What a kernel cannot compute, each package says in its own way. Without it the policy is tried again.
    return policy.flash is not None


def _few_samples(vocab_size: int) -> list[Weighted]:
    """Two prompts with two completions each."""
    prompts = [tuple(i % vocab_size for i in ids) for ids in ((5, 3, 9, 4), (7, 2))]
    return [
        Weighted(Sample(prompt, tuple(t % vocab_size for t in tokens), (), "", "stop", 0), 1.0)
        for prompt in prompts
        for tokens in ((6, 8, 3), (9, 1))
    ]
