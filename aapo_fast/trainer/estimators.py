"""pass@k from n samples a problem, and how sure of it a set of problems makes us.

Letters: P problems, n completions of a problem, c right ones among them, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

CONFIDENCE = 0.95
RESAMPLES = 10_000
INDICES_AT_ONCE = 2**22


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its bootstrap interval.

    Attributes:
        value: the mean; NaN without problems.
        low, high: the ends of the interval; NaN without problems.
        problems: how many it is of.
    """

    value: float
    low: float
    high: float
    problems: int


def pass_at_k(num_completions: int, num_right: int, k: int) -> float:
    """The chance that at least one of k completions, drawn from n without replacement, is right.

        1 - C(n - c, k) / C(n, k)

    The unbiased estimator of Chen et al., arXiv 2107.03374, section 2.1.

    Raises:
        ValueError: k exceeds n, or c does.
    """
    n, c = num_completions, num_right
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} right among {n}: want 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def reported_k(num_completions: int) -> list[int]:
    """1, 2, 4, ... below n, and n itself."""
    return [*(2**i for i in range(num_completions.bit_length()) if 2**i < num_completions), num_completions]


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of one value a problem, with its 95 % percentile interval.

    Problems are drawn anew with replacement, P of them, B times; the interval lies between the 2.5th and the 97.5th
    percentile of the B means (Efron, The Annals of Statistics 7, 1979). It says what other problems of the same kind
    would change, and, as every problem brings its own completions, what other completions would. Where all values are
    equal it has no width, which says more of the number of problems than of the model.
    """
    if not values:
        return Estimate(math.nan, math.nan, math.nan, 0)
    found = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = []
    left, width = resamples, max(1, INDICES_AT_ONCE // len(values))
    while left > 0:
        index = torch.randint(len(values), (min(width, left), len(values)), generator=generator)
        means.append(found[index].mean(1))
        left -= width
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Estimate(found.mean().item(), low, high, len(values))
