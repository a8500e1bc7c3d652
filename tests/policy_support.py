"""Policies over tiny models, and samples that share prompts."""

import random

import support
import torch

from aapo_fast.data.packing import Weighted
from aapo_fast.models import attention
from aapo_fast.trainer.policy import Policy


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def make_policy(family, dtype=torch.float64):
    model = support.tiny(family, dtype=dtype)
    model.set_attn_implementation(attention.NAME)
    return Policy(model, support.tokenizer(), temperature=0.9)


def make_samples(seed=0):
    """Three prompts, of which two have several completions; lengths from one token up, windows exceeded."""
    rng = random.Random(seed)
    samples = []
    for prompt_length, count in ((5, 3), (9, 1), (2, 4)):
        prompt = [rng.randrange(1, 40) for _ in range(prompt_length)]
        for length in rng.sample(range(1, 9), count):
            completion = [rng.randrange(1, 40) for _ in range(length)]
            samples.append(Weighted(support.sample(prompt, completion), rng.uniform(-2, 2)))
    return samples
