"""Where a pass has its logits and its dense gradient rows.

In two layouts. DENSE: one panel of logits; where gradient rows are narrower, those of a whole chunk beside it, for each
chunk reads and writes all of dW and should be large; otherwise in place. SPARSE: two panels, if there is more than one
to come, each a chunk of its own, because a panel's entries are counted while the products of the next are computed;
there is no room beside them, and the gradient rows of a panel that is too full go to the front of its own rows.

Letters: C rows of a panel or chunk, H hidden, V vocabulary of this shard.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from aapo_fast.ops.linear_policy.memory import aligned, padded_columns
from aapo_fast.ops.linear_policy.sizes import buffer_rows, sparse_panel_rows


class Layout(Enum):
    DENSE = "dense"
    SPARSE = "sparse"


class Sizes(NamedTuple):
    """Of a layout: rows of a chunk and of a panel, at most; how many panels; whether gradient rows are beside them."""

    chunk_rows: int
    panel_rows: int
    num_panels: int
    beside: bool

    def num_bytes(self, logit_row: int, gradient_row: int) -> int:
        """Of everything, from the bytes of a row."""
        beside = self.chunk_rows * gradient_row if self.beside else 0
        return self.num_panels * self.panel_rows * logit_row + beside


def sizes_of(
    num_rows: int,
    vocab: int,
    hidden: int,
    dtype: torch.dtype,
    narrow: torch.dtype,
    budget: int,
    first: Layout = Layout.DENSE,
) -> dict[Layout, Sizes]:
    """Of both layouts.

    Args:
        num_rows: of the pass.
        vocab: columns; of the largest shard: sizes are of what all ranks have agreed on, for ranks whose panels differ
            would wait for each other for ever.
        hidden: H.
        dtype, narrow: of logits, and of gradient rows.
        budget: bytes of all of them, on a GPU; 0 on a CPU.
        first: the layout that the pass begins with.
    """
    chunk, panel = buffer_rows(num_rows, vocab, hidden, dtype, narrow, budget)
    rows_after = num_rows if first is Layout.SPARSE else max(1, num_rows - panel)
    in_flight = sparse_panel_rows(rows_after, vocab, dtype, budget)
    return {
        Layout.DENSE: Sizes(chunk, panel, 1, narrow != dtype),
        Layout.SPARSE: Sizes(in_flight, in_flight, 2 if in_flight < rows_after else 1, False),
    }


class Buffers:
    """Panels of logits, and the place of gradient rows, of a pass.

    Args:
        vocab: V.
        dtype, narrow: of logits, and of gradient rows.
        device: of all of them.
        sizes: of both layouts.
        layout: the first one.
        both: whether the other layout may follow, in the same memory.

    Attributes:
        layout: the one in use.
        chunk_rows, panel_rows: at most so many rows.
        num_panels: whose logits there are at a time.
    """

    def __init__(
        self,
        vocab: int,
        dtype: torch.dtype,
        narrow: torch.dtype,
        device: torch.device,
        sizes: dict[Layout, Sizes],
        layout: Layout,
        both: bool,
    ) -> None:
        self._vocab, self._dtype, self._narrow, self._device, self._sizes = vocab, dtype, narrow, device, sizes
        size = max(kind.num_bytes(self._row_bytes(dtype), self._row_bytes(narrow)) for kind in sizes.values())
        self._memory = torch.empty(size, dtype=torch.uint8, device=device) if both else None
        self.lay_out(layout)

    def lay_out(self, layout: Layout) -> None:
        """What was there is lost."""
        self.layout = layout
        self.chunk_rows, self.panel_rows, self.num_panels, self._beside = self._sizes[layout]
        self._taken = 0
        self._panels = [self._piece(self.panel_rows, self._dtype) for _ in range(self.num_panels)]
        self._rows_held = [slice(0, 0)] * self.num_panels
        self._next_panel = 0
        self._gradient_rows: Tensor | None = None

    def panel(self, rows: slice) -> Tensor:
        """(C, V) for the logits of these rows, where those of as many panels ago were as there are panels."""
        number = self._next_panel
        self._next_panel = (number + 1) % self.num_panels
        self._rows_held[number] = rows
        return self._panels[number][: rows.stop - rows.start]

    def held(self, rows: slice) -> Tensor:
        """(C, V): where the logits of these rows of one panel are."""
        number = next(i for i, held in enumerate(self._rows_held) if held.start <= rows.start < held.stop)
        start = self._rows_held[number].start
        return self._panels[number][rows.start - start : rows.stop - start]

    def gradient_rows(self, rows: slice, first_row: int) -> Tensor:
        """(C, V): where the dense gradient rows of these are, or go. ``first_row``: of the chunk."""
        if self._beside:
            if self._gradient_rows is None:  # made when it is needed
                self._gradient_rows = self._piece(self.chunk_rows, self._narrow)
            return self._gradient_rows[rows.start - first_row : rows.stop - first_row]
        logits = self.held(rows)
        return logits if self._narrow == self._dtype else logits.view(self._narrow)[:, : self._vocab]

    def release(self) -> None:
        """The memory is for others, if nobody else has a part of it."""
        self._memory, self._gradient_rows, self._panels = None, None, []

    def _row_bytes(self, dtype: torch.dtype) -> int:
        return padded_columns(self._vocab, dtype, self._device) * dtype.itemsize

    def _piece(self, rows: int, dtype: torch.dtype) -> Tensor:
        """(rows, V), uninitialised, as ``aligned`` has it."""
        if self._memory is None:
            return aligned(rows, self._vocab, dtype, self._device)
        size = rows * self._row_bytes(dtype)
        piece = self._memory[self._taken : self._taken + size].view(dtype).view(rows, -1)[:, : self._vocab]
        self._taken += size
        return piece
