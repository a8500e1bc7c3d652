"""A sharded head: vocabulary-parallel over a process group, or a DTensor (FSDP2).

Vocabulary-parallel (Megatron-LM, arXiv 1909.08053): each rank holds some rows of the head weight and all rows of the
hidden states. What a rank says of its columns is four numbers a row (``Partials``); they are gathered and merged in
the order of the ranks, so every rank goes on with the same bits.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

from aapo_fast.ops.linear_policy.statistics import Partials, merge

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class VocabularyShard:
    """This rank's part of a vocabulary-parallel head.

    Attributes:
        group: ranks that hold the parts, in the order of the vocabulary.
        start: the first token of this rank's part.
        vocab_size: tokens of all parts together.
    """

    group: ProcessGroup
    start: int
    vocab_size: int

    def __post_init__(self) -> None:
        if not (isinstance(self.start, int) and isinstance(self.vocab_size, int) and self.start >= 0):
            raise ValueError(
                f"VocabularyShard: start={self.start!r}, vocab_size={self.vocab_size!r}; "
                "give the first token of this rank's part and the tokens of all parts, as ints"
            )

    @property
    def columns(self) -> int:
        """Of a part on average. All ranks cut their rows into blocks by it: a block's statistics are gathered, and its
        rows must be the same everywhere, however unequal the parts.
        """
        return -(-self.vocab_size // dist.get_world_size(self.group))

    @classmethod
    def from_local(cls, num_rows: int, group: ProcessGroup) -> VocabularyShard:
        """The shard of a rank with ``num_rows`` rows of the weight, which may differ by rank. A collective call."""
        if not isinstance(num_rows, int):
            raise ValueError(f"VocabularyShard: num_rows is a {type(num_rows).__name__}; give weight.shape[0]")
        sizes: list[int] = [0] * dist.get_world_size(group)
        dist.all_gather_object(sizes, num_rows, group=group)
        return cls(group, sum(sizes[: dist.get_rank(group)]), sum(sizes))

    def merged(self, partials: Partials) -> Partials:
        """Partials of whole rows. Collective over the group."""
        mine = torch.stack(partials)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(every, mine, group=self.group)
        return merge([Partials(*shard) for shard in every])

    def sum_(self, gradient: Tensor) -> None:
        """Sum over the group: each rank's columns gave a part of the gradient of the hidden states."""
        dist.all_reduce(gradient, group=self.group)


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor."""
    # Importing it takes most of a second, and where nobody has there are no DTensors.
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(weight: Tensor) -> Tensor:
    """``weight`` itself, or the whole of a DTensor.

    The gradient of a DTensor is summed over its mesh, which is right for a loss that every rank divides by the number
    of tokens of all ranks.

    Raises:
        ValueError: the mesh is one of tensor parallelism, whose ranks hold the same tokens: the sum would be the
            gradient as many times as there are ranks.
    """
    if not is_distributed(weight):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    names = [name for name in weight.device_mesh.mesh_dim_names or () if name.lower().startswith(("tp", "tensor"))]
    if names:
        raise ValueError(
            f"weight is a DTensor over the mesh dimension {names[0]!r}, whose ranks hold the same tokens; give "
            "weight.to_local() and vocabulary_shard=VocabularyShard.from_local(its rows, the mesh's group)"
        )
    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
