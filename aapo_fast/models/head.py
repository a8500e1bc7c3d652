"""The head of a causal language model, and its decoder: hidden states without logits.

    logits = softcap(logit_scale * (hidden . weight + bias))

Models differ in the scale and in the soft-cap; ``check_head`` compares with the model's own logits once, so a model
that does something else is refused and never trained wrongly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aapo_fast.ops.linear_policy import VocabularyShard
from aapo_fast.types import UserError


@dataclass(frozen=True, eq=False)
class Head:
    """What turns hidden states into logits.

    Attributes:
        weight: (V, H), the parameter itself, tied or not, so that gradients reach it.
        bias: (V,) or None.
        logit_scale: s, a factor on the products (Cohere, Granite, Falcon-H1).
        softcap: c of the final soft-capping (Gemma), or None.
        vocabulary_shard: which part weight and bias are of a vocabulary-parallel head; None is all of it.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    vocabulary_shard: VocabularyShard | None = None

    def arguments(self, temperature: float) -> dict[str, Any]:
        """Keyword arguments for ``linear_policy_loss`` and ``linear_logprobs``."""
        return {
            "bias": self.bias,
            "temperature": temperature,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "vocabulary_shard": self.vocabulary_shard,
        }


def find_decoder(model: Any) -> nn.Module:
    """The part of ``model`` that computes hidden states."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    if decoder is None or decoder is base:
        decoder = getattr(base, getattr(base, "base_model_prefix", ""), None)
    if decoder is None or decoder is base:
        raise UserError(f"{type(base).__name__}: no decoder found beside the head; is it a causal language model?")
    return decoder


def find_layers(decoder: nn.Module) -> list[nn.Module]:
    """Its layers: what is in its lists of modules."""
    return [layer for child in decoder.children() if isinstance(child, nn.ModuleList) for layer in child]


def find_head(model: Any) -> Head:
    """The head of ``model``.

    Raises:
        UserError: there is none, or it is not a plain linear layer (an adapter on it, a quantised one).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if module is None:
        raise UserError(f"{type(base).__name__} has no language-model head; load it as a causal language model")
    if type(module) is not nn.Linear:
        raise UserError(
            f"{type(base).__name__}: the head is a {type(module).__module__}.{type(module).__name__}, not a plain "
            "torch.nn.Linear. Adapters on the head and quantised heads are not supported yet: take the head out of "
            "target_modules / modules_to_save, or merge the adapter first"
        )
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module.weight, module.bias, _logit_scale(config), softcap)


def _logit_scale(config: object) -> float:
    scale = 1.0
    for name, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value > 0:
            scale *= float(value) ** power
    return scale


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare decoder and head with the model's own logits on a few tokens.

    Raises:
        UserError: they differ, so the fused loss would train another model than the one that generates.
    """
    decoder, head = find_decoder(model), find_head(model)
    ids = torch.arange(1, 7, device=head.weight.device)[None] % head.weight.shape[0]
    training = model.training
    model.eval()
    truth = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    model.train(training)
    logits = nn.functional.linear(hidden, head.weight, head.bias).float() * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    error = ((logits - truth).norm() / truth.norm().clamp(min=1e-30)).item()
    # A 16-bit model rounds its logits (2^-9 in bf16); another scale, cap or projection is off by far more.
    if not error < 0.02 or math.isnan(error):
        raise UserError(
            f"{type(model).__name__}: logits from decoder and head differ from the model's own by {error:.1%}. "
            "The model does something between them that is not known here (model_type "
            f"{getattr(model.config, 'model_type', '?')!r}); it cannot be trained with the fused loss"
        )
