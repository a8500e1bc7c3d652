"""Whether an objective's arguments fit together; one line each that names them where they do not."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor


def is_number(value: object, kind: type = numbers.Real) -> bool:
    """``isinstance`` for the abstract numbers, which NumPy's belong to and the type checker does not know."""
    return isinstance(value, kind)


def check_tensor(name: str, field: str, values: object) -> None:
    if values is not None and not isinstance(values, Tensor):
        raise ValueError(f"{name}: {field} is a {type(values).__name__}; give a torch.Tensor")


def check_num_tokens(name: str, num_tokens: Any) -> None:
    if isinstance(num_tokens, Tensor):
        if num_tokens.ndim != 0:
            raise ValueError(f"{name}: num_tokens has shape {tuple(num_tokens.shape)}; give one number for all rows")
        # On a GPU the look would wait for the device.
        if num_tokens.device.type != "cpu":
            return
    elif not isinstance(num_tokens, numbers.Real):
        raise ValueError(f"{name}: num_tokens={num_tokens!r}; give a number, or a tensor without dimensions")
    # A traced graph should not be bound to the number that it saw first.
    if torch.compiler.is_compiling():
        return
    if not 0 < num_tokens < float("inf"):
        raise ValueError(
            f"{name}: num_tokens={float(num_tokens):g}; it divides the loss and must be positive and finite"
        )


def check_clip(name: str, low: float, high: float) -> None:
    if not (is_number(low) and is_number(high) and 0 <= low <= 1 and high >= 0):
        raise ValueError(
            f"{name}: clip_low={low!r}, clip_high={high!r}; clip_low must lie in [0, 1], clip_high be at least 0"
        )


def check_rows(name: str, field: str, values: Tensor | None, sequence_index: Tensor) -> None:
    check_tensor(name, field, values)
    if values is not None and values.shape != sequence_index.shape:
        raise ValueError(
            f"{name}: {field} has shape {tuple(values.shape)}, sequence_index has {tuple(sequence_index.shape)}; "
            "give one log-probability a row"
        )


def check_sequences(name: str, advantages: Tensor, sequence_index: Tensor, num_tokens: float | Tensor) -> None:
    for field, value in (("advantages", advantages), ("sequence_index", sequence_index)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: {field} is a {type(value).__name__}; give a torch.Tensor")
    if advantages.ndim != 1 or not advantages.is_floating_point():
        raise ValueError(
            f"{name}: advantages has shape {tuple(advantages.shape)} and dtype {advantages.dtype}; "
            "give a floating-point vector with one advantage a sequence, (B,)"
        )
    if sequence_index.ndim != 1 or sequence_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: sequence_index has shape {tuple(sequence_index.shape)} and dtype {sequence_index.dtype}; "
            "give an int64 vector with the sequence of each row, (N,)"
        )
    if advantages.device != sequence_index.device:
        raise ValueError(
            f"{name}: advantages is on {advantages.device}, sequence_index is on {sequence_index.device}; put them on "
            "one device (the CPU will do, whatever device the loss runs on)"
        )
    check_num_tokens(name, num_tokens)
    # In a traced graph there is nothing to see: the operator looks when it runs.
    if torch.compiler.is_compiling() or not sequence_index.numel():
        return
    if sequence_index.device.type != "cpu":  # a look would make the host wait, so the device asserts
        good = (sequence_index >= 0) & (sequence_index < advantages.numel())
        torch._assert_async(good.all(), f"{name}: sequence_index outside [0, {advantages.numel()})")
        return
    low, high = sequence_index.aminmax()
    if low < 0 or high >= advantages.numel():
        raise ValueError(
            f"{name}: sequence_index spans {low}..{high} but advantages has {advantages.numel()} sequences"
        )
