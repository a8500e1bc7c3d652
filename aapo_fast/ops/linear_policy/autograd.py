"""The pass on the autograd tape: which rows are visited, in which dtype, and how gradients are handed out.

Letters: N rows of the call, M rows visited, H hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aapo_fast.objectives import Objective, active_rows
from aapo_fast.ops.linear_policy import runs
from aapo_fast.ops.linear_policy.call import Call
from aapo_fast.ops.linear_policy.chunked import Gradients, Pass
from aapo_fast.ops.linear_policy.memory import new_gradient
from aapo_fast.ops.linear_policy.statistics import SparseProduct
from aapo_fast.transfer import check_not_captured, to_device

IGNORE_INDEX = -100
"""A target with this value has no loss and no log-probability, as in ``torch.nn.functional.cross_entropy``."""


def policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, objective: Objective, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss with gradient; (N,) log-probabilities and entropies without, NaN in rows not visited."""
    wanted = grads_wanted(hidden, weight, bias)
    return _PolicyLoss.apply(hidden, weight, bias, targets, objective, call, wanted)


def run_policy_loss(
    operands: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    objective: Objective,
    call: Call,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Gradients, Tensor | None]:
    """Loss, (N,) log-probabilities, (N,) entropies, gradients of the visited rows, and which rows these are."""
    with _as_written(targets):
        active, objective = active_rows(objective), objective_on_device(objective, targets.device)
        work, rows = _pass(operands, targets, active, call, wanted)
        active = None if active is None else to_device(active, targets.device)
        loss, logps, entropy, gradients = runs.policy_loss(work, objective, active)
    logps, entropy = (scattered(values, rows, targets.numel(), math.nan) for values in (logps, entropy))
    return loss, logps, entropy, gradients, rows


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        objective: Objective,
        call: Call,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        operands = (hidden, weight, bias)
        loss, logps, entropy, gradients, rows = run_policy_loss(operands, targets, objective, call, wanted)
        later = gradients.weight if isinstance(gradients.weight, SparseProduct) else ()
        d_weight = None if later else gradients.weight
        ctx.save_for_backward(gradients.hidden, d_weight, gradients.bias, rows, *later)
        ctx.dtypes = [None if t is None else t.dtype for t in operands]
        ctx.num_rows, ctx.implementation = hidden.shape[0], call.implementation
        ctx.mark_non_differentiable(logps, entropy)
        return loss, logps, entropy

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        d_hidden, d_weight, d_bias, rows, *later = ctx.saved_tensors
        d_weight = SparseProduct(*later) if later else d_weight
        # Rounded here and only once: before the upstream scale (1/3 of an accumulation, 65536 of a loss scaler) an fp16
        # gradient divided by many tokens would already have vanished.
        saved = (d_hidden, d_weight, d_bias)
        found = [scaled(g, d_loss, t, ctx.implementation) for g, t in zip(saved, ctx.dtypes, strict=True)]
        if found[0] is not None:
            found[0] = scattered(found[0], rows, ctx.num_rows, 0.0)
        if torch._C._autograd._get_current_graph_task_keep_graph():  # what is kept is not the caller's to write on
            found = [g.clone() if g is not None and g is kept else g for g, kept in zip(found, saved, strict=True)]
        d_hidden, d_weight, d_bias = found
        return d_hidden, d_weight, d_bias, None, None, None, None


def logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) log-probabilities of the targets, entropies and log-sum-exps, all differentiable; zero without a target."""
    return _LogProbs.apply(hidden, weight, bias, targets, call)


def run_statistics(
    operands: tuple[Tensor, Tensor, Tensor | None], targets: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of ``logprobs``."""
    with _as_written(targets):
        work, rows = _pass(operands, targets, None, call, (False, False, False))
        found = runs.statistics(work)
    logps, entropy, logsumexp = (scattered(values, rows, targets.numel(), 0.0) for values in found)
    return logps, entropy, logsumexp


