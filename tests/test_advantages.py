"""The estimator against groups worked out by hand."""

import math
import statistics

import pytest
import torch

import aapo_fast as af

NAN = math.nan


def advantages(rewards, reference=None, **options):
    reference = None if reference is None else torch.tensor(reference)
    return af.aapo_advantages(torch.tensor(rewards), reference, **options).tolist()


def test_group_relative_part():
    # mean 0.5, unbiased variance 4 * 0.25 / 3, standard deviation 0.57735
    z = 0.5 / (0.5773503 + 1e-4)
    assert advantages([1.0, 0.0, 0.0, 1.0], group_size=4) == pytest.approx([z, -z, -z, z], abs=1e-6)


def test_rounded_once_whatever_the_order():
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(64, generator=g)
    mean, std = statistics.fmean(rewards.tolist()), statistics.stdev(rewards.tolist())
    truth = torch.tensor([(r - mean) / (std + 1e-4) for r in rewards.tolist()], dtype=torch.float64)
    for seed in range(20):
        order = torch.randperm(64, generator=g.manual_seed(seed))
        found = af.aapo_advantages(rewards[order], None, 64).double()
        assert ((found - truth[order]).abs() <= 2**-24 * (1 + 1e-6) * truth[order].abs()).all()


def test_groups_do_not_mix():
    both = advantages([1.0, 0.0, 3.0, 1.0], group_size=2)
    assert both == pytest.approx(advantages([1.0, 0.0], group_size=2) + advantages([3.0, 1.0], group_size=2))


def test_without_scaling():
    assert advantages([3.0, 1.0, 2.0, 2.0], group_size=4, scale_rewards=False) == pytest.approx([1.0, -1.0, 0.0, 0.0])


def test_momentum_is_added_and_clipped_on_both_sides():
    # gaps: 0.1 inside, 1.0 above 0.28, -0.5 below -0.2, 0.0
    out = advantages([0.6, 1.0, 0.0, 0.4], [0.5, 0.0, 0.5, 0.4], group_size=4, scale_rewards=False)
    assert out == pytest.approx([0.1 + 0.1, 0.5 + 0.28, -0.5 - 0.2, -0.1 + 0.0], abs=1e-6)
    wide = advantages([0.6, 1.0], [0.5, 0.0], group_size=2, scale_rewards=False, delta_low=-9.0, delta_high=9.0)
    assert wide == pytest.approx([-0.2 + 0.1, 0.2 + 1.0], abs=1e-6)


def test_equal_rewards_leave_momentum_alone():
    assert advantages([0.7] * 4, group_size=4) == [0.0] * 4
    assert advantages([1.0] * 3, [1.0, 0.9, 0.0], group_size=3) == pytest.approx([0.0, 0.1, 0.28])
    # a thousand equal numbers that no binary fraction is equal to: still exactly zero
    assert advantages([0.1] * 1000, group_size=1000) == [0.0] * 1000


def test_a_group_of_one():
    assert advantages([5.0], group_size=1) == [0.0]
    assert advantages([5.0, 1.0], [4.9, 2.0], group_size=1) == pytest.approx([0.1, -0.2], abs=1e-6)


def test_missing_rewards_are_left_out_and_get_nothing():
    out = advantages([1.0, NAN, 0.0, NAN], [0.0, 0.0, 0.0, NAN], group_size=4)
    two = advantages([1.0, 0.0], [0.0, 0.0], group_size=2)
    assert out == pytest.approx([two[0], 0.0, two[1], 0.0])
    assert advantages([NAN, 2.0, NAN], group_size=3) == [0.0] * 3
    assert advantages([NAN, NAN], [1.0, 1.0], group_size=2) == [0.0, 0.0]


def test_missing_reference_rewards_leave_no_momentum():
    assert advantages([1.0, 1.0], [NAN, 0.9], group_size=2) == pytest.approx([0.0, 0.1], abs=1e-6)


def test_low_precision_rewards_are_widened():
    out = af.aapo_advantages(torch.tensor([1.0, 0.0], dtype=torch.bfloat16), None, group_size=2)
    assert out.dtype == torch.float32 and out.tolist() == pytest.approx(advantages([1.0, 0.0], group_size=2))


@pytest.mark.parametrize(
    ("rewards", "reference", "options", "match"),
    [
        (torch.zeros(6), None, {"group_size": 4}, r"shape \(6,\), group_size=4"),
        (torch.zeros(2, 3), None, {"group_size": 3}, r"shape \(2, 3\)"),
        (torch.zeros(4), None, {"group_size": 0}, "group_size=0"),
        (torch.zeros(4), None, {"group_size": 2.0}, "group_size=2.0; give an int"),
        (torch.zeros(4), None, {"group_size": "4"}, "group_size='4'; give an int"),
        (torch.zeros(4), None, {"group_size": 2, "delta_low": None}, "delta_low=None; give a number"),
        (torch.zeros(4), torch.zeros(2), {"group_size": 2}, r"reference_rewards has shape \(2,\)"),
        (torch.zeros(4), None, {"group_size": 2, "delta_low": 0.3}, "delta_low=0.3 is not below"),
        (torch.tensor([0.0, math.inf]), None, {"group_size": 2}, r"rewards\[1\] is inf"),
    ],
)
def test_refusals(rewards, reference, options, match):
    with pytest.raises(ValueError, match=match):
        af.aapo_advantages(rewards, reference, **options)


def test_large_whole_numbers_keep_their_differences():
    rewards = torch.tensor([1e9 + 1, 1e9 + 2, 1e9 + 3, 1e9], dtype=torch.float64)
    small = af.aapo_advantages(rewards - 1e9, None, 4)
    assert torch.equal(af.aapo_advantages(rewards, None, 4), small) and small.norm() > 1
    assert torch.equal(af.aapo_advantages(rewards.long(), None, 4), small)
    with pytest.raises(ValueError, match="rewards is a list; give a torch.Tensor"):
        af.aapo_advantages([1.0, 2.0], None, 2)
