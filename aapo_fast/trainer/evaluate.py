"""Held-out accuracy: greedy and sampled pass@1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aapo_fast.config import EvalConfig
from aapo_fast.rewards.scorer import Scorer
from aapo_fast.types import Problem, Progress, RolloutEngine, Sample, SamplingParams


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on a set of problems. A completion without a reward is left out and counted.

    Attributes:
        greedy: share of problems whose greedy completion is right.
        sampled: mean share of right completions among the sampled ones; NaN if none were drawn.
        failures: completions without a reward.
        samples: the greedy completions, in the order of the problems.
    """

    greedy: float
    sampled: float
    failures: int
    samples: list[Sample]


def evaluate(
    engine: RolloutEngine,
    scorer: Scorer,
    problems: Sequence[Problem],
    config: EvalConfig,
    sampling: SamplingParams,
    progress: Progress | None = None,
) -> Evaluation:
    """Greedy, and ``config.samples`` sampled, completions of every problem, always from the same seeds."""
    prompts = [p.prompt_ids for p in problems]
    seeds = range(len(problems))
    greedy = engine.generate(
        prompts, n=1, sampling=replace(sampling, temperature=0.0, top_p=1.0), seeds=seeds, progress=progress
    )
    right, failures = _right(scorer, problems, greedy, config.correct_at)
    sampled_share = math.nan
    if config.samples:
        sampled = engine.generate(prompts, n=config.samples, sampling=sampling, seeds=seeds, progress=progress)
        sampled_share, more = _right(scorer, problems, sampled, config.correct_at)
        failures += more
    return Evaluation(right, sampled_share, failures, [samples[0] for samples in greedy])


def _right(
    scorer: Scorer, problems: Sequence[Problem], drawn: Sequence[Sequence[Sample]], correct_at: float
) -> tuple[float, int]:
    verdicts: list[bool] = []
    failures = 0
    for problem, samples in zip(problems, drawn, strict=True):
        for sample in samples:
            value = scorer.score(problem, sample.text).values[0]
            if math.isnan(value):
                failures += 1
            else:
                verdicts.append(value >= correct_at)
    return (sum(verdicts) / len(verdicts) if verdicts else math.nan), failures
