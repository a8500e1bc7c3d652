"""What a caller may give, and what is said where it does not fit: one line with names and numbers."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from aapo_fast.objective_checks import is_number
from aapo_fast.objectives import Objective
from aapo_fast.ops.linear_policy.autograd import IGNORE_INDEX
from aapo_fast.ops.linear_policy.sharded import VocabularyShard, is_distributed

SMALLEST_THRESHOLD = 1e-30
"""Its reciprocal is a number, and no probability that matters is less."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Types, shapes, dtypes and devices. Raises ValueError."""
    for name, given in (("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias)):
        _check_type(name, given)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, weight has {tuple(weight.shape)}; they must be (N, H) and (V, H)"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has shape (0, H); a head needs at least one vocabulary entry")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype}; "
            f"give ({hidden.shape[0]},) int64, one token a row of hidden"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; give ({weight.shape[0]},), one entry a vocabulary entry")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; give fp64, fp32, bf16 or fp16")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden is on {hidden.device}; move them together")


def _check_type(name: str, given: object) -> None:
    if given is None and name == "bias":
        return
    if not isinstance(given, Tensor):
        remedy = f"its {name}" if isinstance(given, torch.nn.Module) else "a torch.Tensor"
        raise ValueError(f"{name} is a {type(given).__name__}; give {remedy}")
    if is_distributed(given):  # of the weight and the bias there is the whole by now
        raise ValueError(f"{name} is a DTensor; give this rank's rows of it, {name}.to_local()")


def check_objective(objective: Objective, targets: Tensor) -> None:
    """Callable, and built for these rows. Raises ValueError."""
    if not callable(objective) or isinstance(objective, type):
        what = f"the class {objective.__name__}" if isinstance(objective, type) else repr(objective)
        raise ValueError(f"objective is {what}; give an objective, for example AAPO(advantages, sequence_index, T)")
    num_rows = getattr(objective, "num_rows", None)
    covered = num_rows() if num_rows is not None else None
    if covered is not None and covered != targets.numel():
        raise ValueError(
            f"objective covers {covered} rows but targets has {targets.numel()}; build it with one entry a row"
        )


def check_temperature(temperature: float | Tensor, targets: Tensor) -> None:
    """A positive number, or one a row, which in a row without a target may be anything. Raises ValueError."""
    if not isinstance(temperature, Tensor):
        if not (is_number(temperature) and 0 < temperature < math.inf):
            raise ValueError(f"temperature={temperature!r}; it divides the logits and must be positive and finite")
        return
    if temperature.shape != targets.shape or temperature.device != targets.device:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)} on {temperature.device}; give a number, or one a row: "
            f"({targets.shape[0]},) on {targets.device}"
        )
    if temperature.requires_grad:
        raise ValueError("temperature requires a gradient, and gets none here; detach it")
    if temperature.device.type != "cpu":
        good = ((temperature > 0) & temperature.isfinite()) | (targets == IGNORE_INDEX)
        torch._assert_async(good.all(), "temperature must be positive and finite")
    elif not torch.compiler.is_compiling():
        bad = ~((temperature > 0) & temperature.isfinite()) & (targets != IGNORE_INDEX)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"temperature[{row}] is {temperature[row].item()}; it must be positive and finite")


def check_numbers(
    softcap: float | None, logit_scale: float, backward: str, sparsity_threshold: float, seed: int, implementation: str
) -> None:
    """Everything that is not a tensor. Raises ValueError."""
    for name, number, more in (("softcap", softcap, ", or None"), ("logit_scale", logit_scale, "")):
        if isinstance(number, Tensor):
            raise ValueError(f"{name} is a tensor, which would get no gradient here; give a positive number{more}")
        positive = number is not None and is_number(number) and 0 < number < math.inf
        if not (positive or (number is None and more)):
            raise ValueError(f"{name}={number!r}; give a positive, finite number{more}")
    if backward not in ("exact", "sparse"):
        raise ValueError(f"backward={backward!r} is unknown; use 'exact' or 'sparse'")
    if backward == "sparse" and implementation == "reference":
        raise ValueError(
            "backward='sparse' is not for implementation='reference', which is the exact truth; use 'torch'"
        )
    if not (is_number(sparsity_threshold) and SMALLEST_THRESHOLD <= sparsity_threshold <= 1):
        raise ValueError(
            f"sparsity_threshold={sparsity_threshold!r} must lie in (0, 1], and not below {SMALLEST_THRESHOLD:g}"
        )
    if not is_number(seed, numbers.Integral):
        raise ValueError(f"seed={seed!r} must be an int")


def as_int64(seed: int) -> int:
    """The low 64 bits, which are what counts, as a signed number."""
    return seed if torch.compiler.is_compiling() else (int(seed) + 2**63) % 2**64 - 2**63


def live_rows(vocab_size: int | None, num_rows: int, shard: VocabularyShard | None, implementation: str) -> int:
    """How many of the weight's rows are tokens. Raises ValueError if none is, or if the weight is too short."""
    if shard is not None:
        if not isinstance(shard, VocabularyShard):
            raise ValueError(f"vocabulary_shard is a {type(shard).__name__}; give a VocabularyShard")
        if vocab_size is not None:
            raise ValueError(f"vocab_size={vocab_size} beside vocabulary_shard; give it as the shard's vocab_size")
        if implementation == "reference":
            raise ValueError("vocabulary_shard is not for implementation='reference'; use 'auto' or 'torch'")
        live = min(num_rows, shard.vocab_size - shard.start)
        if live <= 0:
            raise ValueError(
                f"vocabulary_shard starts at {shard.start}, beyond the {shard.vocab_size} tokens of the vocabulary: "
                "this rank holds padding only; spread the vocabulary more evenly"
            )
        return live
    if vocab_size is None:
        return num_rows
    if not (is_number(vocab_size, numbers.Integral) and 0 < vocab_size <= num_rows):
        raise ValueError(f"vocab_size={vocab_size!r}; weight has {num_rows} rows, give as many or fewer")
    return int(vocab_size)


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """Every target a token or ``IGNORE_INDEX``. Raises ValueError on the CPU.

    On a GPU a look would make the host wait, so the device asserts, as PyTorch's own losses do; no kernel reads out of
    bounds either way.
    """
    bad = ((targets < 0) | (targets >= vocab_size)) & (targets != IGNORE_INDEX)
    if targets.device.type != "cpu":
        torch._assert_async(~bad.any(), f"targets outside [0, {vocab_size}) that are not {IGNORE_INDEX}")
    elif bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])}, outside [0, {vocab_size}); "
            f"mark rows without a target with {IGNORE_INDEX}"
        )
