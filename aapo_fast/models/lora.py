"""LoRA (Hu et al., arXiv 2106.09685) through peft: a small trained adapter on frozen weights.

The frozen reference of such a run costs nothing: it is the model without its adapter. What leaves the trainer is either
the adapter alone or the merged weights, under the names of the original checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from aapo_fast.types import UserError

ADAPTER_FILE = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
"""Every linear layer but the head."""
LORA_FACTOR = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")


def add_adapter(model: Any, rank: int, alpha: float, target_modules: Sequence[str]) -> Any:
    """The model with a fresh adapter (B = 0: it computes what it did), and everything else frozen.

    Args:
        model: from ``models.load``.
        rank: r of the two factors.
        alpha: the product of the factors is scaled by alpha / r.
        target_modules: names of layers, or their last parts ("q_proj"); ["all-linear"] is all but the head.

    Raises:
        UserError: peft is not installed, or there is no such layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(
            f"lora.rank={rank} needs peft ({error}); run: pip install '.[lora]' in aapo-fast's folder"
        ) from error
    names = ALL_LINEAR if list(target_modules) == [ALL_LINEAR] else list(target_modules)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM")
    try:
        adapted = get_peft_model(model, config).eval()
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"lora.target_modules={list(target_modules)}: {reason[:300]}") from error
    layers = [name for name, module in adapted.named_modules() if _has_factors(module)]
    for wanted in [] if names == ALL_LINEAR else names:  # peft is content with one that it finds
        if not any(layer == wanted or layer.endswith(f".{wanted}") for layer in layers):
            raise UserError(f"lora.target_modules={list(target_modules)}: the model has no layer {wanted!r}")
    return adapted


def has_adapter(model: Any) -> bool:
    """Whether ``add_adapter`` made it."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def without_adapter(model: Any) -> AbstractContextManager[Any]:
    """While it lasts the model computes what it did before it had an adapter."""
    return model.disable_adapter() if has_adapter(model) else nullcontext()


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The adapter's tensors, by the names that peft and vLLM load them by, from ``ADAPTER_FILE``."""
    from peft import get_peft_model_state_dict

    # Without it peft asks the hub, at each call, whether the vocabulary has grown.
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach() for name, tensor in found.items()}


def write_adapter_config(model: Any, folder: Path) -> None:
    """What an adapter's tensors in ``folder`` are read by, as peft writes it."""
    [config] = model.peft_config.values()
    config.save_pretrained(folder)


def checkpoint_state(model: Any, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model's checkpoint by its name there, detached; the adapter added to it, or left out."""
    if not has_adapter(model):
        for name, tensor in model.state_dict().items():
            yield name, tensor.detach()
        return
    base = model.get_base_model()
    adapted = {f"{name}.base_layer.weight": module for name, module in base.named_modules() if _has_factors(module)}
    for name, tensor in base.state_dict().items():
        if ".lora_" in name:
            continue
        found = tensor.detach()
        if merged and name in adapted:
            [adapter] = adapted[name].active_adapters
            # In fp32, and rounded once.
            delta = adapted[name].get_delta_weight(adapter).detach()
            found = (found.float() + delta.float()).to(found.dtype)
        yield name.replace(".base_layer.", "."), found


def is_plain_lora(model: Any) -> bool:
    """Whether all that the adapter does is what ``checkpoint_state`` merges: factors of linear layers' weights."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return (
        len(model.active_adapters) == 1
        and all(type(layer) is Linear and not layer.lora_variant for layer in layers)
        and all(LORA_FACTOR.search(name) for name in trained)
        and all(parameter.is_floating_point() for parameter in model.parameters())
    )


def _has_factors(module: Any) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")
