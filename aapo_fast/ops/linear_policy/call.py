"""What a call asks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aapo_fast.ops.linear_policy.sharded import VocabularyShard
from aapo_fast.ops.linear_policy.statistics import Transform


@dataclass(frozen=True, eq=False)
class Call:
    """What a call asks, beside its tensors and its objective.

    Attributes:
        transform: from raw products to logits; a per-row temperature is (N,).
        vocab_size: rows of the weight that are tokens; those beyond are padding.
        shard: this rank's part of a vocabulary-parallel head, or None.
        threshold: eps of sparse gradient rows, or None for exact ones.
        seed: of their sample.
        implementation: of the row kernels, resolved: "torch", "triton" or "native".
        drop_rows: leave out rows without weight; if a GPU alone knows them, finding them waits for it once.
        autocast: what hidden and weight are cast to, or None.
    """

    transform: Transform
    vocab_size: int
    shard: VocabularyShard | None
    threshold: float | None
    seed: int
    implementation: str
    drop_rows: bool
    autocast: torch.dtype | None
