"""How many rows are visited at a time: of a chunk, and of a panel of it. And which of them lie together.

Letters: N rows of the call, C rows of a chunk or panel, H hidden, V vocabulary of this shard.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator

import torch

from aapo_fast.ops.linear_policy.rows_torch import even_parts

CHUNK_ROWS = 1024
CHUNK_BYTES = 384 * 2**20
"""On the CPU a chunk has at most so many rows and its (C, V) buffer so many bytes. With fewer rows the products are
slower (dW is read and written once a chunk), with more they are hardly faster: docs/LOG.md."""

GPU_BUFFER_BYTES = 896 * 2**20
"""On a GPU: all fp32 logits and bf16 gradient rows that exist at a time. Each chunk of gradient rows reads and writes
dW once, 5 GB at (151936, 4096), so large chunks are quicker. Where the weight is larger than this, its size is what the
buffers may have: dW comes in fp32 and is handed out as a copy in the weight's dtype, and they are gone by then."""

BUFFER_VARIABLE = "AAPO_FAST_BUFFER_GIB"
"""Of the environment: another size, for who has memory to spare. Gradients differ by the order of sums alone."""

SMALLEST_BUFFER_GIB = 0.1

GPU_LOGIT_SHARE = 0.3
"""Of that, for a panel of logits beside gradient rows. Products of fewer than 512 rows are slower."""

GPU_TILE_ROWS, GPU_TILE_COLUMNS, MULTIPROCESSORS = 256, 128, 132
"""Of a result of the vendor's products on a Hopper GPU: a multiprocessor computes one such tile at a time. Panels have
whole tiles, chunks so many rows that those of dX leave few multiprocessors idle (``_chunk_rows``)."""

VISIT_WAVES = 1.1e-4
"""What one chunk more costs, for it reads and writes dW: so many times H, in waves of dX, a wave being one tile on each
multiprocessor. Of the H200's products: 0.93 ms beside 1.65 a wave at (V, H) = (151936, 4096), which is 1.4e-4, and 0.55
beside 2.9 at (248320, 2048), 0.9e-4."""


def gpu_budget(weight_bytes: int) -> int:
    """Bytes that the buffers of a pass may take on a GPU: ``GPU_BUFFER_BYTES`` or the weight's size, or what
    AAPO_FAST_BUFFER_GIB says, which has to be the same on all ranks of a vocabulary-parallel head.

    Args:
        weight_bytes: of the head's weight; of the largest shard, where its shards are unequal.

    Raises:
        ValueError: the variable holds no such number.
    """
    wish = os.environ.get(BUFFER_VARIABLE, "")
    if not wish:
        return max(GPU_BUFFER_BYTES, weight_bytes)
    try:
        gib = float(wish)
    except ValueError:
        gib = math.nan
    if not SMALLEST_BUFFER_GIB <= gib < math.inf:
        raise ValueError(f"{BUFFER_VARIABLE}={wish!r}: give a number of GiB from {SMALLEST_BUFFER_GIB} on, or unset it")
    return int(gib * 2**30)


def buffer_rows(
    num_rows: int, vocab: int, hidden: int, dtype: torch.dtype, gradient_dtype: torch.dtype, budget: int = 0
) -> tuple[int, int]:
    """Rows of a chunk and of a panel: of the buffer of gradient rows and of that of logits. They are one where gradient
    rows have the compute dtype, and so is the buffer.

    Args:
        hidden: H.
        budget: bytes of all buffers, on a GPU; 0 on a CPU.
    """
    row_bytes = vocab * dtype.itemsize
    if not budget:
        rows = even_parts(num_rows, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes))
        return rows, rows
    if gradient_dtype == dtype:
        rows = _chunk_rows(num_rows, budget // row_bytes, hidden)
        return rows, rows
    panel = _whole(int(GPU_LOGIT_SHARE * budget) // row_bytes)
    rest = budget - panel * row_bytes
    chunk = _chunk_rows(num_rows, rest // (vocab * gradient_dtype.itemsize), hidden)
    return chunk, min(panel, chunk)


def sparse_panel_rows(num_rows: int, vocab: int, dtype: torch.dtype, budget: int = 0) -> int:
    """Rows of a panel where there are two of them and nothing beside. ``budget`` as above."""
    row_bytes = vocab * dtype.itemsize
    if not budget:
        return even_parts(num_rows, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes))
    most = _whole(budget // 2 // row_bytes)
    even = -(-even_parts(num_rows, most) // GPU_TILE_ROWS) * GPU_TILE_ROWS
    return max(1, min(most, num_rows, even))


def _whole(rows: int) -> int:
    """At most ``rows``, in whole tiles where that leaves any, else in halves of them, else as they are."""
    for size in (GPU_TILE_ROWS, GPU_TILE_ROWS // 2):
        if rows >= size:
            return rows // size * size
    return max(1, rows)


@functools.lru_cache(maxsize=1024)
def _chunk_rows(num_rows: int, most: int, hidden: int) -> int:
    """At most ``most`` rows, in whole tiles: so many that the dX of all chunks and their visits to dW take least.

    A model of what was measured on an H200: at (H, V) = (4096, 151936) a row's dX takes an eighth longer in chunks of
    2,816 rows (352 tiles, 2.7 waves) than of 2,048 (1.9 waves); at (2048, 248320) it takes the same, within a
    twentieth, in chunks of 256 to 4,096 rows (0.1 to 1.9 waves), and its dW an eighth less in chunks of 1,536 than of
    1,024. What fits in one chunk is one: that writes dW and reads none.
    """

    def waves(rows: int) -> float:
        part = -(-rows // GPU_TILE_ROWS) * -(-hidden // GPU_TILE_COLUMNS) / MULTIPROCESSORS
        return part if part < 2 else math.ceil(part)  # few tiles are shared out among all multiprocessors

    def cost(rows: int) -> float:
        full, rest = divmod(num_rows, rows)
        visits = full + (rest > 0)
        # Rounded: of those that cost the same, the fewest rows.
        return round(full * waves(rows) + waves(rest) + VISIT_WAVES * hidden * visits, 6)

    if num_rows <= most:
        return max(1, num_rows)
    largest = _whole(most)
    return min((largest, *range(GPU_TILE_ROWS, largest, GPU_TILE_ROWS)), key=lambda rows: (cost(rows), rows))


def joined_slices(blocks: list[slice]) -> Iterator[slice]:
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