def run_gradients(
    operands: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    call: Call,
    wanted: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward of ``logprobs``, each gradient in the dtype and shape of its operand."""
    with _as_written(targets):
        work, rows = _pass(operands, targets, None, call, wanted)
        found = runs.gradients(work, [d if d is None or rows is None else d.index_select(0, rows) for d in upstream])
    one = torch.ones((), device=targets.device)
    dtypes = [None if t is None else t.dtype for t in operands]
    d_hidden, d_weight, d_bias = (scaled(g, one, t, call.implementation) for g, t in zip(found, dtypes, strict=True))
    return None if d_hidden is None else scattered(d_hidden, rows, targets.numel(), 0.0), d_weight, d_bias


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return run_statistics((hidden, weight, bias), targets, call)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        hidden, weight, bias, targets = ctx.saved_tensors
        found = run_gradients((hidden, weight, bias), targets, ctx.call, ctx.needs_input_grad[:3], upstream)
        return *found, None, None


def _as_written(tensor: Tensor) -> torch.autocast:
    """Autocast off: the pass chooses its own dtypes."""
    return torch.autocast(tensor.device.type, enabled=False)


def _pass(
    operands: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    active: Tensor | None,
    call: Call,
    wanted: Sequence[bool],
) -> tuple[Pass, Tensor | None]:
    """A run over the rows to visit, and which these are. ``active``: as ``active_rows`` has it."""
    # Operands as autocast has them, and only they: gradients are those of the originals, in their dtype.
    hidden, weight, bias = operands
    if call.autocast is not None:
        hidden, weight = hidden.to(call.autocast), weight.to(call.autocast)
    rows = rows_to_visit(targets, active, call)
    numbers = torch.arange(targets.numel(), device=targets.device) if rows is None else rows
    if rows is not None:
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
    return Pass(hidden, weight, bias, targets, numbers, call, wanted), rows


def rows_to_visit(targets: Tensor, mask: Tensor | None, call: Call) -> Tensor | None:
    """(M,) int64 indices of the rows that have a target and, where the objective says so (``active_rows``), a weight;
    None is all.
    """
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(
            f"objective covers {tuple(mask.shape)} rows but targets has {tuple(targets.shape)}; "
            "build it with one entry a row"
        )
    if targets.device.type != "cpu":
        # Looking for rows there waits for it. Where nothing is to be dropped for its weight, or weights are known on
        # the host, nobody looks: rows without a target are masked instead.
        if not call.drop_rows:
            return None
        if mask is not None and mask.device.type == "cpu":
            rows = mask.nonzero().squeeze(1)
            return None if rows.numel() == targets.numel() else to_device(rows, targets.device)
        check_not_captured(
            targets.device, "the host reads how many rows have a weight; with all_logps=True it does not"
        )
    keep = targets != IGNORE_INDEX
    if mask is not None and call.drop_rows:
        keep = keep & mask
    rows = keep.nonzero().squeeze(1)
    return None if rows.numel() == targets.numel() else rows


def objective_on_device(objective: Any, device: torch.device) -> Any:
    """``objective`` with its vectors on ``device``, if it is a dataclass and they are on the host: a copy then, and so
    with the objectives that it holds. What has other than one dimension stays where it is.

    Raises:
        ValueError: a vector is on a third device.
    """
    if not dataclasses.is_dataclass(objective) or isinstance(objective, type):
        return objective
    moved: dict[str, object] = {}
    names = [field.name for field in dataclasses.fields(objective) if hasattr(objective, field.name)]
    held = {name: getattr(objective, name) for name in names}
    for name, value in held.items():
        if isinstance(value, Tensor) and value.ndim == 1 and value.device != device:
            if value.device.type != "cpu":
                raise ValueError(
                    f"{type(objective).__name__}.{name} is on {value.device}, targets is on {device}; move them "
                    "together, or leave what the objective has on the CPU"
                )
            moved[name] = to_device(value, device)
        elif callable(value) and (inner := objective_on_device(value, device)) is not value:
            moved[name] = inner
    if not moved:
        return objective
    made = object.__new__(type(objective))  # and not by its constructor, which has run
    for name, value in (held | getattr(objective, "__dict__", {}) | moved).items():
        object.__setattr__(made, name, value)
    return made


def _refuse_second_derivatives() -> None:
    # `once_differentiable` speaks up only where the upstream gradient requires one itself: that of a loss never does.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused loss has no second derivative (create_graph=True); use implementation='reference'"
        )


def scattered(values: Tensor, rows: Tensor | None, num_rows: int, fill: float) -> Tensor:
    """(N, ...) with ``values`` in the visited rows and ``fill`` in the others."""
    if rows is None:
        return values
    return values.new_full((num_rows, *values.shape[1:]), fill).index_copy_(0, rows, values)


def scaled(
    gradient: Tensor | SparseProduct | None, scale: Tensor, dtype: torch.dtype | None, implementation: str
) -> Tensor | None:
    """``gradient * scale`` in ``dtype``, with no buffer beyond the result. ``implementation``: of the row kernels."""
    if gradient is None or dtype is None:
        return None
    if isinstance(gradient, SparseProduct):
        from aapo_fast.ops.linear_policy import sparse_triton

        return sparse_triton.made(gradient, scale, dtype)
    # The usual scale is one; looking costs nothing on the CPU, and would stall a GPU.
    unscaled = scale.device.type == "cpu" and scale.item() == 1.0
    if unscaled and gradient.dtype == dtype:
        return gradient
    if implementation == "triton" and gradient.is_cuda and gradient.is_contiguous():
        from aapo_fast.ops.linear_policy import kernels_triton

        return kernels_triton.scaled(gradient, scale, dtype)
    out = new_gradient(gradient.shape, dtype, gradient.device)
    return out.copy_(gradient) if unscaled else torch.mul(gradient, scale, out=out)


def grads_wanted(*operands: Tensor | None) -> list[bool]:
    """Which operands need a gradient; within an autograd function's forward this can no longer be seen."""
    return [t is not None and t.requires_grad and torch.is_grad_enabled() for t in operands]
