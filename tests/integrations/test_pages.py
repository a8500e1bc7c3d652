"""Python on the pages of trainers that cannot be installed here, run on tensors in the signatures they were read in."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import aapo_fast as af

PAGES = Path(__file__).parents[2] / "docs" / "integrations"


def run_page(name):
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / name).read_text(), re.DOTALL)
    assert len(blocks) == 1
    space = {}
    exec(blocks[0], space)
    return space


def test_nemo_rl_estimator():
    """Two prompts (token ids) of two and three samples, one of which is not valid; (B, T) comes out."""
    estimator = run_page("nemo-rl.md")["AAPOAdvantageEstimator"](SimpleNamespace(delta_high=0.1), None)
    prompt_ids = torch.tensor([[1, 2], [3, 4], [1, 2], [3, 4], [3, 4]])
    rewards = torch.tensor([1.0, 0.5, 0.0, 0.25, 9.0])
    reference = torch.tensor([0.2, 0.3, 0.1, 0.5, 0.0])
    out = estimator.compute_advantage(
        prompt_ids=prompt_ids,
        rewards=rewards,
        mask=torch.ones(5, 3),
        repeated_batch={"reference_rewards": reference},
        valid_mask=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]),
        logprobs_policy=None,
        logprobs_reference=None,
    )
    assert out.shape == (5, 3)
    for rows in ([0, 2], [1, 3]):
        expected = af.aapo_advantages(rewards[rows], reference[rows], group_size=2, delta_high=0.1)
        assert torch.equal(out[rows], expected[:, None].expand(2, 3))
    assert (out[4] == 0).all()


def test_prime_rl_group():
    advantages = run_page("prime-rl.md")["aapo_of_group"]([1.0, 0.0], [0.5, 0.7])
    z = 0.5 / (0.5**0.5 + 1e-4)
    assert advantages == pytest.approx([z + 0.28, -z - 0.2], rel=1e-5)


def test_openrlhf_branch():
    """Three prompts of four samples, (prompts, samples) in and out."""
    rewards, reference = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    out = run_page("openrlhf.md")["aapo"](rewards, reference)
    assert out.shape == (3, 4)
    for row, own, other in zip(out, rewards, reference, strict=True):
        assert torch.equal(row, af.aapo_advantages(own, other, group_size=4))
