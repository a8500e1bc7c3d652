"""What the row kernels have in common: how logits follow from raw products, and what is said of a row.

A row kernel sweeps a chunk of raw head products twice. Sweep 1 gives ``Partials``, which merge over the shards of a
vocabulary-parallel head and finish as ``RowStatistics``; the objective turns those into ``Coefficients``; sweep 2
turns coefficients into gradient rows. Each implementation is a ``RowKernels``.

The target stays out of both sweeps (section "The target apart" of README.md): its logit joins the statistics in
``finish``, and its entry of the gradient row is ``targets.gradient``.

Letters: C rows of a chunk or block, V vocabulary (of this shard).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, ParamSpec, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Transform:
    """Raw products x to logits: ``z = softcap tanh(scale x / softcap) / temperature``, or ``scale x / temperature``.

    Attributes:
        temperature: one for all rows, or (C,) one a row, in the compute dtype.
        softcap: None for none.
        scale: the model's own factor on its logits.
    """

    temperature: float | Tensor = 1.0
    softcap: float | None = None
    scale: float = 1.0

    def of(self, rows: slice | Tensor) -> Transform:
        """The transform of some of the rows."""
        return replace(self, temperature=self.temperature[rows]) if isinstance(self.temperature, Tensor) else self

    def column(self) -> float | Tensor:
        """The temperature, to be broadcast against (C, V)."""
        return self.temperature[:, None] if isinstance(self.temperature, Tensor) else self.temperature


class Partials(NamedTuple):
    """Sweep 1 over the columns of one shard but the target's, (C,) each, fp32 (fp64 for fp64 inputs).

    Attributes:
        row_max: max_v z_v; -1e30 or less where there is no other column.
        total: sum_v exp(z_v - row_max).
        weighted: sum_v exp(z_v - row_max) (z_v - row_max).
        target: the target's logit; -inf where this shard does not hold it.
    """

    row_max: Tensor
    total: Tensor
    weighted: Tensor
    target: Tensor


class RowStatistics(NamedTuple):
    """Of whole rows, all shards, (C,) each.

    Attributes:
        logps, entropy, logsumexp: log-probability of the target, entropy in nats, log-sum-exp of the logits.
        row_max, total: as in ``Partials``, of all columns. Sweep 2 takes p_v = exp(z_v - row_max) / total from them:
            from the log-sum-exp it would inherit that number's rounding, which at logits of 1000 is 3e-5.
        others: probability of all tokens but the target, with all its digits however small it is.
    """

    logps: Tensor
    entropy: Tensor
    logsumexp: Tensor
    row_max: Tensor
    total: Tensor
    others: Tensor

    def of(self, rows: slice) -> RowStatistics:
        """Those of some of the rows."""
        return RowStatistics(*(statistic[rows] for statistic in self))


class Coefficients(NamedTuple):
    """What the objective wants of each row: d loss / d each statistic, (C,); None where it uses none."""

    logps: Tensor
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None

    def live(self) -> Tensor:
        """(C,) bool: whether the loss wants anything of a row; NaN is something."""
        first, *others = (d != 0 for d in self if d is not None)
        return functools.reduce(torch.logical_or, others, first)

    def of(self, rows: slice) -> Coefficients:
        """Those of some of the rows."""
        others = (None if d is None else d[rows] for d in self[1:])
        return Coefficients(self.logps[rows], *others)


class Entries(NamedTuple):
    """Sparse gradient rows as (row, column, value) triples, (E,) each; equal pairs count as their sum.

    The order is the implementation's own: only the kernels that made them read them.
    """

    row: Tensor
    column: Tensor
    value: Tensor


class SparseProduct(NamedTuple):
    """A product ``S @ source`` that is still to be made: line s of S has ``value[e]`` at ``place[e]`` for e in
    [starts[s], starts[s + 1]).
    """

    starts: Tensor
    place: Tensor
    value: Tensor
    source: Tensor


class RowKernels(Protocol):
    """One implementation of the sweeps, for one run over the rows; it may keep buffers between them."""

    block_rows: int
    blocks_between_tries: int
    """After a block that was too full for sparse rows: blocks that are dense without a look."""

    def statistics(self, products: Tensor, targets: Tensor, transform: Transform, sparse: bool = True) -> Partials:
        """Sweep 1 over (C, V) raw products, which it may overwrite. A target of -1 is in no column of this shard.

        One sweep of a block: what it leaves in ``products`` is for the methods below. ``sparse``: whether what gives
        sparse rows may follow.
        """

    def finish(self, partials: Partials) -> RowStatistics:
        """``finish`` of this module."""

    def gradient(self, products: Tensor, targets: Tensor, rows: RowStatistics, wanted: Coefficients,
                 transform: Transform, out: Tensor) -> None:  # fmt: skip
        """Sweep 2: (C, V) d loss / d products into ``out``. Of the block that ``statistics`` saw last, of any rows of
        the panel that was sampled last (``SparsePanels``), or, for kernels whose blocks wait for their entries
        (Triton's), of any whose products are still there.

        Zero at the target, whose entry is ``targets.gradient``. ``out`` is ``products`` itself, or narrower: the
        front of its rows, or a buffer.
        """

    def uniforms(self, seed: int, rows: Tensor) -> Tensor:
        """(C,) of the sample: ``uniforms.row_uniforms``, to the bit."""

    def add_times_weight(self, entries: Entries, weight: Tensor, out: Tensor) -> None:
        """``out += S @ weight``: (C, V) entries and (V, H) to (C, H)."""

    def add_transposed_times(self, entries: Entries, hidden: Tensor, out: Tensor) -> None:
        """``out += S.T @ hidden``: (C, V) entries and (C, H) to (V, H), the same bits at every run."""

    def add_targets_times_weight(self, value: Tensor, target: Tensor, weight: Tensor, out: Tensor) -> None:
        """``out[t] += value[t] * weight[target[t]]``: (M,) fp64 and (V, H) to (M, H), rounded once. -1 is no target."""

    def add_targets_transposed_times(self, value: Tensor, target: Tensor, hidden: Tensor, out: Tensor) -> None:
        """``out[target[t]] += value[t] * hidden[t]``: (M,) fp64 and (M, H) to (V, H), the same bits at every run."""


@runtime_checkable
class SparseBlocks(Protocol):
    """Row kernels that make sparse rows a block at a time, from what the loss wants of them."""

    def sparse_gradient(
        self, products: Tensor, targets: Tensor, rows: RowStatistics, wanted: Coefficients, transform: Transform,
        threshold: float, uniforms: Tensor,
    ) -> Callable[[], Entries | None]:  # fmt: skip
        """``gradient``, sparsely (section "Sparse" of README.md); None where dense rows are cheaper.

        To be called when the entries are wanted; ``products`` must be left alone until then.
        """


_Given = ParamSpec("_Given")


def at_once(entries_of: Callable[_Given, Entries | None]) -> Callable[_Given, Callable[[], Entries | None]]:
    """``sparse_gradient`` from a method that makes its entries when it is called."""

    @functools.wraps(entries_of)
    def made(*given: _Given.args, **named: _Given.kwargs) -> Callable[[], Entries | None]:
        entries = entries_of(*given, **named)
        return lambda: entries

    return made


@runtime_checkable
class OneLaunch(Protocol):
    """Row kernels that do both sweeps at once where the coefficients are known before the statistics."""

    def both_sweeps(self, products: Tensor, targets: Tensor, weights: Tensor, index: Tensor, transform: Transform,
                    out: Tensor) -> Partials:  # fmt: skip
        """Sweeps 1 and 2 with ``weights[index]`` as d loss / d logp; rows with target -1 give zeros."""


class Sampled(NamedTuple):
    """Rows whose entries are found, and not yet what the loss wants of them.

    Attributes:
        dense: blocks for which dense rows are cheaper: theirs come from ``RowKernels.gradient``.
        entries: those of the others, from the statistics and coefficients of all. To be called before the next panel is
            swept; ``products`` must be left alone until then.
    """

    dense: list[slice]
    entries: Callable[[RowStatistics, Coefficients], Entries]


@runtime_checkable
class SparsePanels(Protocol):
    """Row kernels that sample any number of blocks at once: which entries a row has its probabilities alone decide."""

    def sparse_sweeps(
        self, products: Tensor, targets: Tensor, transform: Transform, live: Tensor, threshold: float, uniforms: Tensor
    ) -> tuple[Partials, Sampled]:
        """Sweep 1 and the sample. ``live``: (C,) bool, rows of which the loss may want something."""

    def sample(
        self, products: Tensor, targets: Tensor, transform: Transform, rows: RowStatistics, live: Tensor,
        threshold: float, uniforms: Tensor,
    ) -> Sampled:  # fmt: skip
        """The sample alone, of what ``statistics`` saw last, where other ranks have had their say in ``rows``."""


@runtime_checkable
class LateProducts(Protocol):
    """Row kernels that can make dW of sparse rows in the backward: in the weight's dtype, scaled, rounded once, without
    an fp32 accumulator.
    """

    def keep_transposed(self, entries: Entries, hidden: Tensor, num_lines: int) -> SparseProduct:
        """``S.T @ hidden`` with ``num_lines`` lines."""


def merge(shards: Sequence[Partials]) -> Partials:
    """Partials of whole rows from those of the shards of the vocabulary, in their order."""
    row_max, total, weighted, target = (torch.stack(parts) for parts in zip(*shards, strict=True))
    highest = row_max.amax(0)
    gap = row_max - highest
    factor = gap.exp()
    # A shard far below the maximum has factor 0, and 0 * -1e30 must stay 0.
    lowered = weighted + torch.where(factor == 0, 0.0, gap) * total
    return Partials(highest, (factor * total).sum(0), (factor * lowered).sum(0), target.amax(0))


def finish(partials: Partials) -> RowStatistics:
    """The statistics of whole rows: the target's logit joins the sums of sweep 1.

    No large numbers cancel, and nothing small is added to a one that would lose it: where the target has nearly all
    the probability, log p = -log1p(rest) and 1 - p = rest / (1 + rest), with ``rest`` the sum over the others. In fp64,
    so that each statistic is rounded once: a log-probability of -10.8 twice would lose half as much again.
    """
    dtype = partials.row_max.dtype
    max_of_rest, rest, weighted, target = (sums.double() for sums in partials)
    row_max = torch.maximum(max_of_rest, target)
    gap, gap_of_target = max_of_rest - row_max, target - row_max
    factor, at_target = gap.exp(), gap_of_target.exp()
    rest = factor * rest
    total = rest + at_target
    log_total = torch.where(at_target == 1, rest.log1p(), total.log())
    # Far below the maximum a factor is 0, and 0 * -inf must stay 0.
    weighted = factor * weighted + gap * rest + at_target * gap_of_target.clamp(min=-1e30)
    every = RowStatistics(
        logps=gap_of_target - log_total,
        entropy=log_total - weighted / total,  # H = log-sum-exp - E[z], both less the row's maximum
        logsumexp=row_max + log_total,
        row_max=row_max,
        total=total,
        others=rest / total,
    )
    return RowStatistics(*(statistic.to(dtype) for statistic in every))


def no_rows(dtype: torch.dtype, device: torch.device) -> RowStatistics:
    """The statistics of no row."""
    return RowStatistics(*torch.zeros(6, 0, dtype=dtype, device=device))


def joined(blocks: Sequence[RowStatistics]) -> RowStatistics:
    """Those of blocks, one after the other."""
    return RowStatistics(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def joined_coefficients(blocks: Sequence[Coefficients]) -> Coefficients:
    """Those of blocks, one after the other; what a block does not use is zero there."""

    logps = [block.logps for block in blocks]

    def together(vectors: list[Tensor | None]) -> Tensor | None:
        if all(v is None for v in vectors):
            return None
        return torch.cat([torch.zeros_like(d) if v is None else v for d, v in zip(logps, vectors, strict=True)])

    entropy, logsumexp = together([b.entropy for b in blocks]), together([b.logsumexp for b in blocks])
    return Coefficients(torch.cat(logps), entropy, logsumexp)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any operand is fp64, else fp32: the dtype of statistics and of accumulated gradients."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
