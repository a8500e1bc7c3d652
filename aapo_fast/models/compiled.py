"""The layers of a model under ``torch.compile``, where they train; attention stays as it is.

A layer becomes two or three graphs with attention between them (``models.attention``), whose code is one for all layers
of the model and for any number of tokens. What generates is left alone: every length of a KV cache would be another
case.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from aapo_fast.types import UserError


def compile_layers(decoder: nn.Module, device: torch.device) -> None:
    """Have the layers of ``decoder`` compiled when they are first trained. Names of parameters stay; copies of a layer
    compute with their own weights, by the same code.

    Raises:
        UserError: it has no list of layers; this machine has nothing to compile with.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"model.compile=true: {type(decoder).__name__} has no list of layers; set it to false")
    _check_compiler(device)
    for layer in layers:
        forward: Any = layer.forward
        layer.forward = MethodType(partial(_compiled, forward.__func__), layer)


def _compiled(forward: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``forward`` of a layer, as a method of it: a copy computes with its own weights. The class of a layer is no guide
    to it: FSDP gives it another one.
    """
    function = _compile(forward) if torch.is_grad_enabled() else forward
    return function(layer, *args, **kwargs)


@cache
def _compile(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward, dynamic=True)


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        missing = "" if importlib.util.find_spec("triton") else "Triton"
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            missing = "" if get_cpp_compiler() else "a C++ compiler"
        except InvalidCxxCompiler:
            missing = "a C++ compiler"
    if missing:
        raise UserError(f"model.compile=true needs {missing}, which is not installed; install it, or set it to false")
