"""What a vocabulary-parallel embedding and head bring to a microbatch on several ranks: seconds and memory.

    torchrun --standalone --nproc-per-node 2 benchmarks/vocabulary_parallel.py [--vocab 49152] [--rows 512] ...

Forward and backward pass of one microbatch a rank under FSDP2, with the weights of embedding and head gathered and in
pieces, in turns and in an order of its own each round. The model is a Llama with random weights and few layers, so that
the head counts; the gradients are compared first. Over gloo on one machine: ranks share its cores and its memory's
bandwidth, so the seconds say little about GPUs; the bytes are those of any device but for its chunks of logits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from torch import distributed as dist

from aapo_fast.bench import machine
from aapo_fast.bench.memory import _reset_peak, _status
from aapo_fast.data.packing import Weighted
from aapo_fast.models.load import take_over_attention
from aapo_fast.ops.linear_policy.sharded import whole
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.ranks import Ranks
from aapo_fast.trainer.sharded import ShardedPolicy
from aapo_fast.types import Batch, Sample

HOW = {"gathered": False, "in pieces": True}
PROMPT, COMPLETION = 16, 64


class NoTokenizer:
    pad_token_id = 0


def make_model(vocab: int, hidden: int, layers: int, tied: bool) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    take_over_attention(model)
    return model


def make_samples(vocab: int, rows: int, seed: int) -> list[Weighted]:
    """Completions of one prompt, with ``rows`` tokens in all."""
    generator = random.Random(seed)
    prompt, *completions = (
        tuple(generator.randrange(vocab) for _ in range(count))
        for count in (PROMPT, *[COMPLETION] * (rows // COMPLETION))
    )
    return [Weighted(Sample(prompt, ids, (), "", "length", 0), generator.uniform(-2, 2)) for ids in completions]


def measure(policy: ShardedPolicy, batch: Batch, num_tokens: int) -> tuple[float, int]:
    """Seconds, and bytes at the peak beyond what was there before; the gradient is left in the parameters."""
    policy.trained.zero_grad(set_to_none=True)
    dist.barrier()
    there = _status("VmRSS") if _reset_peak() else 0
    start = time.perf_counter()
    policy.loss(batch, num_tokens).loss.backward()
    dist.barrier()
    return time.perf_counter() - start, _status("VmHWM") - there


def gradient(policy: ShardedPolicy) -> torch.Tensor:
    return torch.cat([whole(p.grad).flatten() for p in policy.trained.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--untied", action="store_true", help="embedding and head of their own")
    parser.add_argument("--rows", type=int, default=512, help="target tokens of a rank's microbatch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.world))
    model = make_model(arguments.vocab, arguments.hidden, arguments.layers, not arguments.untied)
    policies = {name: ShardedPolicy(Policy(model, NoTokenizer(), 1.0), ranks, how) for name, how in HOW.items()}
    samples = make_samples(arguments.vocab, arguments.rows, seed=ranks.rank)
    batch, num_tokens = policies["gathered"].batch(samples), ranks.world * arguments.rows
    gradients = {}
    for name, policy in policies.items():
        measure(policy, batch, num_tokens)
        gradients[name] = gradient(policy)
    apart = ((gradients["in pieces"] - gradients["gathered"]).norm() / gradients["gathered"].norm()).item()
    del gradients

    seconds: dict[str, list[float]] = {name: [] for name in HOW}
    peaks: dict[str, list[int]] = {name: [] for name in HOW}
    for number in range(arguments.rounds):
        for name in random.Random(number).sample(list(HOW), len(HOW)):
            for policy in policies.values():
                policy.trained.zero_grad(set_to_none=True)
            took, peak = measure(policies[name], batch, num_tokens)
            seconds[name].append(took)
            peaks[name].append(max(ranks.each(lambda peak=peak: peak)))
    if ranks.first:
        report(arguments, ranks.world, apart, seconds, peaks)
    dist.destroy_process_group()


def report(
    arguments: argparse.Namespace,
    world: int,
    apart: float,
    seconds: dict[str, list[float]],
    peaks: dict[str, list[int]],
) -> None:
    given = {name: value for name, value in vars(arguments).items() if name != "output"}
    print(f"{world} ranks, {given}; gradients differ by {apart:.1e}\n")
    print(
        "| embedding and head | seconds | of gathered | peak beyond the shards, GiB a rank |\n| --- | --- | --- | --- |"
    )
    rows = {}
    for name in HOW:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["gathered"], strict=True))
        rows[name] = {"seconds": statistics.median(seconds[name]), "ratio": ratio, "peak_bytes": max(peaks[name])}
        print(f"| {name} | {rows[name]['seconds']:.2f} | {ratio:.2f} | {max(peaks[name]) / 2**30:.2f} |")
    if arguments.output:
        result = {"machine": machine.describe(), "world": world, **given, "gradient_difference": apart, "how": rows}
        result["all_seconds"] = seconds
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Without Python's own end, in which a thread of gloo that still lets go of the last tensor aborts the process.
    os._exit(0)
