"""Liger's kernels for what is in a model besides products, attention and the loss: norms, RoPE, gated layers."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

from aapo_fast.models.head import find_head
from aapo_fast.types import first_line


def use_liger(model: Any) -> bool:
    """Patch this model, if it is on a GPU and of a kind that Liger knows; False where nothing was done.

    The loss stays ours: Liger's would materialise what the fused head avoids.
    """
    if find_head(model).weight.device.type != "cuda":
        return False
    patches, _ = _find()
    if patches is None:
        return False
    patches._apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    return model.config.model_type in patches.MODEL_TYPE_TO_APPLY_LIGER_FN


def broken_package() -> str:
    """What is the matter with a Liger that is installed and cannot be loaded; empty where nothing is."""
    return _find()[1]


def _find() -> tuple[ModuleType | None, str]:
    """Liger's patches, if they are there, or what is the matter with them."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None, ""
    try:
        from liger_kernel.transformers import monkey_patch
    except Exception as error:  # made for another Transformers or Triton, say
        return None, (
            "model.liger='auto': liger-kernel is installed and cannot be loaded "
            f"({type(error).__name__}: {first_line(error)}); install another version, or remove it"
        )
    return monkey_patch, ""
