"""Activation checkpointing: what the backward pass of a layer needs is computed again there, not kept.

none         kept, all of it
selective    products and attention are kept; norms, activations and rotations, which are cheap, computed again
full         only the inputs of layers are kept; a third more arithmetic
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from aapo_fast.types import UserError

_aten = torch.ops.aten
PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten._grouped_mm.default})
ATTENTION = ("attention", "attn")
"""In the names of the operators that compute it: PyTorch's, and those of flash-attn."""


def recompute_layers(decoder: nn.Module, kind: Literal["none", "selective", "full"]) -> None:
    """Have the layers of ``decoder`` compute again what ``kind`` does not keep. Where gradients are wanted it has to be
    called with ``use_cache=False``: a layer that is computed twice would lengthen the cache twice.

    Raises:
        UserError: it has no list of layers.
    """
    if kind == "none":
        return
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"model.activation_checkpointing={kind!r}: {type(decoder).__name__} has no list of layers; set it to 'none'"
        )
    # No layer draws anything (models are in eval mode), so random states need not be kept.
    more: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        more["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)
    for layer in layers:
        forward: Any = layer.forward  # of its class, or what ``models.compiled`` has put there
        layer.forward = MethodType(partial(_recomputed, more, forward.__func__), layer)


def _recomputed(more: dict[str, Any], function: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``forward`` of a layer, as a method of it: a copy of the layer, for a frozen reference or for shards, must not go
    on computing with the layer that it was copied from.
    """
    forward = partial(function, layer)
    if not torch.is_grad_enabled():  # it generates
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **more, **kwargs)


def _keep(context: object, operator: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
    name = str(operator)
    kept = operator in PRODUCTS or any(part in name for part in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
