"""The pass: rows in chunks, each chunk visited once, gradients computed in the forward.

A chunk is what one matrix product takes; within it, a block is what the row kernels sweep while it is in cache.

Reading order: sizes; ``_Pass``, the operands, buffers and accumulators of a run over the rows; ``policy_loss`` (token-
local objectives, one visit); ``logprobs`` (any upstream gradient, logits recomputed in the backward).

Letters: N rows, C rows of a chunk or block, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aapo_fast.objectives import Objective, Tokens
from aapo_fast.ops.linear_policy import products, rows_torch, sparse
from aapo_fast.ops.linear_policy.logits import LogitTransform, compute_dtype
from aapo_fast.ops.linear_policy.rows_torch import Coefficients, RowStatistics
from aapo_fast.ops.linear_policy.uniforms import row_uniforms

CHUNK_ROWS = 512
CHUNK_BYTES = 384 * 2**20
"""A chunk has at most so many rows and its (C, V) buffer so many bytes. With fewer rows the products are slower (dW is
read and written once a chunk), with more they are no faster: docs/LOG.md. Measured on a CPU only."""

BLOCK_BYTES = 8 * 2**20
"""Size of a block on the CPU: two of them should fit the cache. On a GPU a block is the whole chunk."""

FLUSH_ENTRIES = 4 * 2**20
"""Sparse entries that are gathered before they are spent on the accumulators."""


@dataclass(frozen=True)
class Backward:
    """How gradient rows are kept: exactly (``threshold`` None), or sparsely with that eps and a sample by ``seed``."""

    threshold: float | None = None
    seed: int = 0


def even_parts(num_rows: int, most: int) -> int:
    """Rows a part: at most ``most``, evened out so that the last part is not a sliver."""
    num_parts = max(1, -(-num_rows // max(1, most)))
    return max(1, -(-num_rows // num_parts))


class _Pass:
    """Operands, buffers and gradient accumulators of one run over the rows."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        wanted: tuple[bool, bool, bool],
        backward: Backward,
    ) -> None:
        self.hidden, self.weight, self.transform, self.backward = hidden, weight, transform, backward
        self.dtype = compute_dtype(hidden, weight, bias)
        self.road = products.choose_road(hidden, weight, self.dtype)
        # -inf rules a token out. A large finite number does the same without the NaN of 0 * inf in the entropy.
        self.bias = None if bias is None else bias.to(self.dtype).clamp(min=-1e30)
        n, v = hidden.shape[0], weight.shape[0]
        row_bytes = v * self.dtype.itemsize
        self.chunk_rows = even_parts(n, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes))
        self.block_rows = self.chunk_rows if hidden.is_cuda else even_parts(self.chunk_rows, BLOCK_BYTES // row_bytes)
        self.buffer = torch.empty(self.chunk_rows, v, dtype=self.dtype, device=hidden.device)
        # Zeros beyond V stay zeros: the padding of the sparse sample's last tile.
        self.scratch = self.buffer.new_zeros(self.block_rows, sparse.padded_width(v))
        want_hidden, want_weight, want_bias = wanted
        self.d_hidden = self.buffer.new_zeros(hidden.shape) if want_hidden else None
        self.d_weight = self.buffer.new_zeros(weight.shape) if want_weight else None
        self.d_bias = self.buffer.new_zeros(v) if want_bias else None
        self._entries: list[sparse.Entries] = []

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of each chunk, and their raw head products (C, V)."""
        for start in range(0, self.hidden.shape[0], self.chunk_rows):
            rows = slice(start, min(start + self.chunk_rows, self.hidden.shape[0]))
            out = self.buffer[: rows.stop - rows.start]
            products.head_products(self.hidden[rows], self.weight, out, self.road)
            yield rows, out if self.bias is None else out.add_(self.bias)

    def blocks(self, rows: slice, chunk: Tensor, targets: Tensor) -> Iterator[tuple[slice, RowStatistics]]:
        """Rows of each block of a chunk, and their statistics. A block's buffers serve the next one too."""
        for start in range(0, chunk.shape[0], self.block_rows):
            block = chunk[start : start + self.block_rows]
            here = slice(rows.start + start, rows.start + start + block.shape[0])
            scratch = self.scratch[: block.shape[0], : block.shape[1]]
            yield here, rows_torch.statistics(block, targets[here], self.transform, scratch)

    def wants_gradient(self) -> bool:
        return self.d_hidden is not None or self.d_weight is not None or self.d_bias is not None

    def spend_block(
        self, here: slice, stats: RowStatistics, targets: Tensor, numbers: Tensor, wanted: Coefficients
    ) -> bool:
        """Turn a block into gradient rows: sparse ones are kept for ``flush``, dense ones left in its buffer.

        Args:
            here: rows of the block.
            targets: (N,).
            numbers: (N,) row numbers, which the uniforms of the sparse sample belong to.

        Returns:
            Whether the gradient rows are dense.
        """
        if self.backward.threshold is not None:
            count = here.stop - here.start
            uniforms = row_uniforms(self.backward.seed, numbers[here])
            sample = sparse.sample_rows(self.scratch[:count], stats.total, self.backward.threshold, uniforms)
            if sample is not None:
                entries = sparse.gradient_entries(sample, stats, targets[here], wanted, self.transform)
                self._entries.append(entries._replace(row=entries.row + here.start))
                return False
        rows_torch.dense_gradient(stats, targets[here], wanted, self.transform)
        return True

    def spend_dense(self, rows: slice, chunk: Tensor, dense_blocks: list[slice]) -> None:
        """Spend the dense gradient rows of a chunk on the accumulators."""
        for part in _joined(dense_blocks):
            d = chunk[part.start - rows.start : part.stop - rows.start]
            if self.d_hidden is not None:
                products.hidden_gradient(d, self.weight, self.d_hidden[part], self.road)
            if self.d_weight is not None:
                products.add_weight_gradient(d, self.hidden[part], self.d_weight, self.road)
            if self.d_bias is not None:
                self.d_bias += d.sum(0)
        if sum(entries.value.numel() for entries in self._entries) > FLUSH_ENTRIES:
            self.flush()

    def flush(self) -> None:
        """Spend the sparse gradient rows gathered so far."""
        if not self._entries:
            return
        entries = sparse.Entries(*(torch.cat(parts) for parts in zip(*self._entries, strict=True)))
        self._entries = []
        if self.d_hidden is not None:
            self.d_hidden += sparse.times_weight(entries, self.hidden.shape[0], self.weight.to(self.dtype))
        if self.d_weight is not None:
            sparse.add_transposed_times(entries, self.hidden.to(self.dtype), self.d_weight)
        if self.d_bias is not None:
            self.d_bias.index_add_(0, entries.column, entries.value)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """With respect to hidden, weight and bias, in the compute dtype."""
        self.flush()
        return self.d_hidden, self.d_weight, self.d_bias


def _joined(blocks: list[slice]) -> Iterator[slice]:
    """Neighbouring slices as one."""
    current: slice | None = None
    for block in blocks:
        if current is not None and current.stop == block.start:
            current = slice(current.start, block.stop)
            continue
        if current is not None:
            yield current
        current = block
    if current is not None:
        yield current


# --- token-local objectives: loss and gradients in one visit ---------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """What ``_PolicyLoss`` is asked to do, beside its differentiable operands."""

    targets: Tensor
    rows: Tensor
    objective: Objective
    transform: LogitTransform
    backward: Backward
    wanted: tuple[bool, bool, bool]


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    objective: Objective,
    transform: LogitTransform,
    backward: Backward,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss with gradient, (N,) log-probabilities and (N,) entropies without."""
    wanted = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled():
        wanted = (False, False, False)
    return _PolicyLoss.apply(hidden, weight, bias, _Call(targets, rows, objective, transform, backward, wanted))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        work = _Pass(hidden, weight, bias, call.transform, call.wanted, call.backward)
        loss = torch.zeros((), dtype=work.dtype, device=hidden.device)
        logps = torch.empty(hidden.shape[0], dtype=work.dtype, device=hidden.device)
        entropy = torch.empty_like(logps)
        for rows, chunk in work.chunks():
            dense_blocks = []
            for here, stats in work.blocks(rows, chunk, call.targets):
                logps[here], entropy[here] = stats.logps, stats.entropy
                block_loss, wanted = _differentiate(call.objective, stats, call.rows[here])
                loss += block_loss
                if work.wants_gradient() and work.spend_block(here, stats, call.targets, call.rows, wanted):
                    dense_blocks.append(here)
            work.spend_dense(rows, chunk, dense_blocks)
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


def _differentiate(objective: Objective, stats: RowStatistics, rows: Tensor) -> tuple[Tensor, Coefficients]:
    """Sum of the token losses, and its derivatives with respect to log-probabilities and entropies, on vectors."""
    with torch.enable_grad():
        logps = stats.logps.detach().requires_grad_()
        entropy = stats.entropy.detach().requires_grad_()
        losses = objective(Tokens(logps, entropy, rows))
        if not isinstance(losses, Tensor) or losses.shape != logps.shape:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"objective returned {got}; it must return one loss a row, {tuple(logps.shape)}")
        loss = losses.sum()
    d_logps, d_entropy = None, None
    if loss.requires_grad:
        d_logps, d_entropy = torch.autograd.grad(loss, (logps, entropy), allow_unused=True)
    return loss.detach(), Coefficients(torch.zeros_like(stats.logps) if d_logps is None else d_logps, d_entropy)


# --- any upstream gradient: log-probabilities out, logits recomputed in the backward ---------------------------------


def logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    transform: LogitTransform,
    backward: Backward,
) -> tuple[Tensor, Tensor]:
    """(N,) log-probabilities of the targets and (N,) entropies, both differentiable."""
    return _LogProbs.apply(hidden, weight, bias, targets, rows, transform, backward)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        transform: LogitTransform,
        backward: Backward,
    ) -> tuple[Tensor, Tensor]:
        work = _Pass(hidden, weight, bias, transform, (False, False, False), backward)
        logps = torch.empty(hidden.shape[0], dtype=work.dtype, device=hidden.device)
        entropy = torch.empty_like(logps)
        for chunk_rows, chunk in work.chunks():
            for here, stats in work.blocks(chunk_rows, chunk, targets):
                logps[here], entropy[here] = stats.logps, stats.entropy
        ctx.save_for_backward(hidden, weight, bias, targets, rows)
        ctx.transform, ctx.how = transform, backward
        ctx.set_materialize_grads(False)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, numbers = ctx.saved_tensors
        work = _Pass(hidden, weight, bias, ctx.transform, ctx.needs_input_grad[:3], ctx.how)
        if d_logps is None:
            d_logps = torch.zeros(targets.shape, dtype=work.dtype, device=targets.device)
        for rows, chunk in work.chunks():
            dense_blocks = []
            for here, stats in work.blocks(rows, chunk, targets):
                wanted = Coefficients(d_logps[here], None if d_entropy is None else d_entropy[here])
                if work.spend_block(here, stats, targets, numbers, wanted):
                    dense_blocks.append(here)
            work.spend_dense(rows, chunk, dense_blocks)
        gradients = zip(work.gradients(), (hidden, weight, bias), strict=True)
        return (*(None if g is None else g.to(t.dtype) for g, t in gradients), None, None, None, None)
