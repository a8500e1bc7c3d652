"""Native rows whose coefficients are known beforehand: a panel in one call, beside the same by blocks."""

import math

import pytest
import torch
from native_support import block

from aapo_fast.ops import native
from aapo_fast.ops.linear_policy import rows_native
from aapo_fast.ops.linear_policy.rows_native import NativeRows
from aapo_fast.ops.linear_policy.statistics import Coefficients, Entries, Transform, finish

if native.why_not() is not None:
    pytest.skip(native.describe(), allow_module_level=True)


def by_blocks(products, targets, weights, index, transform, threshold, uniforms, block_rows):
    """As ``NativeRows.sparse_sweeps``, by the methods that take a block at a time."""
    kernels, parts, full = NativeRows(products, sparse=True), [], []
    entries = [Entries(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32), torch.empty(0))]
    kernels._tiles = torch.empty(block_rows, kernels._tiles.shape[1])
    for first in range(0, len(products), block_rows):
        rows = slice(first, min(first + block_rows, len(products)))
        x, t, how = products[rows], targets[rows], transform.of(rows)
        parts.append(kernels.statistics(x, t, how))
        wanted = Coefficients(weights[index[rows]].where(t >= 0, 0.0))
        given = (x, t, finish(parts[-1]), wanted, how)
        found = kernels.sparse_gradient(*given, threshold, uniforms[rows])()
        if found is None:
            full.append(rows)
            kernels.gradient(*given, x)
        else:
            entries.append(Entries(found.row + first, *found[1:]))
    partials = [torch.cat(columns) for columns in zip(*parts, strict=True)]
    return partials, Entries(*(torch.cat(columns) for columns in zip(*entries, strict=True))), full


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block_rows", [1, 4, 9, 23, 40])
@pytest.mark.parametrize("kind", ["plain", "capped", "one temperature a row"])
def test_all_blocks_in_one_launch(level, kind, block_rows, threads, monkeypatch):
    """The bits that blocks have one by one; flat blocks dense; one row is poisoned, one has no weight."""
    monkeypatch.setattr(rows_native, "DENSE_SHARE", 0.14)
    products, targets = block(2100, rows=23, offset=1, padding=3)
    products[3:9] *= 0.1  # flat rows, together and apart
    products[15] *= 0.1
    products[20, 77] = math.nan
    targets[11] = -1
    temperatures = torch.linspace(0.6, 1.4, 23)
    transform = {"plain": Transform(0.9), "capped": Transform(0.9, 30.0, 1.1)}.get(kind, Transform(temperatures))
    weights, index = torch.tensor([1.0, -0.5, 0.8, 0.0]), torch.arange(23) % 3
    index[13] = 3
    given = (targets, weights, index, transform, 2**-9, torch.linspace(0, 0.99, 23))
    one_by_one, before = products.clone(), torch.get_num_threads()
    partials, entries, full = by_blocks(one_by_one, *given, min(block_rows, 23))
    kernels = NativeRows(products, sparse=True)
    kernels.block_rows = block_rows
    kernels._tiles = torch.full((block_rows, kernels._tiles.shape[1]), math.nan)
    try:
        torch.set_num_threads(threads)
        ours, found, dense_blocks = kernels.sparse_sweeps(products, *given)
    finally:
        torch.set_num_threads(before)
    # Found row by row, by the first of four, at the end of nine, and not at all.
    assert dense_blocks == full and len(full) == {1: 7, 4: 2, 9: 1}.get(block_rows, 0)
    for a, b in zip([*ours, *found], [*partials, *entries], strict=True):
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
    for rows in full:
        assert torch.equal(products[rows].nan_to_num(nan=7.0), one_by_one[rows].nan_to_num(nan=7.0))
