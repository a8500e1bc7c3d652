"""Transformers' causal language models and ``Trainer`` with the fused cross entropy (transformers 5.17).

    fuse_loss(model)                                  # model(..., labels=...) computes its loss without logits

    class Trainer(FusedLossMixin, transformers.Trainer): ...
    Trainer(model, args, train_dataset=...).train()   # the same, with an optional weight a token: "loss_weights"

Gradient accumulation is Transformers' own: with ``num_items_in_batch``, which ``Trainer`` passes, the sum over tokens
is divided by it, otherwise by the tokens of the call.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from aapo_fast import SFT, linear_policy_loss
from aapo_fast.models.head import check_head, find_decoder, find_head
from aapo_fast.models.lora import has_adapter
from aapo_fast.types import UserError

IGNORE_INDEX = -100
WEIGHTS = "loss_weights"
LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index", "return_dict")


def fuse_loss(model: Any, *, implementation: str = "auto") -> None:
    """Make ``model(..., labels=...)`` compute its loss through the fused head: no logits, ``logits=None``.

    In training mode always. In evaluation mode the model's own forward runs, since whoever evaluates may want logits;
    ``skip_logits=True`` or False in the call decides otherwise. Calls without ``labels`` are the model's own.

    The call takes one argument more: ``loss_weights``, (B, L), a factor on the loss of the label at each position. The
    division is still by the number of labels.

    Args:
        model: a causal language model, or a peft model of one, without an adapter on its head.
        implementation: of the row kernels, as in ``linear_policy_loss``.

    Raises:
        UserError: the model's head or loss is not one that the fused pass computes.
    """
    base = model.get_base_model() if has_adapter(model) else model
    name = type(base).__name__
    if getattr(base, "loss_function", None) is not ForCausalLMLoss:
        raise UserError(f"fuse_loss: the loss of {name} is not the plain causal cross entropy; leave it as it is")
    if base.config.get_text_config() is not base.config:
        raise UserError(f"fuse_loss: {name} takes more than text, which its decoder alone would not see; leave it")
    if getattr(base.config, "output_router_logits", False):
        raise UserError(f"fuse_loss: {name} adds a load-balancing loss; set config.output_router_logits=False")
    if hasattr(base, "_own_forward"):
        raise UserError(f"fuse_loss: this {name} is fused already; call it once")
    check_head(model)
    base._own_forward = base.forward

    # Trainer and `generate` look at the signature.
    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights, skip_logits = kwargs.pop(WEIGHTS, None), kwargs.pop("skip_logits", None)
        wants_loss = kwargs.get("labels") is not None
        if weights is not None and not wants_loss:
            raise UserError(f"{WEIGHTS} needs labels; drop it, or give them")
        if skip_logits is None:
            skip_logits = self.training
        if not wants_loss or not (skip_logits or weights is not None):
            return self._own_forward(*args, **kwargs)
        found = _forward_with_loss(self, args, dict(kwargs), weights, implementation)
        if not skip_logits:  # weighted, and evaluated: its own forward knows no weights
            without_loss = {key: value for key, value in kwargs.items() if key not in LOSS_ARGUMENTS}
            found.logits = self._own_forward(*args, **without_loss, return_dict=True).logits
        return found.to_tuple() if kwargs.get("return_dict") is False else found

    base.forward = types.MethodType(forward, base)


def _forward_with_loss(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], weights: Tensor | None, implementation: str
) -> CausalLMOutputWithPast:
    kept = kwargs.pop("logits_to_keep", 0)
    if not isinstance(kept, int) or kept:
        raise UserError("logits_to_keep beside labels is not supported by the fused loss; leave one of them out")
    if kwargs.get("output_router_logits"):
        raise UserError("output_router_logits=True adds a load-balancing loss, which is not computed; leave it out")
    labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    num_items, ignored = kwargs.pop("num_items_in_batch", None), kwargs.pop("ignore_index", IGNORE_INDEX)
    kwargs.pop("return_dict", None)
    targets = _shifted(labels, ignored) if shift_labels is None else shift_labels
    outputs = find_decoder(model)(*args, **kwargs)
    hidden, head = outputs.last_hidden_state, find_head(model)
    mask = targets.to(hidden.device) != ignored
    rows, targets = hidden[mask], targets.to(hidden.device)[mask]
    if weights is not None:
        weights = (_shifted(weights, 0) if shift_labels is None else weights).to(hidden.device)[mask].float()
    # As a mean over no tokens: a batch without labels has the loss NaN in Transformers, and a gradient of zero here.
    divisor = targets.numel() if num_items is None else num_items
    divisor = divisor.to(hidden.device).clamp(min=1) if isinstance(divisor, Tensor) else max(1, divisor)
    objective = SFT(divisor, weights)
    loss = linear_policy_loss(
        rows, head.weight, targets, objective, implementation=implementation, **head.arguments(1.0)
    ).loss
    return CausalLMOutputWithPast(
        loss=loss,
        past_key_values=getattr(outputs, "past_key_values", None),
        hidden_states=getattr(outputs, "hidden_states", None),
        attentions=getattr(outputs, "attentions", None),
    )


def _shifted(values: Tensor, fill: float) -> Tensor:
    """(B, L) moved one to the left: position t holds what it is that position t predicts."""
    return torch.nn.functional.pad(values, (0, 1), value=fill)[:, 1:]


class FusedLossMixin:
    """Before ``transformers.Trainer`` in the bases of a class: trains with ``fuse_loss``.

    A batch may hold ``loss_weights``, (B, L): the collator pads it like ``labels``, with anything.

    Raises:
        UserError: as ``fuse_loss``; or a loss of one's own, which needs logits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings: Any = self
        if settings.compute_loss_func is not None:
            raise UserError("FusedLossMixin: compute_loss_func needs logits, which are not computed; leave it out")
        if settings.args.label_smoothing_factor:
            raise UserError("FusedLossMixin: label_smoothing_factor needs logits; set it to 0")
        if settings.args.n_gpu > 1:
            raise UserError("FusedLossMixin: nn.DataParallel is not supported; launch with torchrun, or show one GPU")
        fuse_loss(settings.accelerator.unwrap_model(settings.model))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns: Any = self._signature_columns  # type: ignore[has-type]
        if WEIGHTS not in columns:
            self._signature_columns = [*columns, WEIGHTS]
