"""Which blocks are looked at for sparse rows: all, until one is too full, and then ever fewer."""

from __future__ import annotations

LONGEST_PAUSE = 63
"""Blocks that are dense without a look, after several looks in vain: each time twice as many, up to so many."""


class Tries:
    """Neighbours are alike, and counting in vain costs time. The choice looks at no uniform, so it biases nothing.

    Args:
        pause: blocks that are dense without a look after the first that is too full.

    Attributes:
        came_out_sparse: whether the last block that was looked at did.
    """

    def __init__(self, pause: int) -> None:
        self.came_out_sparse = False
        self._first_pause, self._pause, self._blocks_to_pass_over = pause, 0, 0

    def due(self) -> bool:
        """Whether the next block is looked at."""
        return self._blocks_to_pass_over == 0

    def passed_over(self) -> None:
        """A block was made dense without a look."""
        self._blocks_to_pass_over = max(0, self._blocks_to_pass_over - 1)

    def looked(self, sparse: bool) -> None:
        """How a block turned out that was looked at."""
        self.came_out_sparse = sparse
        if sparse:
            self._pause = self._blocks_to_pass_over = 0
        elif self._blocks_to_pass_over == 0:  # and not the neighbour, which was looked at before this was known
            longer = min(2 * self._pause + 1, LONGEST_PAUSE)
            self._pause = longer if self._pause else self._first_pause
            self._blocks_to_pass_over = self._pause
