"""The pass: rows in chunks, each chunk visited once, gradients computed in the forward.

Reading order: how many rows a chunk has; ``policy_loss`` (three products, token-local objectives); ``logprobs`` (four
products, any upstream gradient).

Letters: N rows, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aapo_fast.objectives import Objective, Tokens
from aapo_fast.ops.linear_policy import products, rows_torch
from aapo_fast.ops.linear_policy.logits import LogitTransform, compute_dtype

CHUNK_BYTES = 128 * 2**20
"""Size of one (C, V) buffer. Two of them are alive at a time (three with soft-cap)."""


def chunk_rows(num_rows: int, vocab_size: int, itemsize: int) -> int:
    """Rows a chunk: as many as fit ``CHUNK_BYTES``, evened out so that the last chunk is not a sliver."""
    most = max(1, CHUNK_BYTES // (vocab_size * itemsize))
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // num_chunks))


class _Pass:
    """Operands, buffers and gradient accumulators of one run over the rows."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]) -> None:
        self.hidden, self.weight = hidden, weight
        self.dtype = compute_dtype(hidden, weight, bias)
        self.road = products.choose_road(hidden, weight, self.dtype)
        # -inf rules a token out. A large finite number does the same without the NaN of 0 * inf in the entropy.
        self.bias = None if bias is None else bias.to(self.dtype).clamp(min=-1e30)
        n, v = hidden.shape[0], weight.shape[0]
        self.rows = chunk_rows(n, v, self.dtype.itemsize)
        self.buffer = torch.empty(self.rows, v, dtype=self.dtype, device=hidden.device)
        self.scratch = torch.empty_like(self.buffer)
        want_hidden, want_weight, want_bias = wanted
        self.d_hidden = self.buffer.new_empty(hidden.shape) if want_hidden else None
        self.d_weight = self.buffer.new_zeros(weight.shape) if want_weight else None
        self.d_bias = self.buffer.new_zeros(v) if want_bias else None

    def chunks(self) -> Iterator[slice]:
        n = self.hidden.shape[0]
        for start in range(0, n, self.rows):
            yield slice(start, min(start + self.rows, n))

    def statistics(self, chunk: slice, targets: Tensor, transform: LogitTransform) -> rows_torch.RowStatistics:
        count = chunk.stop - chunk.start
        out = products.head_products(self.hidden[chunk], self.weight, self.buffer[:count], self.road)
        if self.bias is not None:
            out.add_(self.bias)
        return rows_torch.statistics(out, targets[chunk], transform, self.scratch[:count])

    def add_gradient(self, chunk: slice, d: Tensor) -> None:
        """Spend the gradient rows ``d`` (C, V) of one chunk on the accumulators."""
        if self.d_hidden is not None:
            products.hidden_gradient(d, self.weight, self.d_hidden[chunk], self.road)
        if self.d_weight is not None:
            products.add_weight_gradient(d, self.hidden[chunk], self.d_weight, self.road)
        if self.d_bias is not None:
            self.d_bias += d.sum(0)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """With respect to hidden, weight and bias, in the compute dtype."""
        return self.d_hidden, self.d_weight, self.d_bias


def _wanted(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    if not torch.is_grad_enabled():
        return False, False, False
    return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad


# --- token-local objectives: loss and gradients in one visit ---------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """What ``_PolicyLoss`` is asked to do, beside its differentiable operands."""

    targets: Tensor
    rows: Tensor
    objective: Objective
    transform: LogitTransform
    wanted: tuple[bool, bool, bool]


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    objective: Objective,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss with gradient, (N,) log-probabilities and (N,) entropies without."""
    call = _Call(targets, rows, objective, transform, _wanted(hidden, weight, bias))
    return _PolicyLoss.apply(hidden, weight, bias, call)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        work = _Pass(hidden, weight, bias, call.wanted)
        loss = torch.zeros((), dtype=work.dtype, device=hidden.device)
        logps = torch.empty(hidden.shape[0], dtype=work.dtype, device=hidden.device)
        entropy = torch.empty_like(logps)
        for chunk in work.chunks():
            stats = work.statistics(chunk, call.targets, call.transform)
            logps[chunk], entropy[chunk] = stats.logps, stats.entropy
            chunk_loss, d_logps, d_entropy = _differentiate(call.objective, stats, call.rows[chunk])
            loss += chunk_loss
            if any(call.wanted):
                d = rows_torch.gradient(stats, call.targets[chunk], d_logps, d_entropy, call.transform)
                work.add_gradient(chunk, d)
        ctx.save_for_backward(*work.gradients())
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.mark_non_differentiable(logps, entropy)
        return loss, logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        # Rounded here and only once: before the upstream scale (1/3 of an accumulation, 65536 of a loss scaler) an fp16
        # gradient divided by many tokens would already have vanished.
        return (*(_scaled(g, d_loss, dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)), None)


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``gradient * scale`` in ``dtype``, with no buffer beyond the result."""
    if gradient is None:
        return None
    # The usual scale is one; looking costs nothing on the CPU, and would stall a GPU.
    if gradient.dtype == dtype and scale.device.type == "cpu" and scale.item() == 1.0:
        return gradient
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _differentiate(
    objective: Objective, stats: rows_torch.RowStatistics, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum of the token losses, and its derivatives with respect to log-probabilities and entropies, on vectors."""
    with torch.enable_grad():
        logps = stats.logps.detach().requires_grad_()
        entropy = stats.entropy.detach().requires_grad_()
        losses = objective(Tokens(logps, entropy, rows))
        if not isinstance(losses, Tensor) or losses.shape != logps.shape:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"objective returned {got}; it must return one loss a row, {tuple(logps.shape)}")
        loss = losses.sum()
    if not loss.requires_grad:
        return loss, torch.zeros_like(stats.logps), None
    d_logps, d_entropy = torch.autograd.grad(loss, (logps, entropy), allow_unused=True)
    return loss.detach(), torch.zeros_like(stats.logps) if d_logps is None else d_logps, d_entropy


# --- any upstream gradient: log-probabilities out, logits recomputed in the backward ---------------------------------


def logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """(N,) log-probabilities of the targets and (N,) entropies, both differentiable."""
    return _LogProbs.apply(hidden, weight, bias, targets, transform)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
    ) -> tuple[Tensor, Tensor]:
        work = _Pass(hidden, weight, bias, (False, False, False))
        logps = torch.empty(hidden.shape[0], dtype=work.dtype, device=hidden.device)
        entropy = torch.empty_like(logps)
        for chunk in work.chunks():
            stats = work.statistics(chunk, targets, transform)
            logps[chunk], entropy[chunk] = stats.logps, stats.entropy
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.transform = transform
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logps: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        work = _Pass(hidden, weight, bias, ctx.needs_input_grad[:3])
        for chunk in work.chunks():
            stats = work.statistics(chunk, targets, ctx.transform)
            d = rows_torch.gradient(stats, targets[chunk], d_logps[chunk], d_entropy[chunk], ctx.transform)
            work.add_gradient(chunk, d)
        gradients = zip(work.gradients(), (hidden, weight, bias), strict=True)
        return (*(None if g is None else g.to(t.dtype) for g, t in gradients), None, None)
