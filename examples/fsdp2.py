"""The loss under FSDP2 (``fully_shard``), as in TorchTitan's trainer: parameters sharded, unequal batches, one step.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py [--steps 20]

Two things to get right, both below: the loss is computed inside the wrapped model's forward, where the head's weight is
whole; and FSDP averages gradients over ranks, so the loss is divided by the tokens of all ranks and multiplied by their
number. Runs on GPUs (nccl) or without (gloo).
"""

import argparse
import os

import torch
import torch.distributed as dist
from model import LanguageModel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import aapo_fast as af

VOCAB, SEQUENCES = 512, 12


class PolicyModel(LanguageModel):
    """Its forward returns the loss, so that the head is used while FSDP has gathered it."""

    def forward(self, ids: Tensor, advantages: Tensor, num_tokens: Tensor) -> Tensor:
        hidden, targets = self.decoder(ids)[:, :-1], ids[:, 1:]
        sequence_index = torch.arange(len(ids), device=ids.device).repeat_interleave(targets.shape[1])
        # Padding has no target; position 0 is what the first prediction is made from.
        targets = torch.where(targets == 0, -100, targets)
        objective = af.AAPO(advantages, sequence_index, num_tokens)
        return af.linear_policy_loss(hidden.flatten(0, 1), self.head.weight, targets.flatten(), objective).loss


def global_batch() -> tuple[Tensor, Tensor]:
    """Sequences of 4 to 15 tokens, padded with 0, and an advantage each: the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (SEQUENCES, 15), generator=generator)
    lengths = torch.arange(4, 4 + SEQUENCES)
    return ids.where(torch.arange(15) < lengths[:, None], 0), torch.rand(SEQUENCES, generator=generator) + 0.5


def train(steps: int) -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (world_size,))

    torch.manual_seed(0)
    model = PolicyModel(VOCAB).to(device)
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # last: the root holds what no layer holds, the head among it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)

    ids, advantages = (t.tensor_split(world_size)[rank].to(device) for t in global_batch())
    for step in range(steps):
        num_tokens = (ids[:, 1:] != 0).sum().float()
        dist.all_reduce(num_tokens)
        loss = model(ids, advantages, num_tokens)
        (world_size * loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step:2d}  loss {total.item():.5f}  grad {norm.item():.5f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (%(default)s)")
    train(parser.parse_args().steps)
    # Without Python's own end, in which a thread of gloo that still lets go of the last tensor aborts the process.
    # Gloo's threads outlive their group, since what DTensor caches holds on to it (torch 2.13).
    os._exit(0)
