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
        values: what the first reward function gave each of them; NaN where it failed.
    """

    greedy: float
    sampled: float
    failures: int
    samples: list[Sample]
    values: list[float]


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
    values = _values(scorer, problems, greedy)
    sampled_values: list[float] = []
    if config.samples:
        sampled = engine.generate(prompts, n=config.samples, sampling=sampling, seeds=seeds, progress=progress)
        sampled_values = _values(scorer, problems, sampled)
    return Evaluation(
        greedy=_share(values, config.correct_at),
        sampled=_share(sampled_values, config.correct_at),
        failures=sum(map(math.isnan, [*values, *sampled_values])),
        samples=[samples[0] for samples in greedy],
        values=values,
    )


def _values(scorer: Scorer, problems: Sequence[Problem], drawn: Sequence[Sequence[Sample]]) -> list[float]:
    pairs = zip(problems, drawn, strict=True)
    scores = scorer.score_all([(problem, sample.text) for problem, samples in pairs for sample in samples])
    return [score.values[0] for score in scores]


def _share(values: Sequence[float], correct_at: float) -> float:
    verdicts = [value >= correct_at for value in values if not math.isnan(value)]
    return sum(verdicts) / len(verdicts) if verdicts else math.nan
