"""The policy on many ranks: its weights, gradients and moments in shards (FSDP2, ``fully_shard``), trained together.

    trained     in shards, a layer a group; embedding, last norm and head, tied or not, are the root's group
    model       whole on every rank, the weights of the last step: it generates, and is what is saved

The whole copy is there for the rollouts. Ranks draw completions of different lengths, so their forward passes differ
in number: gathering the shards in each of them would be a deadlock, or lockstep with the longest completion and a
gather of all weights a token. One gather a step into a plain model costs 4 bytes a parameter on each rank, and every
rollout engine, the frozen reference, and the writing of models and checkpoints work on it as they do with one rank.
Gradients, moments and the weights that are trained, 16 bytes a parameter, are divided among the ranks.

The fused head reads its weight inside the root's forward, where it is whole; or embedding and head are not the root's,
and stay sharded (``trainer.vocabulary``). The loss is divided by the tokens of all
ranks, so gradients are summed over ranks and not averaged.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from aapo_fast.data.packing import Weighted
from aapo_fast.models.head import find_layers
from aapo_fast.ops.linear_policy import PolicyLoss
from aapo_fast.ops.linear_policy.sharded import whole
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.ranks import Ranks
from aapo_fast.trainer.vocabulary import VocabularyParallel
from aapo_fast.types import Batch, Sample


class ShardedPolicy(Policy):
    """``policy`` among the ranks: its model stays whole, and a copy of it is trained in shards. All begin with the
    first rank's weights.

    Args:
        vocabulary_parallel: each rank computes its part of embedding and head, for the tokens of all.

    Making one, ``loss`` with its backward, ``collect``, and the norm of the gradient are collective.
    """

    def __init__(self, policy: Policy, ranks: Ranks, vocabulary_parallel: bool = False) -> None:
        arguments = (policy.tokenizer, policy.temperature, policy.how, policy.precision, policy.flash)
        super().__init__(policy.model, *arguments)
        self.ranks = ranks
        for parameter in policy.model.parameters():
            if parameter.requires_grad:  # an adapter's begin at random
                dist.broadcast(parameter.detach(), src=0)
        mesh, own = init_device_mesh(self.device.type, (ranks.world,)), copy.deepcopy(policy.model)
        self._root = _Root(
            VocabularyParallel(ranks, mesh, own, *arguments) if vocabulary_parallel else Policy(own, *arguments)
        )
        self.trained = self._root.model
        in_pieces = {parameter for parameter in own.parameters() if isinstance(parameter.data, DTensor)}
        for module in (*find_layers(self._root.policy.decoder), self._root):
            fully_shard(module, mesh=mesh, ignored_params=in_pieces)
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    def batch(self, samples: Sequence[Weighted]) -> Batch:
        """As with one rank. Of no samples: two tokens that go through the layers (for one they would be compiled anew),
        and no row that reaches the head, so that a rank without a microbatch takes part in the gathers of the others.
        """
        if samples:
            return super().batch(samples)
        tokens = super().batch([Weighted(Sample((0, 0), (0,), (), "", "stop", 0), 0.0)])
        rows = ("hidden_index", "targets", "sequence_index", "rollout_logps")
        return replace(tokens, **{name: getattr(tokens, name)[:0] for name in rows})

    def loss(self, batch: Batch, num_tokens: int, seed: int = 0) -> PolicyLoss:
        return PolicyLoss(*self._root(batch, num_tokens, seed))

    @torch.no_grad()
    def collect(self) -> None:
        for model, shard in zip(self.model.parameters(), self.trained.parameters(), strict=True):
            if shard.requires_grad:
                model.copy_(whole(shard))

    @torch.no_grad()
    def distribute(self) -> None:
        for model, shard in zip(self.model.parameters(), self.trained.parameters(), strict=True):
            if isinstance(shard, DTensor):
                part = distribute_tensor(model, shard.device_mesh, shard.placements, src_data_rank=None)
                shard.to_local().copy_(part.to_local())


class _Root(nn.Module):
    """FSDP's root, whose forward is the loss."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy, self.model = policy, policy.model

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = self.policy.loss(*arguments)
        return out.loss, out.logps, out.entropy
