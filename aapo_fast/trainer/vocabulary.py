"""Vocabulary-parallel embedding and head: a rank holds some rows of both, and computes them for all ranks' tokens.

Vocabulary-parallel (Megatron-LM, arXiv 1909.08053), within a run that is otherwise data-parallel (FSDP2). A shard is
what FSDP2 would make of the weight: a contiguous piece of the vocabulary, as ``torch.chunk`` cuts it.

    embedding   token ids are gathered; each rank looks up those that it holds; sums go back to the tokens' owners
    head        hidden states are gathered; each rank computes its columns (``ops``' ``VocabularyShard``); the parts of
                their gradient are summed on the way back to the owners

So neither weight is gathered in a step and no gradient of one is reduced: it is complete in its shard, that of both
roles where they are tied. What travels instead is four times the hidden states of all tokens; docs/scaling.md says when
that is less.

Ranks have unequal numbers of tokens, and are padded to the largest where they are gathered; the padding is left out
before the first product. The loss is that of all ranks' tokens, on every rank; the first alone says its value.

Letters: N rows of this rank, M of the largest, R ranks, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.nn import functional

from aapo_fast.models.head import Head
from aapo_fast.ops.linear_policy import PolicyLoss, VocabularyShard
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.ranks import Ranks, rows_a_rank
from aapo_fast.transfer import to_device
from aapo_fast.types import Batch, UserError


class VocabularyParallel(Policy):
    """A policy whose embedding and head are cut among the ranks. It has a ``loss``, which is collective, as is its
    backward; what needs no gradient is computed with the whole copy (``trainer.sharded``).

    Args:
        ranks, mesh: all of the run, and their one-dimensional mesh.
        arguments: of ``Policy``.

    Raises:
        UserError: there is no plain embedding, or a rank would have no part of the vocabulary.
    """

    _shard: VocabularyShard | None = None

    def __init__(self, ranks: Ranks, mesh: DeviceMesh, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ranks, self._mesh = ranks, mesh
        head, embedding = super().head, _find_embedding(self.model)
        for weight in {id(w): w for w in (head.weight, head.bias, embedding.weight) if w is not None}.values():
            _cut(self.model, weight, mesh)
        embedding.__class__ = _parallel(type(embedding), ranks)
        vocab = head.weight.shape[0]
        self._shard = _PartialSums(mesh.get_group(), first_row(vocab, mesh), vocab)

    @property
    def head(self) -> Head:
        """This rank's part of it, once there are parts."""
        whole = super().head
        if self._shard is None:
            return whole
        bias = None if whole.bias is None else _local(whole.bias)
        return replace(whole, weight=_local(whole.weight), bias=bias, vocabulary_shard=self._shard)

    def head_loss(self, hidden: Tensor, batch: Batch, num_tokens: int, seed: int) -> PolicyLoss:
        """Of all ranks' rows, by this rank's columns: with the gradients of both. Log-probabilities and entropies are
        those of its own rows. Of sparse rows each rank draws its own columns, by its own seed.
        """
        counts = self.ranks.each(lambda: len(hidden))
        most = max(counts)
        real = torch.cat([torch.arange(count) + rank * most for rank, count in enumerate(counts)])
        here = to_device(real, self.device)

        def of_all(values: Tensor) -> Tensor:
            padded = gathered(values, most, 0.0, self._mesh)
            return padded if len(padded) == len(real) else padded.index_select(0, here)

        rows = replace(
            batch,
            targets=of_all(batch.targets),
            rollout_logps=of_all(batch.rollout_logps),
            advantages=of_all(batch.advantages[batch.sequence_index]),  # one a row, each a sequence of its own
            sequence_index=torch.arange(len(real), device=self.device),
        )
        out = super().head_loss(of_all(hidden), rows, num_tokens, seed)
        first = sum(counts[: self.ranks.rank])
        mine = slice(first, first + len(hidden))
        loss = out.loss if self.ranks.first else out.loss - out.loss.detach()
        return PolicyLoss(loss, out.logps[mine], out.entropy[mine])


class ParallelEmbedding(nn.Embedding):
    """The lookup of an embedding whose weight is cut, (V, H) as a DTensor. Mixed into the model's own class, whose
    ``forward`` may add to it (Gemma 3 scales).

    Attributes:
        ranks: all of which look something up.
    """

    ranks: Ranks
    weight: Any

    def forward(self, input: Tensor) -> Tensor:
        mesh, rows = self.weight.device_mesh, _local(self.weight)
        most = max(self.ranks.each(input.numel))
        first = first_row(self.num_embeddings, mesh)
        ids = gathered(input.flatten(), most, 0, mesh) - first
        held = (ids >= 0) & (ids < len(rows))
        padding = None if self.padding_idx is None else self.padding_idx - first
        padding = padding if padding is not None and 0 <= padding < len(rows) else None
        found = functional.embedding(ids.where(held, 0), rows, padding).where(held[:, None], 0.0)
        mine: Tensor = DTensor.from_local(found, mesh, [Partial()]).redistribute(placements=[Shard(0)]).to_local()
        return mine[: input.numel()].view(*input.shape, -1)


def _parallel(kind: type[nn.Embedding], ranks: Ranks) -> type[ParallelEmbedding]:
    """``kind`` with ``ParallelEmbedding`` between it and ``nn.Embedding``."""
    bases = (ParallelEmbedding,) if kind is nn.Embedding else (kind, ParallelEmbedding)
    return type(kind.__name__, bases, {"ranks": ranks})


@dataclass(frozen=True, eq=False)
class _PartialSums(VocabularyShard):
    """Leaves the gradient of the hidden states in parts: they are summed as they are scattered to the rows' owners,
    which moves half as much as a sum on every rank.
    """

    def sum_(self, gradient: Tensor) -> None:
        pass


def gathered(values: Tensor, most: int, fill: float, mesh: DeviceMesh) -> Tensor:
    """(R * M, ...) of all ranks' (N, ...), padded to M = ``most`` rows each. Gradients are summed as they go back."""
    padding = values.new_full((most - len(values), *values.shape[1:]), fill)
    mine = DTensor.from_local(torch.cat([values, padding]), mesh, [Shard(0)])
    every: Tensor = mine.full_tensor(grad_placements=[Partial()])
    return every


def first_row(num_rows: int, mesh: DeviceMesh) -> int:
    """Of this rank's shard."""
    return min(num_rows, mesh.get_local_rank() * -(-num_rows // mesh.size()))


def _local(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local()


def _cut(model: nn.Module, weight: Tensor, mesh: DeviceMesh) -> None:
    """Put this rank's shard in the place of a parameter, wherever in the model it is."""
    width, first = rows_a_rank(weight.shape[0], mesh.size()), first_row(weight.shape[0], mesh)
    mine = weight.detach()[first : first + width].clone()
    shard = DTensor.from_local(mine, mesh, [Shard(0)], shape=weight.shape, stride=weight.stride())
    parameter = nn.Parameter(shard, weight.requires_grad)
    for module in model.modules():
        for name, own in list(module.named_parameters(recurse=False)):
            if own is weight:
                setattr(module, name, parameter)


def _find_embedding(model: Any) -> nn.Embedding:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding = base.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None or embedding.scale_grad_by_freq:
        raise UserError(
            f"model.vocabulary_parallel=true: the embedding of {type(base).__name__} is a {type(embedding).__name__} "
            "that cannot be cut into parts (an adapter on it, say); leave it at false"
        )
    return embedding
