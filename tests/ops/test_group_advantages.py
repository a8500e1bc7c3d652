"""The estimator's kernel against the estimator."""

import math

import pytest
import torch

import aapo_fast as af

pytest.importorskip("triton", reason="triton is not installed")

from aapo_fast.ops.group_advantages import LARGEST_GROUP, group_advantages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = math.nan
ULP = 1.2e-7


def rewards_of(groups, size, dtype=torch.float32, seed=0):
    """Continuous and 0/1 rewards, some missing, a group of equal ones and a group of missing ones; and references."""
    g = torch.Generator().manual_seed(seed)
    rewards = torch.rand(groups, size, generator=g) * 3 - 1
    rewards[1::3] = (rewards[1::3] > 0).float()
    rewards[torch.rand(groups, size, generator=g) < 0.15] = NAN
    reference = rewards.nan_to_num() + torch.randn(groups, size, generator=g) * 0.3
    reference[torch.rand(groups, size, generator=g) < 0.1] = NAN
    if groups > 3:
        rewards[2], rewards[3] = 0.1, NAN
    return rewards.flatten().to(DEVICE, dtype), reference.flatten().to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("groups", "size"), [(1, 1), (7, 1), (5, 2), (6, 8), (5, 13), (4, 1024)])
def test_equals_the_estimator(groups, size, dtype):
    rewards, reference = rewards_of(groups, size, dtype)
    for options in ({}, {"scale_rewards": False}, {"delta_low": -0.05, "delta_high": 2.0}):
        for against in (reference, None):
            exact = af.aapo_advantages(rewards.cpu(), None if against is None else against.cpu(), size, **options)
            ours = group_advantages(rewards, against, size, **options)
            assert ours.dtype == torch.float32 and ours.shape == rewards.shape
            # Sums in another order are seen in the last place at most, and zeros are zeros.
            assert torch.allclose(ours.cpu(), exact, rtol=ULP, atol=1e-14)
            if against is None:
                assert torch.equal(ours.cpu() == 0, exact == 0)


def test_worked_by_hand():
    """Unbiased standard deviation of (1, 0, 0, 1): 0.57735; gaps 0.1 inside the bounds, 1 above, -0.5 below, none."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0], device=DEVICE)
    reference = torch.tensor([0.9, -1.0, 0.5, NAN], device=DEVICE)
    z = 0.5 / (0.5773503 + 1e-4)
    expected = [z + 0.1, -z + 0.28, -z - 0.2, z]
    assert group_advantages(rewards, reference, 4).tolist() == pytest.approx(expected, abs=1e-6)


def test_equal_rewards_leave_exactly_momentum_and_missing_ones_nothing():
    tenth = torch.full((1000,), 0.1, device=DEVICE)
    assert (group_advantages(tenth, None, 1000) == 0).all()
    missing = torch.tensor([NAN, 2.0, NAN, NAN, NAN, NAN], device=DEVICE)
    assert group_advantages(missing, None, 3).tolist() == [0.0] * 6
    assert group_advantages(missing, torch.ones_like(missing), 3).tolist() == pytest.approx([0, 0.28, 0, 0, 0, 0])


def test_strided_rewards_no_groups_and_groups_too_large():
    rewards, reference = rewards_of(6, 8)
    wide = torch.stack([rewards, reference], 1)
    assert torch.equal(group_advantages(wide[:, 0], wide[:, 1], 8), group_advantages(rewards, reference, 8))
    assert group_advantages(rewards[:0], reference[:0], 8).shape == (0,)
    with pytest.raises(ValueError, match="group_size=1025; the kernel holds a group at once"):
        group_advantages(torch.zeros(LARGEST_GROUP + 1, device=DEVICE), None, LARGEST_GROUP + 1)
