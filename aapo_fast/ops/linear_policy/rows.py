"""The row kernels of an implementation, by its name; each is imported where it is asked for."""

from __future__ import annotations

from torch import Tensor

from aapo_fast.ops.linear_policy.rows_torch import TorchRows
from aapo_fast.ops.linear_policy.statistics import RowKernels


def row_kernels(implementation: str, logits: Tensor, sparse: bool, columns: int) -> RowKernels:
    """``logits``: the (C, V) buffer that blocks are views of; ``columns``: by which all shards cut rows into blocks."""
    if implementation == "triton":
        from aapo_fast.ops.linear_policy.rows_triton import TritonRows

        return TritonRows(logits, sparse=sparse)
    if implementation == "native":
        from aapo_fast.ops.linear_policy.rows_native import NativeRows

        return NativeRows(logits, columns)
    return TorchRows(logits, columns)
