"""The fused head behind the calls by which TRL's trainers ask their model for log-probabilities.

TRL calls ``model(..., labels=..., fused_lm_head=True)``. ``_fuse_head`` answers that call, and with an objective the
call computes loss and gradients too. It goes through the model's own forward, so that whatever wraps the model (DDP,
peft, accelerate) sees an ordinary one.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from aapo_fast import linear_logprobs, linear_policy_loss
from aapo_fast.models.head import check_head, find_decoder, find_head
from aapo_fast.models.lora import has_adapter
from aapo_fast.ops.dispatch import resolve
from aapo_fast.ops.linear_policy.checks import check_numbers
from aapo_fast.types import UserError

IGNORE_INDEX = -100
CPU = torch.device("cpu")


class WithObjective:
    """Stands in for a model whose forward is asked for log-probabilities: asks for the loss of an objective as well."""

    def __init__(self, model: Any, objective: Any, seed: int) -> None:
        self.model, self.objective, self.seed = model, objective, seed
        self.loss: Any = None

    def __call__(self, **arguments: Any) -> Any:
        out = self.model(**arguments, objective=self.objective, seed=self.seed)
        self.loss = out.loss
        return out


def seed(trainer: GRPOTrainer) -> int:
    """Of sparse gradient rows: another one in each microbatch of each rank."""
    world = trainer.accelerator.num_processes
    return int((trainer.args.seed << 32) + trainer._step * world + trainer.accelerator.process_index)


def fuse_heads(trainer: GRPOTrainer, how: dict[str, Any]) -> None:
    """Fuse the head of the trainer's model, and of its reference model if it has one.

    Args:
        how: ``backward``, ``sparsity_threshold``, ``implementation`` of ``linear_policy_loss``.

    Raises:
        UserError: a head that the fused pass does not compute.
    """
    models = [trainer.model] if trainer.ref_model is None else [trainer.model, trainer.ref_model]
    for model in models:
        plain = trainer.accelerator.unwrap_model(model)
        check_head(plain)
        base = plain.get_base_model() if has_adapter(plain) else plain
        _fuse_head(base, trainer.temperature, trainer.args.cast_lm_head_to_fp32, how)


def _fuse_head(model: Any, temperature: float, head_in_fp32: bool, how: dict[str, Any]) -> None:
    """Answer ``model(..., labels=..., fused_lm_head=True)`` by the fused head; any other call is the model's own."""
    theirs = model.forward

    # `generate` checks its arguments against the signature.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        objective: Any = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None:
            return theirs(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        # Looked up at each call: what wraps a model may replace its parts.
        hidden = find_decoder(self)(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]
        head = find_head(self)
        mask = labels[:, 1:] != IGNORE_INDEX
        rows, targets = hidden[mask], labels[:, 1:][mask]
        with torch.autocast(hidden.device.type, enabled=False) if head_in_fp32 else nullcontext():
            rows = rows.float() if head_in_fp32 else rows
            arguments = {**head.arguments(temperature), **how, "seed": seed}
            if objective is None:
                scored = linear_logprobs(rows, head.weight, targets, **arguments)
                loss, logps, entropy = None, scored.logps, scored.entropy
            else:
                # Of rows without weight too, since TRL's metrics are over all tokens.
                out = linear_policy_loss(rows, head.weight, targets, objective, **arguments, all_logps=True)
                loss, logps, entropy = out.loss, out.logps, out.entropy
        return FusedCausalLMOutput(
            loss=loss, log_probs=_spread(mask, logps), entropy=_spread(mask, entropy), label_mask=mask
        )

    model.forward = types.MethodType(forward, model)


def _spread(mask: Tensor, values: Tensor) -> Tensor:
    """(B, T) with the values where the mask is set and zero elsewhere; differentiable."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def refuse(who: str, reasons: Iterator[str]) -> None:
    """Raise UserError with the first of the reasons, if there is one; ``who`` refuses."""
    for reason in reasons:
        raise UserError(f"{who}: {reason}")


def wrong_settings(
    backward: str, sparsity_threshold: float, implementation: str = "auto", device: torch.device = CPU
) -> Iterator[str]:
    """What the op will say of its settings, before the first completion is drawn."""
    try:
        chosen = resolve(implementation, device)
        check_numbers(None, 1.0, backward, sparsity_threshold, 0, chosen)
    except (ValueError, RuntimeError) as error:
        yield str(error)


def unsupported(trainer: GRPOTrainer) -> Iterator[str]:
    """What a trainer does that the fused head does not, each in a line with the remedy."""
    if trainer._is_vlm:
        yield "vision-language models are not supported; leave the trainer as it is"
    if trainer.aux_loss_enabled:
        yield "the load-balancing loss of a mixture of experts is not computed here; set router_aux_loss_coef=0.0"
    if trainer.is_fsdp_enabled:
        yield "FSDP is not supported; use DDP, or leave the trainer as it is"
    if trainer.is_deepspeed_enabled:
        yield "DeepSpeed is not supported; use DDP, or leave the trainer as it is"
    if trainer.args.torch_compile:
        yield "torch_compile=True is not supported; set it to False"
