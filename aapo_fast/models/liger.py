"""Liger's kernels for what is in a model besides products, attention and the loss: norms, RoPE, gated layers."""

from __future__ import annotations

import importlib.util
from typing import Any

from aapo_fast.models.head import find_head


def use_liger(model: Any) -> bool:
    """Patch this model, if it is on a GPU and of a kind that Liger knows; False where nothing was done.

    The loss stays ours: Liger's would materialise what the fused head avoids.
    """
    if find_head(model).weight.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    return model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN
