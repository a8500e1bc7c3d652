"""The gradient of a step, microbatch by microbatch; where a GPU's memory runs out, again in smaller ones."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from aapo_fast.data.microbatches import Work, microbatches, rounds, waiting_share
from aapo_fast.data.packing import Weighted
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
        waiting_share: of the time of all ranks, by the work that each of their microbatches has.
        logps, rollout_logps: of the trained tokens, by the trainer and by the rollout engine.
    """

    loss: float = 0.0
    entropy: float = 0.0
    trained_tokens: int = 0
    computed_tokens: int = 0
    separate_tokens: int = 0
    waiting_share: float = 0.0
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
        work = work_of(policy)
        cut = rounds(live, max_tokens, work, policy.ranks.world)
        try:
            sums = _accumulate(policy, [parts[policy.ranks.rank] for parts in cut], num_tokens, seed)
            return replace(sums, waiting_share=waiting_share(cut, work)), max_tokens
        except torch.OutOfMemoryError as error:
            policy.trained.zero_grad(set_to_none=True)
            _check_halving(policy.ranks, live, max_tokens, work, error)
        max_tokens //= 2
        if policy.device.type == "cuda":
            gc.collect()  # the failed pass is gone with the error that held it, unless a cycle holds it too
            torch.cuda.empty_cache()


def _accumulate(policy: Policy, parts: Sequence[Sequence[Weighted]], num_tokens: int, seed: int) -> Sums:
    """Of this rank's microbatches; their seeds are no other rank's."""
    sums, ranks = Sums(), policy.ranks
    losses: list[Tensor] = []
    entropies: list[Tensor] = []
    for number, part in enumerate(parts):
        batch = policy.batch(part)
        out = policy.loss(batch, num_tokens, seed + number * ranks.world + ranks.rank)
        out.loss.backward()
        losses.append(out.loss.detach())
        entropies.append(out.entropy.sum())
        sums.trained_tokens += out.entropy.numel()
        sums.computed_tokens += batch.input_ids.numel() if part else 0
        sums.separate_tokens += sum(len(w.sample.prompt_ids) + len(w.sample.token_ids) - 1 for w in part)
        sums.logps.append(out.logps)
        sums.rollout_logps.append(batch.rollout_logps)
    # Only now: a GPU's host that read them one by one would stand still until each microbatch is computed.
    figures = torch.stack([*losses, *entropies]).tolist() if losses else []
    sums.loss, sums.entropy = sum(figures[: len(losses)], 0.0), sum(figures[len(losses) :], 0.0)
    return sums


def work_of(policy: Policy) -> Work:
    """FLOP of forward and backward, counted as in ``trainer.plan_time.train_flops``. An estimate: mixtures of
    experts and windows take less.
    """
    model, head = policy.model, policy.head.weight
    config = model.config.get_text_config()
    num_heads = getattr(config, "num_attention_heads", None) or 0
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(1, num_heads)
    embedding = model.get_input_embeddings().weight
    layers = sum(p.numel() for p in policy.decoder.parameters()) - embedding.numel()
    products = 6 if head.requires_grad else 4  # frozen under an adapter
    return Work(
        token=products * layers,
        pair=12 * config.num_hidden_layers * num_heads * head_size,
        target=(2 if policy.how.backward == "sparse" else products) * head.numel(),
        packed=policy.packed,
    )


def _check_halving(ranks: Ranks, live: Sequence[Weighted], max_tokens: int, work: Work, error: Exception) -> None:
    """Raise unless half of ``max_tokens`` would cut a microbatch in two."""
    reason = str(error).split(". ")[0]
    if ranks.world > 1:
        raise UserError(
            f"{reason}; with {ranks.world} ranks a step is not begun anew: lower train.max_microbatch_tokens="
            f"{max_tokens}, or set model.activation_checkpointing='full'"
        ) from error
    if all(len(part) == 1 for part in microbatches(live, max_tokens, work)):
        longest = max(len(w.sample.prompt_ids) + len(w.sample.token_ids) for w in live)
        raise UserError(
            f"{reason}, with one completion at a time (the longest has {longest} tokens with its prompt); lower "
            "rollout.max_tokens, set model.activation_checkpointing='full', or train an adapter (lora.rank)"
        ) from error
