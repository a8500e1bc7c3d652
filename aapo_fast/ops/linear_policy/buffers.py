"""Where a pass has its logits and its dense gradient rows.

In two layouts. DENSE: one panel of logits; where gradient rows are narrower, those of a whole chunk beside it, for each
chunk reads and writes all of dW and should be large; otherwise in place. SPARSE: two panels, each a chunk of its own,
because a panel's entries are counted while the products of the next are computed; there is no room beside them, and the
gradient rows of a panel that is too full go to the front of its own rows.

Letters: C rows of a panel or chunk, V vocabulary of this shard.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from aapo_fast.ops.linear_policy.memory import aligned, padded_columns
from aapo_fast.ops.linear_policy.sizes import buffer_rows, sparse_panel_rows


class Layout(Enum):
    DENSE = "dense"
    SPARSE = "sparse"


class Buffers:
    """Panels of logits, and the place of gradient rows, of a pass.

    Args:
        num_rows: of the pass.
        vocab: V.
        columns: of the largest shard: sizes are of what all ranks have agreed on, for ranks whose panels differ would
            wait for each other for ever.
        dtype, narrow: of logits, and of gradient rows.
        device: of all of them.
        budget: bytes of all of them, on a GPU; 0 on a CPU.
        layout: the first one.
        both: whether the other layout may follow, in the same memory.

    Attributes:
        layout: the one in use.
        chunk_rows, panel_rows: at most so many rows.
        num_panels: whose logits there are at a time.
    """

    def __init__(
        self,
        num_rows: int,
        vocab: int,
        columns: int,
        dtype: torch.dtype,
        narrow: torch.dtype,
        device: torch.device,
        budget: int,
        layout: Layout,
        both: bool,
    ) -> None:
        self._vocab, self._dtype, self._narrow, self._device = vocab, dtype, narrow, device
        chunk, panel = buffer_rows(num_rows, columns, dtype, narrow, budget)
        rows_after = num_rows if layout is Layout.SPARSE else max(1, num_rows - panel)
        in_flight = sparse_panel_rows(rows_after, columns, dtype, budget)
        self._sizes = {Layout.DENSE: (chunk, panel, 1), Layout.SPARSE: (in_flight, in_flight, 2)}
        size = max(self._bytes_of(kind) for kind in Layout)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device) if both else None
        self.lay_out(layout)

    def lay_out(self, layout: Layout) -> None:
        """What was there is lost."""
        self.layout = layout
        self.chunk_rows, self.panel_rows, self.num_panels = self._sizes[layout]
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
        if self._is_apart(self.layout):
            if self._gradient_rows is None:  # made when it is needed
                self._gradient_rows = self._piece(self.chunk_rows, self._narrow)
            return self._gradient_rows[rows.start - first_row : rows.stop - first_row]
        logits = self.held(rows)
        return logits if self._narrow == self._dtype else logits.view(self._narrow)[:, : self._vocab]

    def release(self) -> None:
        """The memory is for others, if nobody else has a part of it."""
        self._memory, self._gradient_rows, self._panels = None, None, []

    def _is_apart(self, layout: Layout) -> bool:
        """Whether gradient rows have a place of their own."""
        return layout is Layout.DENSE and self._narrow != self._dtype

    def _bytes_of(self, layout: Layout) -> int:
        chunk, panel, num_panels = self._sizes[layout]
        beside = self._bytes(chunk, self._narrow) if self._is_apart(layout) else 0
        return num_panels * self._bytes(panel, self._dtype) + beside

    def _bytes(self, rows: int, dtype: torch.dtype) -> int:
        return rows * padded_columns(self._vocab, dtype, self._device) * dtype.itemsize

    def _piece(self, rows: int, dtype: torch.dtype) -> Tensor:
        """(rows, V), uninitialised, as ``aligned`` has it."""
        if self._memory is None:
            return aligned(rows, self._vocab, dtype, self._device)
        size = self._bytes(rows, dtype)
        piece = self._memory[self._taken : self._taken + size].view(dtype).view(rows, -1)[:, : self._vocab]
        self._taken += size
        return piece
