"""The gradient of a step, microbatch by microbatch; where a GPU's memory runs out, again in smaller ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aapo_fast.data.packing import Weighted, microbatches, shares
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.ranks import Ranks
from aapo_fast.types import UserError


@dataclass
class Sums:
    """What the microbatches of this rank have added up to; the gradient is in the parameters.

    Attributes:
        loss, entropy: sums over tokens.
        trained_tokens: completion tokens with a loss.
        computed_tokens: of the forward passes, padding included.
        separate_tokens: that one row a completion would have had, each with its prompt.
        logps, rollout_logps: of the trained tokens, by the trainer and by the rollout engine.
    """

    loss: float = 0.0
    entropy: float = 0.0
    trained_tokens: int = 0
    computed_tokens: int = 0
    separate_tokens: int = 0
    logps: list[Tensor] = field(default_factory=list)
    rollout_logps: list[Tensor] = field(default_factory=list)


def accumulate(
    policy: Policy, live: Sequence[Weighted], num_tokens: int, seed: int, max_tokens: int
) -> tuple[Sums, int]:
    """Add up the gradient of ``live``, and say which microbatches it took: the limit, in tokens, that fitted.

    A pass for which the GPU's memory does not suffice leaves nothing behind; the step begins anew with half the limit.
    It is the same gradient, for one denominator counts the whole step, but for the sample of sparse rows.

    Args:
        live: what has a weight; of all ranks.
        num_tokens: of the whole step.
        seed: of sparse rows.
        max_tokens: of one microbatch.

    Raises:
        UserError: not even one completion at a time fits; there are several ranks, whose passes go together.
    """
    while True:
        try:
            return _accumulate(policy, live, num_tokens, seed, max_tokens), max_tokens
        except torch.OutOfMemoryError as error:
            policy.trained.zero_grad(set_to_none=True)
            _check_halving(policy.ranks, live, max_tokens, error)
        max_tokens //= 2
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()  # now that the failed pass is gone, with the error that held it


def _accumulate(policy: Policy, live: Sequence[Weighted], num_tokens: int, seed: int, max_tokens: int) -> Sums:
    sums = Sums()
    for index, part in _microbatches(policy.ranks, live, max_tokens):
        batch = policy.batch(part)
        out = policy.loss(batch, num_tokens, seed + index)
        out.loss.backward()
        sums.loss += out.loss.item()
        sums.entropy += out.entropy.sum().item()
        sums.trained_tokens += out.entropy.numel()
        sums.computed_tokens += batch.input_ids.numel() if part else 0
        sums.separate_tokens += sum(len(w.sample.prompt_ids) + len(w.sample.token_ids) - 1 for w in part)
        sums.logps.append(out.logps)
        sums.rollout_logps.append(batch.rollout_logps)
    return sums


def _check_halving(ranks: Ranks, live: Sequence[Weighted], max_tokens: int, error: Exception) -> None:
    """Raise unless half of ``max_tokens`` would cut a microbatch in two."""
    reason = str(error).split(". ")[0]
    if ranks.world > 1:
        raise UserError(
            f"{reason}; with {ranks.world} ranks a step is not begun anew: lower train.max_microbatch_tokens="
            f"{max_tokens}, or set model.activation_checkpointing='full'"
        ) from error
    if all(len(part) == 1 for part in microbatches(live, max_tokens)):
        longest = max(len(w.sample.prompt_ids) + len(w.sample.token_ids) for w in live)
        raise UserError(
            f"{reason}, with one completion at a time (the longest has {longest} tokens with its prompt); lower "
            "rollout.max_tokens, set model.activation_checkpointing='full', or train an adapter (lora.rank)"
        ) from error


def _microbatches(ranks: Ranks, live: Sequence[Weighted], max_tokens: int) -> Iterator[tuple[int, list[Weighted]]]:
    """This rank's microbatches, numbered apart from those of all others; as many on every rank, since each is a
    collective pass: a rank whose own are used up has empty ones.
    """
    cuts = [list(microbatches(share, max_tokens)) for share in shares(live, ranks.world)]
    mine = cuts[ranks.rank]
    for number in range(max(map(len, cuts))):
        yield number * ranks.world + ranks.rank, mine[number] if number < len(mine) else []
