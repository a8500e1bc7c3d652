"""What packing and shared prompts bring to a training step, at long prompts and completions of mixed length.

    python benchmarks/shared_prompts.py [--prompt 512] [--group 8] [--rounds 5] [--output FILE.json]

Forward and backward pass of one group in three layouts, in turns and in an order of their own each round: padded (a row
a completion, all as long as the longest), packed (no padding, every completion with a prompt of its own) and shared
(the prompt computed once for all of them). The model is the quickstart's; the gradients are compared first.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from aapo_fast.bench import machine
from aapo_fast.config import ModelConfig
from aapo_fast.data.packing import Weighted, pad
from aapo_fast.trainer.policy import Policy
from aapo_fast.trainer.transfer import batch_to_device
from aapo_fast.types import Batch, Sample

LAYOUTS = ("padded", "packed", "shared")


class Apart(tuple[int, ...]):
    """A prompt that is equal to none but itself, so that nothing shares it."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def make_group(vocab: int, prompt: int, group: int, longest: int, seed: int = 0) -> list[Weighted]:
    """Completions from an eighth of the longest up, evenly spaced; random tokens."""
    generator = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(generator.randrange(vocab) for _ in range(count))

    shared = tokens(prompt)
    lengths = [max(1, round(longest * (1 + 7 * i / max(1, group - 1)) / 8)) for i in range(group)]
    return [Weighted(Sample(shared, tokens(n), (), "", "length", 0), generator.uniform(-2, 2)) for n in lengths]


def batch_of(policy: Policy, samples: Sequence[Weighted], layout: str) -> Batch:
    if layout == "padded":
        return batch_to_device(pad(samples, 0), policy.device)
    if layout == "packed":
        samples = [
            Weighted(Sample(Apart(w.sample.prompt_ids), w.sample.token_ids, (), "", "length", 0), w.advantage)
            for w in samples
        ]
    return policy.batch(samples)


def gradient(policy: Policy, batch: Batch, num_tokens: int) -> float:
    """Seconds of a forward and backward pass; its gradient is left in the parameters."""
    policy.model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    policy.loss(batch, num_tokens).loss.backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ModelConfig().path)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--group", type=int, default=8, help="completions of it")
    parser.add_argument("--longest", type=int, default=112, help="tokens of the longest completion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()

    policy = Policy.from_config(ModelConfig(path=arguments.model), 1.0)
    vocab = policy.head.weight.shape[0]
    samples = make_group(vocab, arguments.prompt, arguments.group, arguments.longest)
    num_tokens = sum(len(w.sample.token_ids) for w in samples)
    batches = {layout: batch_of(policy, samples, layout) for layout in LAYOUTS}

    gradients = {}
    for layout, batch in batches.items():
        gradient(policy, batch, num_tokens)
        gradients[layout] = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    truth = gradients["padded"].norm()
    apart = {name: ((g - gradients["padded"]).norm() / truth).item() for name, g in gradients.items()}
    del gradients

    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for number in range(arguments.rounds):
        for layout in random.Random(number).sample(LAYOUTS, len(LAYOUTS)):
            seconds[layout].append(gradient(policy, batches[layout], num_tokens))
            print(f"round {number + 1}/{arguments.rounds}  {layout:7} {seconds[layout][-1]:.2f} s", flush=True)

    rows = {
        layout: {
            "forward_tokens": batches[layout].input_ids.numel(),
            "seconds": statistics.median(seconds[layout]),
            "ratio": statistics.median(a / b for a, b in zip(seconds[layout], seconds["padded"], strict=True)),
            "gradient_difference": apart[layout],
        }
        for layout in LAYOUTS
    }
    print(f"\n{arguments.group} completions of up to {arguments.longest} tokens, a prompt of {arguments.prompt}\n")
    print("| layout | tokens computed | seconds | of padded | gradient, from padded |\n| --- | --- | --- | --- | --- |")
    for layout, row in rows.items():
        figures = f"{row['seconds']:.2f} | {row['ratio']:.2f} | {row['gradient_difference']:.1e}"
        print(f"| {layout} | {row['forward_tokens']} | {figures} |")
    if arguments.output:
        given = {name: getattr(arguments, name) for name in ("prompt", "group", "longest", "rounds", "model")}
        result = {"machine": machine.describe(), **given, "layouts": rows, "all_seconds": seconds}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
