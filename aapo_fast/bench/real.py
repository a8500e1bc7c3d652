"""Hidden states of a real model on its own samples: SmolLM2-135M-Instruct, the quickstart's model."""

from __future__ import annotations

from pathlib import Path

import torch

import aapo_fast
from aapo_fast.bench.inputs import Problem
from aapo_fast.types import SamplingParams, UserError

QUICKSTART = Path(aapo_fast.__file__).parent / "cli" / "quickstart.toml"
PROMPTS = ("The sea is", "Question: What is 7 + 5?\nAnswer:", "def f(x):", "Once upon a time", "To make bread, you")
COMPLETIONS = 4
MAX_TOKENS = 64
GROUP = 32


def sampled_states(seed: int) -> Problem:
    """Up to 1280 sampled tokens, in float32 on the CPU.

    They are cut to whole groups of 32, each with a random advantage: some peers want sequences of one length, and
    bfloat16 products of odd sizes are many times slower on a CPU.

    Raises:
        UserError: a package that this needs is missing.
    """
    try:
        from aapo_fast import config
        from aapo_fast.data.packing import Weighted
        from aapo_fast.rollout.hf import HFEngine
        from aapo_fast.trainer.policy import Policy
    except ModuleNotFoundError as error:
        raise UserError(
            f"--real needs the package {error.name}; run: pip install '.[train]' in aapo-fast's folder"
        ) from error
    policy = Policy.from_config(config.load(QUICKSTART).model, temperature=1.0)
    prompts = [policy.tokenizer(text).input_ids for text in PROMPTS]
    groups = HFEngine(policy.model, policy.tokenizer).generate(
        prompts, n=COMPLETIONS, sampling=SamplingParams(max_tokens=MAX_TOKENS), seeds=range(seed, seed + len(prompts))
    )
    with torch.no_grad():
        batch = policy.batch([Weighted(sample, 1.0) for group in groups for sample in group])
        hidden = policy.hidden_states(batch).float()
    num_sequences = batch.targets.numel() // GROUP
    rows = torch.randperm(batch.targets.numel(), generator=torch.Generator().manual_seed(seed))[: num_sequences * GROUP]
    return Problem(
        hidden=hidden[rows].clone().requires_grad_(),
        weight=policy.head.weight.detach().float().clone().requires_grad_(),
        targets=batch.targets[rows],
        advantages=torch.randn(num_sequences, generator=torch.Generator().manual_seed(seed)),
        sequence_index=torch.arange(rows.numel()) // GROUP,
        softcap=None,
    )
