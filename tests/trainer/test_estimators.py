"""pass@k against every draw there is, and intervals that hold the truth as often as they say."""

import itertools
import math

import pytest
import torch

from aapo_fast.trainer.estimators import bootstrap, pass_at_k, reported_k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [i < c for i in range(n)]
        draws = [any(draw) for draw in itertools.combinations(right, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_of_many_completions():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)
    assert pass_at_k(256, 0, 256) == 0.0 and pass_at_k(256, 1, 256) == 1.0


def test_pass_at_k_is_unbiased_where_the_plain_formula_is_not():
    """Of n = 4 completions that are right with p = 0.3: the mean of the estimates of pass@3, over all counts c."""
    p, n, k = 0.3, 4, 3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(truth, abs=1e-12)
    assert abs(sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights)) - truth) > 0.02


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0), (3, -1, 1)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match=f"pass@{k}"):
        pass_at_k(n, c, k)


def test_reported_k():
    assert [reported_k(n) for n in (1, 2, 4, 6, 64)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32, 64]]


def test_intervals_hold_the_truth_as_often_as_they_say():
    """500 sets of 120 problems, each problem with its own difficulty and 4 completions."""
    generator = torch.Generator().manual_seed(1)
    sets, problems, completions = 500, 120, 4
    difficulty = torch.rand(sets, problems, 1, generator=generator) ** 2
    right = torch.rand(sets, problems, completions, generator=generator) < difficulty
    held = 0
    for values in right.double().mean(2).tolist():
        estimate = bootstrap(values, resamples=1000)
        held += estimate.low <= 1 / 3 <= estimate.high  # the mean of a square of a uniform number
    assert 0.92 <= held / sets <= 0.98


def test_the_width_is_that_of_the_mean():
    values = torch.rand(400, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    estimate = bootstrap(values.tolist())
    width = 2 * 1.96 * (values.std(correction=0) / 400**0.5).item()
    assert estimate.high - estimate.low == pytest.approx(width, rel=0.05)
    assert estimate.value == pytest.approx(values.mean().item()) and estimate.problems == 400


def test_intervals_are_the_same_each_time_and_empty_ones_are_nan():
    values = [i / 7 % 1.0 for i in range(50)]
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    assert math.isnan(bootstrap([]).value) and bootstrap([]).problems == 0
    one = bootstrap([1.0] * 5)
    assert (one.value, one.low, one.high) == (1.0, 1.0, 1.0)
